"""The range that minimises the squared error of quantizing what the histogram holds:

    minimise  Σ_x  count(x) (x - q(x))²        over (low, high)

with q the rounding of the very ``InputScheme``: int8 with or without a zero point, or float8. A small range rounds the many finely and
clips the few (Sung et al. 2015, arXiv:1511.06488; Banner et al. 2019, arXiv:1810.05723). Candidates are the full range times a
geometric series of fractions, first for both ends together, then for each end by itself while that helps. The full range is the
first candidate, so the result is never worse than minmax on the histogram. Each bin is represented by evenly spaced points.

Where scales are computed as the layer runs, and for NVFP4, whose groups scale themselves, there is nothing to clip: the full range is
taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.ranges import Range
from bitwright.core.stats import Histogram, Statistic
from bitwright.errors import InputError
from bitwright.ranges._seen import seen_histogram

__all__ = ["RANGE", "MseRange", "histogram_points", "squared_error"]

#: Points that stand for one bin. A step of int8 over the full range is 8 bins or more.
_POINTS = 4
#: Rounds over the two ends; the second seldom finds anything.
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class MseRange(Range):
    """steps: fractions that are tried after the full range. smallest: the smallest of them; the series between is geometric."""

    name: ClassVar[str] = "mse"
    steps: int = 100
    smallest: float = 0.005

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.smallest < 1:
            raise InputError("mse needs at least one step and 0 < smallest < 1", mend="use steps 100, smallest 0.005")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"histogram"})

    def find(self, stats: Mapping[str, Statistic], inputs: InputScheme) -> tuple[float, float]:
        histogram = seen_histogram(stats)
        full = (histogram.low, histogram.high)
        if inputs.dynamic or inputs.strategy == "tensor_group" or full == (0.0, 0.0):
            return full
        points = histogram_points(histogram)
        fractions = [self.smallest ** (step / self.steps) for step in range(1, self.steps + 1)]

        def error(low: float, high: float) -> float:
            return squared_error(points, inputs, low, high)

        best, least = _best(full, error(*full), ((f * full[0], f * full[1]) for f in fractions), error)
        if inputs.symmetric:
            return best
        for _ in range(_ROUNDS):
            before = best
            best, least = _best(best, least, [(f * full[0], best[1]) for f in (1.0, *fractions)], error)
            best, least = _best(best, least, [(best[0], f * full[1]) for f in (1.0, *fractions)], error)
            if best == before:
                break
        return best


def _best(
    best: tuple[float, float],
    least: float,
    candidates: Iterable[tuple[float, float]],
    error: Callable[[float, float], float],
) -> tuple[tuple[float, float], float]:
    for candidate in candidates:
        found = error(*candidate)
        if found < least:
            best, least = candidate, found
    return best, least


def histogram_points(histogram: Histogram) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``(n,)`` float32 that stand for what was seen, and how many each stands for ``(n,)`` float64. Zeros, which every
    grid holds, are left out.
    """
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    values, weights = [], []
    for sign, side in zip((1.0, -1.0), histogram.counts, strict=True):
        bins = side.nonzero()[:, 0]
        points = (bins[:, None].double() + inside) * (sign * histogram.width)
        values.append(points.clamp(histogram.low, histogram.high).reshape(-1))
        weights.append((side[bins].double() / _POINTS).repeat_interleave(_POINTS))
    return torch.cat(values).float(), torch.cat(weights)


def squared_error(points: tuple[torch.Tensor, torch.Tensor], inputs: InputScheme, low: float, high: float) -> float:
    """Σ weight (x - q(x))² with q the static quantizer for ``(low, high)``."""
    values, weights = points
    error = (inputs.apply(values, inputs.fit(low, high)) - values).double()
    return float((weights * error.square_()).sum())


RANGE = MseRange
