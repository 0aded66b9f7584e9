"""Binary: the sign of every weight times a scale (XNOR-Net, arXiv:1603.05279, eq. 6; signs alone: BinaryConnect, arXiv:1511.00363).

    w = sign(w) * scale        scale = mean|w|

The mean is what minimises the squared error of a tile, so there is no range to search; importances of columns come in through the
weighted mean ``scale = sum_i h_i |w_i| / sum_i h_i``, which is what refitting gives. A code takes one bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.scheme import Params
from bitwright.schemes._mean_scale import MeanScale

__all__ = ["SCHEME", "Binary"]


@dataclass(frozen=True, kw_only=True)
class Binary(MeanScale):
    """-1 and 1 times the mean magnitude of a group, channel or tensor.

    >>> params, codes = Binary(group_size=4).quantize(torch.tensor([[4.0, -3.0, 1.0, -2.0]]))
    >>> params["scale"].tolist(), codes.tolist()
    ([[2.5]], [[1, 0, 1, 0]])
    """

    kind: ClassVar[str] = "binary"

    @property
    def steps(self) -> tuple[float, ...]:
        return (-1.0, 1.0)

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        """The mean alone: it is the optimum already."""
        del clips
        return iter([self.fit(w, context=context)])


SCHEME = Binary
