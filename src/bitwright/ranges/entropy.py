"""The range whose quantized distribution diverges least from the original one (Migacz, "8-bit Inference with TensorRT", GTC 2017).

For every number of bins i of the histogram of ``|x|``: P are the first i bins, with everything beyond added to the last one; Q are the
first i bins, where all that falls on one quantized level is spread evenly over those of its bins that are not empty; both are normalised.
The i with the smallest KL(P || Q) is taken, and the limit is ``(i + 0.5) width``, at most the largest magnitude.

int8: 128 levels of equal width. float8: the levels are the e4m3 numbers, each with the values that are nearest to it; since they are as
fine relative to small values as to large ones, clipping seldom gains anything. Exact zeros are left out, because every grid holds
zero. Asymmetric inputs are cut at the limit on both sides. Where scales are computed as the layer runs, and for NVFP4, whose groups
scale themselves, the full range is taken.
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

__all__ = ["RANGE", "EntropyRange"]

#: Candidates that are scored at a time: bounds the workspace.
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class EntropyRange(Range):
    """levels: levels of magnitude that int8 has, and the fewest bins that are tried."""

    name: ClassVar[str] = "entropy"
    levels: int = 128

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise InputError("entropy needs at least 2 levels", mend="use levels 128")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"histogram"})

    def find(self, stats: Mapping[str, Statistic], inputs: InputScheme) -> tuple[float, float]:
        histogram = seen_histogram(stats)
        counts = histogram.magnitudes.double()
        used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0
        if inputs.dynamic or inputs.strategy == "tensor_group" or used <= self.levels:
            return histogram.low, histogram.high
        counts = counts[:used]
        candidates = torch.arange(self.levels, used + 1)
        divergence = torch.cat(
            [_divergence(counts, some, self._edges(some, inputs)) for some in torch.split(candidates, _CHUNK)]
        )
        limit = (int(candidates[divergence.argmin()]) + 0.5) * histogram.width
        return max(histogram.low, -limit), min(histogram.high, limit)

    def _edges(self, candidates: torch.Tensor, inputs: InputScheme) -> torch.Tensor:
        """``(candidates, levels + 1)`` int64: where the bins of each level begin, and the end."""
        if inputs.number == "int":
            return candidates[:, None] * torch.arange(self.levels + 1) // self.levels
        # Bin k belongs to the level that its middle k + 0.5 is nearest to, when i bins stand for the largest float8.
        levels = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / inputs.largest
        middles = (levels[1:] + levels[:-1]) / 2
        inner = (candidates[:, None] * middles - 0.5).ceil().long().clamp_min_(0)
        return torch.cat([torch.zeros_like(candidates)[:, None], inner, candidates[:, None]], dim=1)


def _divergence(counts: torch.Tensor, candidates: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """KL(P || Q) in nats for every candidate: ``(candidates,)`` float64, infinite where P has what Q has not.

    Inside a level Q is constant, so that all sums over bins are differences of running sums.
    """
    zero = counts.new_zeros(1)
    mass = torch.cat([zero, counts.cumsum(0)])
    filled = torch.cat([zero, (counts > 0).double().cumsum(0)])
    plogp = torch.cat([zero, torch.special.xlogy(counts, counts).cumsum(0)])
    inside, total = mass[candidates], mass[-1]
    level_mass = mass[edges[:, 1:]] - mass[edges[:, :-1]]
    level_filled = filled[edges[:, 1:]] - filled[edges[:, :-1]]
    # Counts that Q puts on each filled bin of a level, before it is normalised.
    spread = level_mass / level_filled.clamp_min(1)
    last = counts[candidates - 1]
    beyond = total - inside
    # Σ P log(P / Q) = (Σ p log p - Σ p log q) / total + log(inside / total), p and q in counts; the last bin holds `beyond` more.
    above = plogp[candidates] - torch.special.xlogy(last, last) + torch.special.xlogy(last + beyond, last + beyond)
    level = torch.searchsorted(edges[:, 1:].contiguous(), candidates[:, None] - 1, right=True)
    at_last = spread.gather(1, level)[:, 0]
    below = torch.special.xlogy(level_mass, spread).sum(1) + torch.special.xlogy(beyond, at_last)
    found = (above - below) / total + torch.log(inside / total)
    impossible = (beyond > 0) & (last == 0)
    return torch.where(impossible, torch.inf, found)


RANGE = EntropyRange
