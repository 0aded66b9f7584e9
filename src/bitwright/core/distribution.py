"""Statistics of how the values of a layer's inputs are distributed: histogram, moments, ranges of batches, shares.

They serve the ranges of static activation quantization and the analysis of outliers. ``a.merge(b)`` is what ``a`` would be, had it seen
b's tokens after its own: bit for bit, but for the rounding of Moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch

from bitwright.core.statistic import Statistic
from bitwright.errors import InputError

__all__ = ["Histogram", "Moments", "MovingMinMax", "ShareAbove"]

#: Exponent of the finest bins. Their inverse width is a float32 with room to spare.
_FINEST = -110
#: Values that are worked on at a time: bounds temporaries, changes no count.
_PIECE = 1 << 20
#: Tokens whose moments are taken at a time. Fixed, so that the sums do not depend on the machine.
_TOKENS = 256


def _pieces(x: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = max(1, _PIECE // max(x.shape[1], 1))
    return (x[start : start + rows] for start in range(0, len(x), rows))


@dataclass
class Histogram(Statistic):
    """How often each magnitude occurs among all values of a layer's inputs, positive and negative ones apart.

    counts: ``(2, bins)`` int64. ``counts[0, k]`` counts values in ``[k, k + 1) * width``, ``counts[1, k]`` those in
    ``(-k - 1, -k] * width``; exact zeros are counted in ``zeros``. bins: a power of two. width: ``2**exponent``, the smallest with
    which all magnitudes seen find a bin. It grows by doubling, and two neighbouring bins are then exactly one new bin, so that
    neither the cutting into batches nor the order of merging changes a count. low, high: the exact extremes, zero included.
    lost: values that are NaN or infinite; they are counted nowhere else.

    >>> seen = Histogram(2, bins=4)
    >>> seen.update(torch.tensor([[0.5, 1.0], [0.0, -3.5]]))
    >>> seen.width, seen.counts.tolist(), seen.zeros
    (1.0, [[1, 1, 0, 0], [0, 0, 0, 1]], 1)
    """

    name: ClassVar[str] = "histogram"
    bins: int = 2048
    exponent: int = field(default=_FINEST, init=False)
    counts: torch.Tensor = field(init=False)
    zeros: int = field(default=0, init=False)
    lost: int = field(default=0, init=False)
    low: float = field(default=0.0, init=False)
    high: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.bins < 2 or self.bins & (self.bins - 1):
            raise InputError(f"a histogram of {self.bins} bins cannot double its width", mend="use a power of two")
        self.counts = torch.zeros(2, self.bins, dtype=torch.int64)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """Finite values seen, zeros included."""
        return int(self.counts.sum()) + self.zeros

    @property
    def magnitudes(self) -> torch.Tensor:
        """Counts of ``|x| > 0``: ``(bins,)`` int64."""
        return self.counts.sum(0)

    def share_above(self, limit: float) -> float:
        """Share of all values with ``|x| > limit``; values of the bin that ``limit`` lies in count as if spread evenly."""
        place = min(max(limit / self.width, 0.0), float(self.bins))
        bin_, magnitudes = min(int(place), self.bins - 1), self.magnitudes
        above = int(magnitudes[bin_ + 1 :].sum()) + float(magnitudes[bin_]) * (bin_ + 1 - place)
        return above / max(self.total, 1)

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        for piece in _pieces(x):
            self._add(piece.float().reshape(-1))
        self.count += len(x)

    def _add(self, values: torch.Tensor) -> None:
        low, high = (float(extreme) for extreme in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = values[torch.isfinite(values)]
            self.lost += len(values) - len(finite)
            if len(finite):
                self._add(finite)
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(self._needed(max(-low, high)))
        # A power of two scales exactly, and truncation is floor here.
        index = values.abs().mul_(math.ldexp(1.0, -self.exponent)).long()
        index += self.bins * (values < 0)
        index[values == 0] = 2 * self.bins
        found = torch.bincount(index, minlength=2 * self.bins + 1)
        self.counts += found[:-1].view(2, self.bins)
        self.zeros += int(found[-1])

    def _needed(self, largest: float) -> int:
        """The smallest exponent with ``largest < bins * 2**exponent``."""
        return max(math.frexp(largest)[1] - (self.bins.bit_length() - 1), _FINEST) if largest else _FINEST

    def _widen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def merge(self, other: Self) -> None:
        self._check_like(other)
        if self.bins != other.bins:
            raise InputError(f"{self.name} of {self.bins} bins cannot merge one of {other.bins}")
        self._widen(other.exponent)
        self.counts += _coarser(other.counts, self.exponent - other.exponent)
        self.count += other.count
        self.zeros += other.zeros
        self.lost += other.lost
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


def _coarser(counts: torch.Tensor, doublings: int) -> torch.Tensor:
    """Counts ``(2, bins)`` with bins that are ``2**doublings`` times as wide."""
    bins = counts.shape[1]
    merged = min(1 << min(doublings, 62), bins)
    if merged == 1:
        return counts
    out = torch.zeros_like(counts)
    out[:, : bins // merged] = counts.view(2, bins // merged, merged).sum(-1)
    return out


@dataclass
class Moments(Statistic):
    """Central moments of every column: four ``(columns,)`` float64 tensors.

    mean; m2, m3, m4: sums of ``(x - mean)²``, ``³`` and ``⁴``. Batches are joined pairwise (Chan, Golub and LeVeque 1979 for m2;
    Pébay, SAND2008-6212, for m3 and m4): the moments of each part are moved to the common mean and added up.

    >>> seen = Moments(1)
    >>> seen.update(torch.tensor([[1.0], [2.0], [3.0], [10.0]]))
    >>> seen.mean.tolist(), seen.variance.tolist()
    ([4.0], [12.5])
    """

    name: ClassVar[str] = "moments"
    mean: torch.Tensor = field(init=False)
    m2: torch.Tensor = field(init=False)
    m3: torch.Tensor = field(init=False)
    m4: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.m2, self.m3, self.m4 = (torch.zeros(self.columns, dtype=torch.float64) for _ in range(4))

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        for start in range(0, len(x), _TOKENS):
            part = x[start : start + _TOKENS].double()
            mean = part.mean(0)
            centred = part - mean
            square = centred.square()
            self._join(len(part), mean, square.sum(0), (square * centred).sum(0), square.square_().sum(0))

    def _join(self, count: int, mean: torch.Tensor, m2: torch.Tensor, m3: torch.Tensor, m4: torch.Tensor) -> None:
        if count == 0:
            return
        common = self.mean + (mean - self.mean) * (count / (self.count + count))
        mine = _moved(self.count, self.mean - common, self.m2, self.m3, self.m4)
        theirs = _moved(count, mean - common, m2, m3, m4)
        self.m2, self.m3, self.m4 = (a + b for a, b in zip(mine, theirs, strict=True))
        self.mean = common
        self.count += count

    def merge(self, other: Self) -> None:
        self._check_like(other)
        self._join(other.count, other.mean, other.m2, other.m3, other.m4)

    @property
    def variance(self) -> torch.Tensor:
        """Variance of every column, divided by the count: ``(columns,)`` float64."""
        return self.m2 / max(self.count, 1)

    @property
    def kurtosis(self) -> torch.Tensor:
        """E[(x - mean)⁴] / variance² of every column, 3 for a normal distribution and NaN for a constant: ``(columns,)`` float64."""
        return self.count * self.m4 / self.m2.square()

    def overall(self) -> tuple[float, float, float]:
        """Mean, standard deviation and kurtosis of all values, columns put together; kurtosis is NaN where all are equal."""
        mean = float(self.mean.mean())
        m2, _, m4 = (float(part.sum()) for part in _moved(self.count, self.mean - mean, self.m2, self.m3, self.m4))
        values = max(self.count * self.columns, 1)
        return mean, math.sqrt(m2 / values), (values * m4 / m2 / m2 if m2 > 0 else math.nan)


def _moved(
    count: int, by: torch.Tensor, m2: torch.Tensor, m3: torch.Tensor, m4: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of powers of ``x - mean + by`` from those of ``x - mean``: the binomial formula, where the first power sums to zero."""
    square = by.square()
    return (
        m2 + count * square,
        m3 + 3 * by * m2 + count * by * square,
        m4 + 4 * by * m3 + 6 * square * m2 + count * square.square(),
    )


