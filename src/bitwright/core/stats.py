"""Mergeable statistics of layer inputs.

Each has ``update(x)`` over ``(tokens, columns)`` activations and ``merge(other)``; merging in a fixed order gives the same bits
whatever the number of workers. All accumulate in float32 or float64, whatever the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch

from bitwright.core.distribution import Histogram, Moments, MovingMinMax, ShareAbove
from bitwright.core.statistic import Statistic
from bitwright.errors import InputError

__all__ = [
    "SIMPLE", "AbsMax", "Accumulate", "CrossGram", "Gram", "Histogram", "MeanAbs", "MinMax", "Moments", "MovingMinMax", "ShareAbove",
    "Statistic", "accumulate_product",
]  # fmt: skip

#: ``(into, x, y)``: adds xᵀ y to ``into``; the engine passes a faster one where it is lossless.
Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def accumulate_product(into: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add ``xᵀ y`` in float32 for ``(tokens, a)`` and ``(tokens, b)`` to ``into`` ``(a, b)``. The plain reference."""
    into += x.float().T @ y.float()


@dataclass
class Gram(Statistic):
    """Sum of ``x xᵀ`` over tokens: ``(columns, columns)`` float32. With ``H = 2 X Xᵀ`` of arXiv:2210.17323, eq. 2, it is H / 2.

    >>> gram = Gram(2)
    >>> gram.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.matrix.tolist(), gram.count
    ([[10.0, 2.0], [2.0, 4.0]], 2)
    """

    name: ClassVar[str] = "gram"
    accumulate: Accumulate = accumulate_product
    matrix: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = torch.zeros(self.columns, self.columns)

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        self.accumulate(self.matrix, x, x)
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._check_same(other, self.matrix, other.matrix)
        self.matrix += other.matrix
        self.count += other.count

    @property
    def mean_square(self) -> torch.Tensor:
        """E[x²] of every column: ``(columns,)`` float32."""
        return self.matrix.diagonal() / max(self.count, 1)


@dataclass
class CrossGram(Statistic):
    """Sum of ``(a - b) xᵀ`` over tokens: ``(rows, columns)`` float32, rows defaulting to columns.

    With a the original model's input of a layer and b = x this model's, it carries the error that earlier quantized layers left
    in the input (arXiv:2504.02692, section 3); with a and b the residual streams that the output is added to, the error there.
    """

    name: ClassVar[str] = "drift"
    rows: int = 0
    accumulate: Accumulate = accumulate_product
    matrix: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.rows or self.columns
        self.matrix = torch.zeros(self.rows, self.columns)

    def update(self, x: torch.Tensor) -> None:
        raise InputError("drift needs the original input too", mend="call update_pair")

    def update_pair(self, original: torch.Tensor, x: torch.Tensor) -> None:
        """Add ``(tokens, columns)`` inputs of the original model and of this one, token for token."""
        self.update_against(original, x, x)

    def update_against(self, original: torch.Tensor, now: torch.Tensor, x: torch.Tensor) -> None:
        """Add ``(original - now) xᵀ``; the first two are ``(tokens, rows)``, x is ``(tokens, columns)``."""
        self._check(x)
        if original.shape != now.shape or original.shape != (len(x), self.rows):
            raise InputError(
                f"drift expects pairs of ({len(x)}, {self.rows}), got {tuple(original.shape)}, {tuple(now.shape)}"
            )
        # The difference is rounded back to the dtype of the activations: their own precision, at the speed of their units.
        difference = (original.float() - now.float()).to(x.dtype)
        self.accumulate(self.matrix, difference, x)
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._check_same(other, self.matrix, other.matrix)
        self.matrix += other.matrix
        self.count += other.count


@dataclass
class AbsMax(Statistic):
    """Largest magnitude of every column: ``(columns,)`` float32."""

    name: ClassVar[str] = "abs_max"
    value: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.value = torch.zeros(self.columns)

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        if len(x):
            torch.maximum(self.value, x.abs().amax(0).float(), out=self.value)
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._check_same(other, self.value, other.value)
        torch.maximum(self.value, other.value, out=self.value)
        self.count += other.count


@dataclass
class MeanAbs(Statistic):
    """Mean magnitude of every column: ``(columns,)`` float64 sum, divided on reading (AWQ's activation scale)."""

    name: ClassVar[str] = "mean_abs"
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.columns, dtype=torch.float64)

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        self.total += x.abs().double().sum(0)
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._check_same(other, self.total, other.total)
        self.total += other.total
        self.count += other.count

    @property
    def value(self) -> torch.Tensor:
        """``(columns,)`` float32 mean of |x|."""
        return (self.total / max(self.count, 1)).float()


@dataclass
class MinMax(Statistic):
    """Smallest and largest value of every column: two ``(columns,)`` float32 tensors."""

    name: ClassVar[str] = "min_max"
    low: torch.Tensor = field(init=False)
    high: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.low = torch.full((self.columns,), float("inf"))
        self.high = torch.full((self.columns,), float("-inf"))

    def update(self, x: torch.Tensor) -> None:
        self._check(x)
        if len(x):
            torch.minimum(self.low, x.amin(0).float(), out=self.low)
            torch.maximum(self.high, x.amax(0).float(), out=self.high)
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._check_same(other, self.low, other.low)
        torch.minimum(self.low, other.low, out=self.low)
        torch.maximum(self.high, other.high, out=self.high)
        self.count += other.count


#: Statistics of one layer input that only need ``update``: name -> class. What methods, transforms and ranges may ask for beside
#: "gram" and "drift".
SIMPLE: dict[str, type[Statistic]] = {
    cls.name: cls for cls in (AbsMax, MeanAbs, MinMax, Histogram, Moments, MovingMinMax, ShareAbove)
}
