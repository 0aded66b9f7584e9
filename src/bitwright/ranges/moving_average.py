"""Averages of the extremes of batches: a rare batch moves the range a little instead of setting it.

    v_1 = x_1,    v_t = v_{t-1} + factor (x_t - v_{t-1})

for the smallest and for the largest value x_t of each batch. It is the observer of quantization-aware training (arXiv:1712.05877, section
3.1; torch.ao.quantization.MovingAverageMinMaxObserver), with the same default factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bitwright.core.inputs import InputScheme
from bitwright.core.ranges import Range
from bitwright.core.stats import MovingMinMax, Statistic
from bitwright.errors import InputError
from bitwright.ranges._seen import around_zero, seen

__all__ = ["RANGE", "MovingAverageRange"]


@dataclass(frozen=True, kw_only=True)
class MovingAverageRange(Range):
    """Exponential moving average of batch extremes. factor: how far each batch pulls the range, above 0, at most 1."""

    name: ClassVar[str] = "moving-average"
    factor: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise InputError(f"factor {self.factor} is not in (0, 1]", mend="use factor 0.01")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moving_min_max"})

    def find(self, stats: Mapping[str, Statistic], inputs: InputScheme) -> tuple[float, float]:
        del inputs
        return around_zero(*seen(stats, MovingMinMax).average(self.factor))


RANGE = MovingAverageRange