@dataclass
class MovingMinMax(Statistic):
    """Smallest and largest value of every update, in order, for moving averages over batches.

    lows, highs: one float for each update that held a token. ``a.merge(b)`` appends b's updates to a's, so that averages weigh b as the
    later one.

    >>> seen = MovingMinMax(2)
    >>> seen.update(torch.tensor([[-1.0, 4.0]]))
    >>> seen.update(torch.tensor([[0.0, 6.0]]))
    >>> seen.average(0.5)
    (-0.5, 5.0)
    """

    name: ClassVar[str] = "moving_min_max"
    lows: list[float] = field(default_factory=list, init=False)
    highs: list[float] = field(default_factory=list, init=False)

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        if x.numel():
            low, high = torch.aminmax(x)
            self.lows.append(float(low))
            self.highs.append(float(high))
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._check_like(other)
        self.lows.extend(other.lows)
        self.highs.extend(other.highs)
        self.count += other.count

    def average(self, factor: float) -> tuple[float, float]:
        """Exponential moving averages of both: they start at the first update and go ``factor`` of the way to each later one."""
        return _average(self.lows, factor), _average(self.highs, factor)


def _average(values: list[float], factor: float) -> float:
    result = values[0]
    for value in values[1:]:
        result += factor * (value - result)
    return result


@dataclass
class ShareAbove(Statistic):
    """How many values of every column exceed a magnitude: ``(columns,)`` int64, divided on reading.

    threshold: 6.0, above which LLM.int8 calls a value an outlier (arXiv:2208.07339, section 3.3).

    >>> seen = ShareAbove(2)
    >>> seen.update(torch.tensor([[1.0, -7.0], [6.0, 2.0]]))
    >>> seen.value.tolist(), seen.overall
    ([0.0, 0.5], 0.25)
    """

    name: ClassVar[str] = "share_above"
    threshold: float = 6.0
    above: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.above = torch.zeros(self.columns, dtype=torch.int64)

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        for piece in _pieces(x):
            self.above += (piece.abs() > self.threshold).sum(0)
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._check_like(other)
        if self.threshold != other.threshold:
            raise InputError(f"{self.name} {self.threshold} cannot merge one above {other.threshold}")
        self.above += other.above
        self.count += other.count

    @property
    def value(self) -> torch.Tensor:
        """``(columns,)`` float64 share of the tokens."""
        return self.above.double() / max(self.count, 1)

    @property
    def overall(self) -> float:
        """Share of all values."""
        return int(self.above.sum()) / max(self.count * self.columns, 1)
