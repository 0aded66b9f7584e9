"""Bits under a budget: one option for every group of tied weights, so that the predicted loss is smallest and the bytes fit.

With x_gs = 1 where group g takes option s, loss l_gs and bytes b_gs:

    minimize  sum l_gs x_gs    subject to    sum_s x_gs = 1 for every g,    sum b_gs x_gs <= budget,    x binary

a multiple-choice knapsack, solved to proven optimality (within ``GAP``) by branch and bound (``scipy.optimize.milp``, HiGHS). That losses
of different layers add up is what a second-order expansion of the KL divergence around the original weights says when their errors are
independent (HAWQ-V2, arXiv:1911.03852, section 3; the same program there with traces of the Hessian for losses).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bitwright.errors import PlanError

__all__ = ["GAP", "Choices", "Option", "Point", "allocate", "frontier"]

#: Relative difference from the optimum at which the search stops.
GAP = 1e-4
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group: its predicted loss in nats and its exact bytes."""

    label: str
    loss: float
    bytes: int


#: group -> its options
Choices = Mapping[str, Sequence[Option]]


@dataclass(frozen=True, slots=True)
class Point:
    """One allocation: group -> option, with the sums of both."""

    chosen: Mapping[str, Option]
    loss: float
    bytes: int


def _point(chosen: Mapping[str, Option]) -> Point:
    return Point(chosen, sum(o.loss for o in chosen.values()), sum(o.bytes for o in chosen.values()))


def _worthwhile(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in both, by ascending size; of equal ones the first.

    >>> [o.label for o in _worthwhile([Option("a", 3.0, 5), Option("b", 2.0, 4), Option("c", 1.0, 9), Option("d", 2.0, 4)])]
    ['b', 'c']
    """
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if not found or option.loss < found[-1].loss:
            found.append(option)
    return found


def allocate(choices: Choices, budget_bytes: int) -> Point:
    """The best allocation within the budget. PlanError, naming what is needed at least, where even the smallest options do not fit."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    groups = {name: _worthwhile(options) for name, options in choices.items()}
    least = _point({name: options[0] for name, options in groups.items()})
    if least.bytes > budget_bytes:
        raise PlanError(
            f"the budget of {budget_bytes} bytes is too small: the smallest options take {least.bytes} bytes",
            mend="allow more, or offer smaller options with --candidates",
        )
    best = _point({name: options[-1] for name, options in groups.items()})
    if best.bytes <= budget_bytes:
        return best
    columns = [(name, option) for name, options in groups.items() for option in options]
    row_of = {name: row for row, name in enumerate(groups)}
    rows = np.array([row_of[name] for name, _ in columns])
    count = len(columns)
    sizes = np.array([option.bytes for _, option in columns], dtype=np.float64)
    losses = np.array([option.loss for _, option in columns])
    # Scaled: the solver's tolerances are absolute.
    one_each = csr_array((np.ones(count), (rows, np.arange(count))), shape=(len(groups), count))
    with _quiet():
        result = milp(
            losses / max(float(losses.max()), 1e-300) * 1e3,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(sizes[None] / budget_bytes), -np.inf, 1.0),
            ],
            options={"mip_rel_gap": GAP, "time_limit": _SECONDS},
        )
    if result.x is None:
        return _fit(groups, least, budget_bytes)
    chosen: dict[str, Option] = {}
    for (name, option), share in zip(columns, result.x, strict=True):
        if share > 0.5:
            chosen[name] = option
    return _fit(groups, _point(chosen), budget_bytes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout: HiGHS writes there when it repairs a solution, whatever it is told, and would spoil JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _fit(groups: Mapping[str, Sequence[Option]], point: Point, budget_bytes: int) -> Point:
    """Greedy steps: down where the solver's tolerance left a few bytes too many, then up where something is left over."""
    chosen = dict(point.chosen)
    total = point.bytes
    while total > budget_bytes:
        steps = [
            ((low.loss - high.loss) / max(high.bytes - low.bytes, 1), name, low)
            for name, options in groups.items()
            for low, high in pairwise(options)
            if high == chosen[name]
        ]
        _, name, low = min(steps, key=lambda step: (step[0], step[1]))
        total += low.bytes - chosen[name].bytes
        chosen[name] = low
    while True:
        ups = [
            ((chosen[name].loss - option.loss) / (option.bytes - chosen[name].bytes), name, option)
            for name, options in groups.items()
            for option in options
            if chosen[name].bytes < option.bytes <= chosen[name].bytes + budget_bytes - total
        ]
        if not ups:
            return _point(chosen)
        _, name, option = max(ups, key=lambda step: (step[0], step[1]))
        total += option.bytes - chosen[name].bytes
        chosen[name] = option


def frontier(choices: Choices, points: int = 33) -> list[Point]:
    """Allocations from the smallest to the best, at budgets evenly spaced in the logarithm of the bytes."""
    groups = {name: _worthwhile(options) for name, options in choices.items()}
    low = sum(options[0].bytes for options in groups.values())
    high = sum(options[-1].bytes for options in groups.values())
    found: list[Point] = []
    for budget in np.geomspace(low, high, points) if high > low else [low]:
        point = allocate(choices, min(max(round(float(budget)), low), high))
        if not found or point.bytes > found[-1].bytes:
            found.append(point)
    return found
