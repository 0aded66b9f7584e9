"""Integer weights of other layouts as ggml blocks, code for code: gptq, awq, compressed-tensors 4 bits to Q4_0 or Q4_1, 8 bits to Q8_0.

``Q4_0`` holds ``(q - 8) d``, ``Q4_1`` ``q d + m``, ``Q8_0`` ``q d`` with signed ``q``; ``d`` and ``m`` are float16, one for 32 columns.
A group of 32, 64, 128 ... columns repeats its scale. What float16 cannot hold exactly is refused, or rounded where the caller allows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from bitwright.blocks.codec import Bytes
from bitwright.blocks.types import TYPES, BlockType
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import AffineCodec, Scheme
from bitwright.errors import PlanError
from bitwright.runtime.checkpoint import DecodedSource
from bitwright.schemes.ggml import Ggml

__all__ = ["RegriddedBlocks"]

_BLOCK = 32
_MEND = "convert to dense first and quantize that (`bitwright convert --layout dense`), or allow rounding with --lossy"


@dataclass
class RegriddedBlocks:
    """A quantized checkpoint's linears as block bytes; the last one that was asked for is kept."""

    source: DecodedSource
    lossy: bool = False
    #: largest relative change of a scale or offset, where rounding was allowed
    rounding: float = 0.0
    _held: tuple[str, Bytes] | None = field(default=None, repr=False)

    def block_type(self, module: str) -> BlockType | None:
        """Which type this linear becomes. PlanError where none has its numbers."""
        found = self.source.modules.get(module)
        if found is None:
            return None
        scheme, shape = found
        return TYPES[_type_for(module, scheme, shape)]

    def rows(self, module: str, start: int, stop: int) -> Bytes:
        """``(rows, row bytes)`` in the checkpoint's row order."""
        if self._held is None or self._held[0] != module:
            self._held = (module, self._blocks(module))
        return self._held[1][start:stop]

    def _blocks(self, module: str) -> Bytes:
        q = self.source.quantized(module)
        block = self.block_type(module)
        assert block is not None
        if isinstance(q.scheme, Ggml):
            stored: Bytes = q.scheme.join(q.params, q.codes, q.shape).numpy()
            return stored
        codes, step, zero = _affine(module, q)
        rows, columns = q.shape
        scale = _halves(self, module, "scale", step)
        if block.name == "Q4_1":
            offset = _halves(self, module, "offset", -zero * step)
            return _nibbles(codes, [scale, offset], rows, columns)
        middle = 8 if block.name == "Q4_0" else 0
        shifted = codes - np.repeat(zero, _BLOCK, 1).astype(np.int16) + middle
        if block.name == "Q4_0":
            if shifted.min() < 0 or shifted.max() > 15:
                raise PlanError(f"{module}: its zero points are not in the middle", mend=_MEND)
            return _nibbles(shifted, [scale], rows, columns)
        head = scale[..., None].view(np.uint8).reshape(rows, -1, 2)
        body = shifted.astype(np.int8).view(np.uint8).reshape(rows, -1, _BLOCK)
        return np.ascontiguousarray(np.concatenate([head, body], -1).reshape(rows, -1))


def _type_for(module: str, scheme: Scheme, shape: tuple[int, int]) -> str:
    """The ggml type with the same numbers, from the scheme alone."""
    if isinstance(scheme, Ggml):
        return scheme.type
    bits, symmetric = getattr(scheme, "bits", None), getattr(scheme, "symmetric", None)
    if scheme.kind != "affine" or bits not in (4, 8) or scheme.inputs is not None:
        raise PlanError(f"{module}: {scheme.describe_all()} has no counterpart among GGUF's types", mend=_MEND)
    if scheme.span(shape[1]) % _BLOCK:
        raise PlanError(f"{module}: {scheme.describe()} shares scales over other columns than blocks of 32", mend=_MEND)
    if bits == 8 and not symmetric:
        raise PlanError(f"{module}: GGUF has no 8-bit type with zero points", mend=_MEND)
    return "Q8_0" if bits == 8 else "Q4_0" if symmetric else "Q4_1"


def _affine(module: str, q: QuantizedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``(rows, columns)`` int16, and scale and zero point of every 32 columns ``(rows, columns / 32)`` float32."""
    if q.outliers is not None:
        raise PlanError(f"{module}: GGUF has no place for outliers", mend=_MEND)
    codec = q.scheme.codec(q.params, q.shape)
    if not isinstance(codec, AffineCodec):
        raise PlanError(f"{module}: {q.scheme.describe()} is no grid of even steps", mend=_MEND)
    tile = codec.tile[::_BLOCK]
    if not torch.equal(torch.repeat_interleave(tile, _BLOCK), codec.tile):
        raise PlanError(f"{module}: columns of a block have different scales (act-order)", mend=_MEND)
    scale, zero = (value.expand(q.shape[0], value.shape[1])[:, tile].numpy() for value in (codec.scale, codec.zero))
    return q.codes.numpy().astype(np.int16), scale.astype(np.float32), zero.astype(np.float32)


def _halves(blocks: RegriddedBlocks, module: str, what: str, values: np.ndarray) -> np.ndarray:
    """As float16, ``(rows, blocks)``. PlanError where that is not exact and rounding is not allowed."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise PlanError(f"{module}: a {what} does not fit into float16", mend=_MEND)
    wrong = half.astype(np.float32) != values
    if wrong.any():
        change = float((np.abs(half.astype(np.float32) - values)[wrong] / np.abs(values[wrong])).max())
        if not blocks.lossy:
            raise PlanError(f"{module}: float16 would change a {what} by {change:.1e} of itself", mend=_MEND)
        blocks.rounding = max(blocks.rounding, change)
    return half


def _nibbles(codes: np.ndarray, heads: list[np.ndarray], rows: int, columns: int) -> Bytes:
    """Blocks of float16 heads and 16 bytes: element j in the low half of byte j, element j + 16 in the high half."""
    grouped = codes.reshape(rows, columns // _BLOCK, _BLOCK).astype(np.uint8)
    body = grouped[..., :16] | (grouped[..., 16:] << 4)
    parts = [head[..., None].view(np.uint8).reshape(rows, -1, 2) for head in heads]
    return np.ascontiguousarray(np.concatenate([*parts, body], -1).reshape(rows, -1))
