"""Round-to-nearest: the scheme's own quantizer, nothing more. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.method import Context, Method, Outcome, Stats, relative_loss
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.stats import Gram

__all__ = ["METHOD", "Rtn"]


@dataclass(frozen=True, kw_only=True)
class Rtn(Method):
    """Parameters from the range of each tile, every weight to its nearest code."""

    name: ClassVar[str] = "rtn"

    def quantize(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context) -> Outcome:
        found = context.encode(w, scheme, None, context.prepared) if context.encode is not None else None
        params, codes = found if found is not None else scheme.quantize(w, context=context.prepared)
        tensor = QuantizedTensor(scheme, (w.shape[0], w.shape[1]), codes, params)
        gram = stats.get("gram")
        loss = relative_loss(w, tensor.decode(), gram.matrix) if isinstance(gram, Gram) and gram.count else None
        return Outcome(tensor=tensor, loss=loss)


METHOD = Rtn
