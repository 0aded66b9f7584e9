"""The range that holds all but a small share of the values (Wu et al. 2020, arXiv:2004.09602, section 4.2: 99.99 % and 99.999 %).

Symmetric inputs: the percentile of ``|x|``. Asymmetric ones: of each end by itself, so that at most ``100 - percentile`` percent of the
values lie below ``low`` and as many above ``high``. Exact zeros do not count: every grid holds zero, and with inputs that are nearly
all zero (behind a ReLU) the percentile would be zero, too. Values inside a bin of the histogram are taken as spread evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.ranges import Range
from bitwright.core.stats import Statistic
from bitwright.errors import InputError
from bitwright.ranges._seen import seen_histogram

__all__ = ["RANGE", "PercentileRange"]


@dataclass(frozen=True, kw_only=True)
class PercentileRange(Range):
    """percentile: percent of the values that the range holds at each end, above 50, at most 100 (which is minmax)."""

    name: ClassVar[str] = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile {self.percentile} is not in (50, 100]", mend="use percentile 99.99")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"histogram"})

    def find(self, stats: Mapping[str, Statistic], inputs: InputScheme) -> tuple[float, float]:
        histogram = seen_histogram(stats)
        beyond = (1 - self.percentile / 100) * int(histogram.counts.sum())
        if inputs.symmetric:
            limit = _limit(histogram.magnitudes, histogram.width, beyond)
            return max(-limit, histogram.low), min(limit, histogram.high)
        high, low = (_limit(side, histogram.width, beyond) for side in histogram.counts)
        return max(-low, histogram.low), min(high, histogram.high)


def _limit(counts: torch.Tensor, width: float, beyond: float) -> float:
    """The magnitude above which ``beyond`` values lie; 0 where there are not so many.

    >>> _limit(torch.tensor([4, 4, 2]), 1.0, 4.0)
    1.5
    """
    left = beyond
    for index, inside in reversed(list(enumerate(counts.tolist()))):
        if inside > left:
            return float(width * (index + 1 - left / inside))
        left -= inside
    return 0.0


RANGE = PercentileRange
