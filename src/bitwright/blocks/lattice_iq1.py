"""IQ1_S and IQ1_M: their numbers, found by ``_lattice_split``, as ggml's bytes, and bytes as values.

    w = d (2 s + 1) (point ± 1/8)

IQ1_S: a three-bit s and a sign for 32 values. IQ1_M: an s for 16 values, a sign for eight, and d in the top bits of four words of scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks._check import refuse_overflow
from bitwright.blocks._lattice_split import split_tiles
from bitwright.blocks._lattice_tables import lattice, level_tables
from bitwright.blocks._numba import over_tiles, writable
from bitwright.blocks._vector import LANES
from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.blocks.types import TYPES

__all__ = ["DECODE", "QUANTIZE"]

_DELTA = np.float32(0.125)
_NIBBLES = np.arange(0, 16, 4, dtype=np.uint16)


def _quantizer(name: str) -> Quantize:
    n = 32 if name == "IQ1_S" else 16

    def run(x: Floats, weights: Floats | None) -> Bytes:
        count, table = x.size // 256, lattice("IQ1_S")
        index, minus = np.empty((count, 32), np.uint16), np.empty((count, 32), np.uint8)
        sizes, half = np.empty((count, 256 // n), np.uint8), np.empty(count, np.uint16)
        levels = np.concatenate([level_tables(np.array((-1, 0, 1, 2), np.float32) + d) for d in (_DELTA, -_DELTA)])
        over_tiles(
            split_tiles, -(-count // LANES), writable(x).reshape(-1), writable(weights), x.shape[1] // 256, n,
            (levels, table.place, table.lists), table.number,
            index.reshape(-1), sizes.reshape(-1), minus.reshape(-1), half,
        )  # fmt: skip
        refuse_overflow(name, x, half[:, None])
        blocks = _pack_iq1_s(index, sizes, minus, half) if n == 32 else _pack_iq1_m(index, sizes, minus, half)
        return blocks.reshape(x.shape[0], TYPES[name].row_bytes(x.shape[1]))

    return run


def _pack_iq1_s(index: NDArray[np.uint16], sizes: Bytes, minus: Bytes, half: NDArray[np.uint16]) -> Bytes:
    four = (index >> 8).reshape(-1, 8, 4)
    words = four[..., 0] | four[..., 1] << 3 | four[..., 2] << 6 | four[..., 3] << 9
    words = words | sizes.astype(np.uint16) << 12 | minus[:, ::4].astype(np.uint16) << 15
    return np.concatenate((half[:, None].view(np.uint8), index.astype(np.uint8), words.view(np.uint8)), axis=1)


def _pack_iq1_m(index: NDArray[np.uint16], sizes: Bytes, minus: Bytes, half: NDArray[np.uint16]) -> Bytes:
    nibbles = (index >> 8).astype(np.uint8) | minus << 3
    four = sizes.astype(np.uint16).reshape(-1, 4, 4)
    words = four[..., 0] | four[..., 1] << 3 | four[..., 2] << 6 | four[..., 3] << 9
    words = words | (half[:, None] >> _NIBBLES & 15) << 12
    return np.concatenate(
        (index.astype(np.uint8), nibbles[:, ::2] | nibbles[:, 1::2] << 4, words.view(np.uint8)), axis=1
    )


@np.errstate(over="ignore", invalid="ignore")
def _values(scale: Floats, index: NDArray[np.integer[Any]], minus: NDArray[np.bool_], columns: int) -> Floats:
    """All of shape (n, 32): one entry for eight values."""
    delta = np.where(minus, -_DELTA, _DELTA)
    out: Floats = scale[..., None] * (lattice("IQ1_S").points[index] + delta[..., None])
    return out.reshape(-1, columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq1_s(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 50)
    words = b[:, 34:].copy().view(np.uint16)
    scale = b[:, :2].copy().view(np.float16).astype(np.float32) * (2 * (words >> 12 & 7).astype(np.float32) + 1)
    high = (words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 32)
    return _values(np.repeat(scale, 4, axis=1), b[:, 2:34] | high << 8, np.repeat(words >> 15 != 0, 4, axis=1), columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq1_m(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 56)
    nibbles = np.stack((b[:, 32:48] & 15, b[:, 32:48] >> 4), axis=2).reshape(-1, 32).astype(np.uint16)
    words = b[:, 48:].copy().view(np.uint16)
    half = ((words >> 12) << _NIBBLES).sum(1, dtype=np.uint16)
    sizes = (words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 16).astype(np.float32)
    scale = half[:, None].view(np.float16).astype(np.float32) * (2 * sizes + 1)
    return _values(np.repeat(scale, 2, axis=1), b[:, :32] | (nibbles & 7) << 8, nibbles & 8 != 0, columns)


QUANTIZE: Mapping[str, Quantize] = {name: _quantizer(name) for name in ("IQ1_S", "IQ1_M")}
DECODE: Mapping[str, Decode] = {"IQ1_S": _from_iq1_s, "IQ1_M": _from_iq1_m}
