"""F32, F16 and BF16 as "blocks" of one value; both 16-bit types round to nearest even, as ggml does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.errors import NumericError

__all__ = ["DECODE", "QUANTIZE"]


def _to_f32(x: Floats, weights: Floats | None) -> Bytes:
    del weights
    return x.view(np.uint8)


def _to_f16(x: Floats, weights: Floats | None) -> Bytes:
    del weights
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        raise NumericError(
            f"{int((~np.isfinite(half)).sum())} values lie outside the range of float16", mend="use BF16 or F32"
        )
    return half.view(np.uint8)


def _to_bf16(x: Floats, weights: Floats | None) -> Bytes:
    del weights
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return rounded.astype(np.uint16).view(np.uint8)


def _from_f32(blocks: Bytes, columns: int) -> Floats:
    del columns
    return blocks.view(np.float32)


def _from_f16(blocks: Bytes, columns: int) -> Floats:
    del columns
    return blocks.view(np.float16).astype(np.float32)


def _from_bf16(blocks: Bytes, columns: int) -> Floats:
    del columns
    return (blocks.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


QUANTIZE: Mapping[str, Quantize] = {"F32": _to_f32, "F16": _to_f16, "BF16": _to_bf16}
DECODE: Mapping[str, Decode] = {"F32": _from_f32, "F16": _from_f16, "BF16": _from_bf16}
