"""The Method contract: which of a scheme's numbers are chosen for this weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from bitwright.core.scheme import Codec, Scheme
from bitwright.core.stats import Statistic
from bitwright.core.tensor import QuantizedTensor

__all__ = ["Context", "FeedbackKernel", "Method", "Outcome"]

Stats = Mapping[str, Statistic]


class FeedbackKernel(Protocol):
    """Quantizes one block of columns with error feedback inside the block; see ``kernels/reference.py``."""

    def __call__(
        self, targets: torch.Tensor, weights: torch.Tensor, feedback: torch.Tensor, codec: Codec, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``(block, rows)`` uint8 and errors ``weights - decoded`` ``(block, rows)`` float32.

        targets: ``(block, rows)`` float32, columns of the weight after feedback from all earlier blocks;
        weights: the original columns, same shape; feedback: ``(block, block)`` float32 unit upper triangular; columns:
        ``(block,)`` int64, which column of the codec each one is.
        """


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the engine hands to a method beside the weight: fast kernels, and what the scheme prepared above the tile."""

    feedback: FeedbackKernel
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


class Method(ABC):
    """Base of every method; a method is a frozen dataclass of options. Inputs are never mutated."""

    name: ClassVar[str]
    #: names of the statistics that it wants ("gram", ...); empty for data-free methods
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def quantize(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context) -> Outcome:
        """Quantize ``w`` ``(rows, columns)`` float32. Raises NumericError for weights that are not finite."""


def relative_loss(w: torch.Tensor, decoded: torch.Tensor, gram: torch.Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ); 0 where the denominator is 0."""
    error = w - decoded
    above = float((error @ gram).mul_(error).sum(dtype=torch.float64))
    below = float((w @ gram).mul_(w).sum(dtype=torch.float64))
    return above / below if below > 0 else 0.0
