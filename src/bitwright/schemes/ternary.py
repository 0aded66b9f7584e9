"""Ternary: every weight is -1, 0 or 1 times a scale (BitNet b1.58, arXiv:2402.17764, eq. 1-3).

    w = t * scale        scale = mean|w|        t = clip(round(w / scale), -1, 1)

The paper takes the mean over the whole tensor, for models that were trained this way: ``granularity="tensor"``. A model that was not needs
a scale per group. ``fit`` is the paper's mean; the parameter search tries larger scales too, because for weights that were not trained
to be ternary the mean is too small: for normally distributed ones the squared error is least at 1.53 times the mean.

A code takes 2 bits on disk (log2 3 = 1.585 would be enough: five codes fit a byte, as GGUF's TQ1_0 stores them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.scheme import Params
from bitwright.schemes._mean_scale import MeanScale

__all__ = ["SCHEME", "Ternary"]


@dataclass(frozen=True, kw_only=True)
class Ternary(MeanScale):
    """-1, 0 and 1 times the mean magnitude of a group, channel or tensor.

    >>> params, codes = Ternary(group_size=4).quantize(torch.tensor([[4.0, -3.0, 1.0, 0.0]]))
    >>> params["scale"].tolist(), codes.tolist()
    ([[2.0]], [[2, 0, 1, 1]])
    """

    kind: ClassVar[str] = "ternary"

    @property
    def steps(self) -> tuple[float, ...]:
        return (-1.0, 0.0, 1.0)

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        """The mean for a clip of 1, and up to twice the mean for 0.5: ``(3 - 2 clip) mean|w|``."""
        mean = self._mean(w)
        return ({"scale": self._storable(mean * (3.0 - 2.0 * clip))} for clip in clips)


SCHEME = Ternary
