"""The Method contract: which of a scheme's numbers are chosen for this weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Codec, Params, Scheme
from bitwright.core.stats import Statistic

__all__ = ["Context", "EncodeKernel", "FeedbackKernel", "Method", "Outcome", "TileKernel", "TileSums", "has_outliers"]

#: Statistics by name: "gram" (Gram), "drift" and "residual_drift" (CrossGram).
Stats = Mapping[str, Statistic]


@dataclass(frozen=True, slots=True)
class TileSums:
    """Sums over every tile, each ``(rows, tile columns)`` float32, with steps = code - zero of the nearest codes.

    error: of weights * (w - decoded)²; above: of weights * w * steps; below: of weights * steps². The scale that fits these codes
    best is above / below.
    """

    error: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor


class TileKernel(Protocol):
    """Encodes every tile under given parameters and sums up the outcome, in one pass; see ``kernels/reference.py``."""

    def __call__(
        self, w: torch.Tensor, weights: torch.Tensor | None, scheme: Scheme, params: Params
    ) -> TileSums | None:
        """Sums for ``w`` ``(rows, columns)`` float32 and ``weights`` ``(columns,)``; None for schemes that it does not know."""


class FeedbackKernel(Protocol):
    """Quantizes one block of columns with error feedback inside the block; see ``kernels/reference.py``."""

    def __call__(
        self,
        targets: torch.Tensor,
        weights: torch.Tensor,
        feedback: torch.Tensor,
        codec: Codec,
        columns: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``(block, rows)`` uint8 and errors ``weights - decoded`` ``(block, rows)`` float32.

        targets: ``(block, rows)`` float32, columns of the weight after feedback from all earlier blocks;
        weights: the original columns, same shape; feedback: ``(block, block)`` float32 unit upper triangular; columns:
        ``(block,)`` int64, which column of the codec each one is; keep: ``(block, rows)`` bool or None, outliers: they decode to their
        target rounded to float16 instead of to their code, so that the errors before them are made up for.
        """


class EncodeKernel(Protocol):
    """A scheme's ``quantize``, or its ``encode`` under given parameters, in one pass over the weight, bit for bit."""

    def __call__(
        self, w: torch.Tensor, scheme: Scheme, params: Params | None, prepared: Any
    ) -> tuple[Params, torch.Tensor] | None:
        """Parameters and codes of ``w`` ``(rows, columns)`` float32; None for schemes that it does not know.

        params: stored or loose parameters to encode under, or None: then they are fitted, with ``prepared`` from ``scheme.prepare``.
        """


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the engine hands to a method beside the weight: fast kernels, and what the scheme prepared above the tile."""

    feedback: FeedbackKernel
    tile_sums: TileKernel | None = None
    encode: EncodeKernel | None = None
    prepared: Any = None
    #: raise instead of falling back when a factorisation fails for good
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A quantized weight and what is worth telling about how it went.

    loss: tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ) where a Gram matrix was there, else None. fallback: why another method's result was
    taken, or None.
    """

    tensor: QuantizedTensor
    loss: float | None = None
    dead_columns: int = 0
    damping: float | None = None
    fallback: str | None = None
    notes: tuple[str, ...] = field(default=())


def has_outliers(scheme: Scheme) -> bool:
    """True for schemes that store some weights apart."""
    # How many depends on the shape: in a matrix of 2^30 weights every share that is worth naming is at least one.
    return scheme.outlier_count((1 << 15, 1 << 15)) > 0


class Method(ABC):
    """Base of every method; a method is a frozen dataclass of options. Inputs are never mutated."""

    name: ClassVar[str]
    #: whether it keeps the outliers of schemes that have any
    keeps_outliers: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that it wants ("gram", "drift"); empty for data-free methods."""
        return frozenset()

    @property
    def feeds_back(self) -> bool:
        """True where later columns absorb the error of earlier ones, so that a column's own error costs less than its H_jj says."""
        return False

    def accepts(self, scheme: Scheme) -> str | None:
        """None where it can serve a scheme, else the reason why not. Default: every scheme whose outliers it keeps."""
        if has_outliers(scheme) and not self.keeps_outliers:
            return "it keeps no weights apart; use method spqr, or set outliers to 0"
        return None

    @abstractmethod
    def quantize(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context) -> Outcome:
        """Quantize ``w`` ``(rows, columns)`` float32. Raises NumericError for weights that are not finite."""


#: Rows that the reported loss is estimated on.
_LOSS_ROWS = 256


def relative_loss(w: torch.Tensor, decoded: torch.Tensor, gram: torch.Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ) over at most 256 evenly spaced rows; 0 where the denominator is 0.

    All rows would cost as much as the quantization itself; the figure only ranks layers.
    """
    step = -(-len(w) // _LOSS_ROWS)
    sample = w[::step]
    error = sample - decoded[::step]
    above = _total((error @ gram).mul_(error))
    below = _total((sample @ gram).mul_(sample))
    return above / below if below > 0 else 0.0


def _total(matrix: torch.Tensor) -> float:
    """The sum of all elements: row by row first, because a sum over everything is divided among threads."""
    return math.fsum(matrix.sum(dim=1, dtype=torch.float64).tolist())
