"""Products of int8 weights with inputs that are rounded to int8 as the layer runs: W8A8, and LLM.int8 with outliers in 16 bits.

With inputs ``x ~ (a - z) s_x`` (a and z int8, one s_x for a token or for all) and weights ``w ~ q s_w`` (one s_w for a row):

    y = (sum a q - z sum q) s_x s_w

The first sum is exact in int32. LLM.int8 (arXiv:2208.07339, section 3.2) takes the columns that hold an input above a threshold out of
this product, and multiplies them with the decoded weights in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.scheme import AffineCodec, Params, Scheme

__all__ = ["int8_weight", "multiply"]


def int8_weight(scheme: Scheme, codes: torch.Tensor, params: Params) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The weight as ``(out, in)`` int8 and ``(out,)`` float32 scales, or None where it is not one symmetric int8 step a row."""
    if scheme.levels != 256 or scheme.vector != 1:
        return None
    rows, columns = codes.shape
    codec = scheme.codec(params, (rows, columns))
    if not isinstance(codec, AffineCodec) or codec.scale.shape != (rows, 1) or not bool((codec.zero == 128).all()):
        return None
    return (codes ^ 0x80).view(torch.int8), codec.scale[:, 0].clone()


def multiply(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inputs: InputScheme, params: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """``(tokens, in)`` in any float dtype to ``(tokens, out)`` in the same, through int8.

    weight: ``(out, in)`` int8; scale: ``(out,)`` float32; inputs: int8 per token or per tensor.
    """
    rest = x
    outliers: torch.Tensor | None = None
    if inputs.threshold > 0:
        found = (x.abs() > inputs.threshold).any(0)
        outliers = found.nonzero()[:, 0]
        rest = x.masked_fill(found, 0.0)
    codes, scale_x, zero = inputs.codes(rest, params)
    total = _int_mm(codes.to(torch.int8), weight).float()
    if not inputs.symmetric:
        total -= zero * weight.sum(1, dtype=torch.int32).float()
    y = (total * scale_x * scale).to(x.dtype)
    if outliers is not None and len(outliers):
        kept = (weight[:, outliers].float() * scale[:, None]).to(x.dtype)
        y += x[:, outliers] @ kept.T
    return y


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a bᵀ`` in int32. CUDA wants more than 16 rows and multiples of 8."""
    rows = len(a)
    if a.is_cuda and (rows <= 16 or a.shape[1] % 8 or len(b) % 8):
        return (a.double() @ b.T.double()).to(torch.int32)
    product: torch.Tensor = torch._int_mm(a, b.T)
    return product
