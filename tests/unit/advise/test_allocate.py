"""The integer program against every combination tried out, and its edges."""

from __future__ import annotations

import itertools
import random

import pytest

from bitwright.advise.allocate import GAP, Option, allocate, frontier
from bitwright.errors import PlanError


def problem(seed: int, groups: int = 5, options: int = 4) -> dict[str, list[Option]]:
    rng = random.Random(seed)
    return {
        f"group {g}": [
            Option(f"{s} bits", rng.uniform(0.5, 2) * 10 ** rng.uniform(-5, -1) * 4.0**-s, s * size + rng.randint(0, 7))
            for s in range(2, 2 + options)
        ]
        for g, size in enumerate(rng.choices((64, 100, 256, 1000), k=groups))
    }


def best_of_all(choices: dict[str, list[Option]], budget: int) -> float:
    return min(
        sum(option.loss for option in combination)
        for combination in itertools.product(*choices.values())
        if sum(option.bytes for option in combination) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_it_is_the_best_of_all_combinations(seed, share):
    choices = problem(seed)
    low = sum(min(o.bytes for o in options) for options in choices.values())
    high = sum(max(o.bytes for o in options) for options in choices.values())
    budget = int(low + share * (high - low))
    found = allocate(choices, budget)
    assert found.bytes <= budget
    assert found.bytes == sum(option.bytes for option in found.chosen.values())
    assert set(found.chosen) == set(choices)
    wanted = best_of_all(choices, budget)
    assert wanted <= found.loss * (1 + 1e-12)
    assert found.loss <= wanted * (1 + 10 * GAP)


def test_a_budget_that_exactly_holds_the_smallest_gives_the_smallest():
    choices = problem(1)
    low = sum(min(o.bytes for o in options) for options in choices.values())
    found = allocate(choices, low)
    assert found.bytes == low
    with pytest.raises(PlanError, match=f"take {low} bytes"):
        allocate(choices, low - 1)


def test_a_budget_without_end_gives_the_least_loss_in_the_fewest_bytes():
    choices = {
        "a": [Option("8", 1e-6, 800), Option("4", 1e-3, 400), Option("16", 1e-6, 1600)],
        "b": [Option("4", 0.0, 4)],
    }
    found = allocate(choices, 10**12)
    assert {name: option.label for name, option in found.chosen.items()} == {"a": "8", "b": "4"}


def test_what_matters_more_gets_more_bits():
    options = [Option(str(b), 4.0**-b, 100 * b) for b in (2, 4, 6)]
    heavy = [Option(o.label, 1000 * o.loss, o.bytes) for o in options]
    found = allocate({"light": options, "heavy": heavy}, 800)
    assert (found.chosen["light"].label, found.chosen["heavy"].label) == ("2", "6")


def test_many_groups_of_losses_far_apart_are_solved_within_the_budget():
    choices = problem(3, groups=400, options=8)
    low = sum(min(o.bytes for o in options) for options in choices.values())
    found = allocate(choices, 2 * low)
    assert 2 * low - 1100 < found.bytes <= 2 * low
    # No single step up is left that would still fit.
    left = 2 * low - found.bytes
    for name, options in choices.items():
        for option in options:
            if option.loss < found.chosen[name].loss:
                assert option.bytes - found.chosen[name].bytes > left


def test_the_curve_falls_from_the_smallest_to_the_best():
    points = frontier(problem(4, groups=20))
    assert len(points) > 20
    for before, after in itertools.pairwise(points):
        assert after.bytes > before.bytes
        assert after.loss < before.loss
    choices = problem(4, groups=20)
    assert points[0].bytes == sum(min(o.bytes for o in options) for options in choices.values())
    assert points[-1].loss == pytest.approx(sum(min(o.loss for o in options) for options in choices.values()))


def test_one_option_each_leaves_one_point():
    (point,) = frontier({"a": [Option("x", 1.0, 3)], "b": [Option("y", 2.0, 4)]})
    assert (point.bytes, point.loss) == (7, 3.0)
