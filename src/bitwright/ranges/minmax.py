"""The whole range that calibration showed: nothing is clipped, and one outlier costs everybody resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bitwright.core.inputs import InputScheme
from bitwright.core.ranges import Range
from bitwright.core.stats import MinMax, Statistic
from bitwright.ranges._seen import around_zero, seen

__all__ = ["RANGE", "MinMaxRange"]


@dataclass(frozen=True, kw_only=True)
class MinMaxRange(Range):
    """From the smallest to the largest value seen, zero included."""

    name: ClassVar[str] = "minmax"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"min_max"})

    def find(self, stats: Mapping[str, Statistic], inputs: InputScheme) -> tuple[float, float]:
        del inputs
        extremes = seen(stats, MinMax)
        return around_zero(float(extremes.low.min()), float(extremes.high.max()))


RANGE = MinMaxRange
