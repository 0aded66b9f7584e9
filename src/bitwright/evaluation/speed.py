"""Speed of generation: from the times at which tokens came to latencies and rates. No engine, no model, no clock of its own.

For one repetition with B sequences of P prompt tokens and N new ones, t[b][i] the time of sequence b's token i after the request:

    time to first token   max over b of t[b][0]               every sequence has answered
    prompt rate           B P / time to first token
    inter-token latency   t[b][i] - t[b][i - 1], i >= 1        p50 and p99 over all b, i and repetitions
    rate of new tokens    B (N - 1) / (max t[b][N - 1] - min t[b][0])

Medians, with the smallest and the largest, are over repetitions; those of the warm-up are left out. Percentiles interpolate linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bitwright.errors import InputError
from bitwright.evaluation.record import Spread

__all__ = ["Arrivals", "Engine", "Stepped", "Stepper", "Timing", "measure", "random_prompts", "summarize"]

#: for each sequence the seconds after the request at which its tokens were there
Arrivals = tuple[tuple[float, ...], ...]
Clock = Callable[[], float]


class Engine(Protocol):
    """A loaded model that can be asked."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Clock) -> Arrivals:
        """Greedy continuation of every prompt by exactly ``new_tokens`` tokens, whatever they are."""


class Stepper(Protocol):
    """A model that is run one step at a time. Both return when the tokens are really there."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts; the first token of every sequence is chosen."""

    def step(self) -> None:
        """One more token for every sequence."""


@dataclass(frozen=True)
class Stepped:
    """A stepper as an engine: all sequences get their tokens at the same time."""

    model: Stepper

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Clock) -> Arrivals:
        """See ``Engine``."""
        began = clock()
        self.model.prefill(prompts)
        times = [clock() - began]
        for _ in range(new_tokens - 1):
            self.model.step()
            times.append(clock() - began)
        return (tuple(times),) * len(prompts)


@dataclass(frozen=True)
class Timing:
    """What ``summarize`` makes of arrivals. Milliseconds, tokens a second over the whole batch; None where one token leaves no gap."""

    time_to_first_token_ms: Spread
    prompt_tokens_per_s: Spread
    inter_token_p50_ms: float | None
    inter_token_p99_ms: float | None
    new_tokens_per_s: Spread | None


def measure(
    engine: Engine, prompts: Sequence[Sequence[int]], *, new_tokens: int, repetitions: int, warmup: int, clock: Clock
) -> list[Arrivals]:  # fmt: skip
    """Arrivals of ``repetitions`` runs, after ``warmup`` runs that do not count."""
    if min(new_tokens, repetitions) < 1 or warmup < 0 or not prompts:
        raise InputError("nothing would be measured", mend="use at least one prompt, one new token and one repetition")
    for _ in range(warmup):
        engine.generate(prompts, new_tokens, clock)
    found = [engine.generate(prompts, new_tokens, clock) for _ in range(repetitions)]
    for arrivals in found:
        if len(arrivals) != len(prompts) or any(len(times) != new_tokens for times in arrivals):
            counts = sorted({len(times) for times in arrivals})
            raise InputError(
                f"{len(prompts)} sequences of {new_tokens} tokens were wanted, {len(arrivals)} of {counts} came",
                mend="the engine stopped early; use a longer context",
            )
    return found


def summarize(repetitions: Sequence[Arrivals], *, prompt_tokens: int) -> Timing:
    """Medians and percentiles of some repetitions.

    >>> one = ((0.5, 0.75, 1.0), (0.5, 0.75, 1.0))
    >>> timing = summarize([one], prompt_tokens=10)
    >>> timing.prompt_tokens_per_s.median, timing.inter_token_p50_ms, timing.new_tokens_per_s.median
    (40.0, 250.0, 8.0)
    """
    if not repetitions:
        raise InputError("there are no repetitions", mend="use at least one")
    first = [max(times[0] for times in run) for run in repetitions]
    gaps = np.concatenate([np.diff(np.asarray(run, dtype=np.float64), axis=1).ravel() for run in repetitions])
    rates = [_rate(run) for run in repetitions]
    return Timing(
        time_to_first_token_ms=_spread([1000 * value for value in first]),
        prompt_tokens_per_s=_spread(
            [_per(len(run) * prompt_tokens, value) for run, value in zip(repetitions, first, strict=True)]
        ),
        inter_token_p50_ms=float(np.percentile(gaps, 50)) * 1000 if len(gaps) else None,
        inter_token_p99_ms=float(np.percentile(gaps, 99)) * 1000 if len(gaps) else None,
        new_tokens_per_s=_spread(rates) if len(gaps) else None,
    )


def random_prompts(count: int, length: int, allowed: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """``count`` prompts of ``length`` ids, each drawn evenly from ``allowed``."""
    if not allowed or count < 1 or length < 1:
        raise InputError(
            "there are no tokens to make a prompt of", mend="check the tokenizer, and use a length of 1 or more"
        )
    ids = np.random.default_rng(seed).choice(np.asarray(allowed, dtype=np.int64), size=(count, length))
    return [[int(value) for value in row] for row in ids]


def _rate(run: Arrivals) -> float:
    tokens = sum(len(times) - 1 for times in run)
    return _per(tokens, max(times[-1] for times in run) - min(times[0] for times in run))


def _per(count: int, seconds: float) -> float:
    """Tokens a second; 0 where no time passed that the clock could tell."""
    return count / seconds if seconds > 0 else 0.0


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=float(np.median(values)), low=float(min(values)), high=float(max(values)))
