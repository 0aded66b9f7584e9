"""The measuring loop with a clock that only the engine moves: every figure is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from bitwright.errors import InputError
from bitwright.evaluation.speed import Arrivals, Stepped, measure, random_prompts, summarize


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeModel:
    """Every prefill takes ``2 + n`` seconds in run n, every step ``0.5``, the third one ``1.5``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.runs = 0
        self.steps = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.clock.now += 2.0 + self.runs
        self.runs += 1
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        self.clock.now += 1.5 if self.steps == 3 else 0.5


def test_a_stepped_model_gives_the_times_of_its_steps() -> None:
    clock = Clock()
    arrivals = Stepped(FakeModel(clock)).generate([[1, 2], [3, 4]], 5, clock)
    assert arrivals == ((2.0, 2.5, 3.0, 4.5, 5.0),) * 2


def test_the_warm_up_does_not_count() -> None:
    clock = Clock()
    model = FakeModel(clock)
    runs = measure(Stepped(model), [[1] * 10] * 4, new_tokens=4, repetitions=3, warmup=2, clock=clock)
    assert model.runs == 5
    assert [run[0][0] for run in runs] == [4.0, 5.0, 6.0]


def test_medians_spreads_and_percentiles_are_exact() -> None:
    clock = Clock()
    runs = measure(Stepped(FakeModel(clock)), [[1] * 10] * 4, new_tokens=4, repetitions=3, warmup=0, clock=clock)
    found = summarize(runs, prompt_tokens=10)
    assert (
        found.time_to_first_token_ms.low,
        found.time_to_first_token_ms.median,
        found.time_to_first_token_ms.high,
    ) == (2000, 3000, 4000)
    assert (found.prompt_tokens_per_s.low, found.prompt_tokens_per_s.median) == (10.0, pytest.approx(40 / 3))
    # Of 36 gaps 24 are 0.5 s and 12 are 1.5 s.
    assert found.inter_token_p50_ms == 500
    assert found.inter_token_p99_ms == 1500
    assert found.new_tokens_per_s is not None
    assert found.new_tokens_per_s.median == pytest.approx(4 * 3 / 2.5)


def test_percentiles_are_over_all_tokens_of_all_repetitions() -> None:
    one: Arrivals = (tuple(float(i) for i in range(101)),)
    slow: Arrivals = ((0.0, *(float(i) + 2 for i in range(1, 101))),)
    found = summarize([one, slow], prompt_tokens=1)
    # 199 gaps of 1 s and one of 3 s: the 99th percentile lies on rank 197.01 of 0 .. 199.
    assert found.inter_token_p50_ms == 1000
    assert found.inter_token_p99_ms == 1000
    assert summarize([((0.0, 1.0, 4.0),)], prompt_tokens=1).inter_token_p99_ms == pytest.approx(1000 + 0.99 * 2000)


def test_streams_of_a_batch_may_differ() -> None:
    run: Arrivals = ((1.0, 2.0, 3.0), (2.0, 3.0, 5.0))
    found = summarize([run], prompt_tokens=10)
    assert found.time_to_first_token_ms.median == 2000
    assert found.prompt_tokens_per_s.median == 10
    assert found.new_tokens_per_s is not None
    assert found.new_tokens_per_s.median == 4 / (5.0 - 1.0)


def test_a_single_token_has_no_gaps() -> None:
    found = summarize([((2.0,),)], prompt_tokens=4)
    assert found.prompt_tokens_per_s.median == 2
    assert found.inter_token_p50_ms is None
    assert found.new_tokens_per_s is None


def test_an_engine_that_stops_early_is_found_out() -> None:
    class Early:
        def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Callable[[], float]) -> Arrivals:
            return ((0.0,) * (new_tokens - 1),) * len(prompts)

    with pytest.raises(InputError, match="stopped early"):
        measure(Early(), [[1]], new_tokens=3, repetitions=1, warmup=0, clock=Clock())


def test_measuring_nothing_is_refused() -> None:
    engine = Stepped(FakeModel(Clock()))
    for options in ({"repetitions": 0}, {"new_tokens": 0}, {"warmup": -1}):
        with pytest.raises(InputError):
            measure(engine, [[1]], **{"new_tokens": 1, "repetitions": 1, "warmup": 0, **options}, clock=Clock())
    with pytest.raises(InputError):
        summarize([], prompt_tokens=1)


def test_prompts_are_seeded_and_hold_allowed_tokens_alone() -> None:
    allowed = [3, 5, 8]
    first = random_prompts(4, 50, allowed, seed=1)
    assert first == random_prompts(4, 50, allowed, seed=1)
    assert first != random_prompts(4, 50, allowed, seed=2)
    assert {token for prompt in first for token in prompt} == set(allowed)
    assert {len(prompt) for prompt in first} == {50}
    with pytest.raises(InputError):
        random_prompts(1, 1, [])
