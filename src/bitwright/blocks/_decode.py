"""Blocks back to floats: legacy types and K-quants, bit for bit ggml's ``dequantize_row``.

Here the vectors run along a block: element e + k of the block in lane k. Formulas are evaluated in float32, as they are written in
``legacy`` and ``kquant``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bitwright.blocks._numba import compiled, from_half, over_tiles, writable
from bitwright.blocks._vector import LANES, lane_numbers, load_bytes, splat, splat_int, store, to_float
from bitwright.blocks.codec import Bytes, Decode, Floats
from bitwright.blocks.types import TYPES

__all__ = ["K_TYPES", "LEGACY_TYPES"]


@compiled
def _half(b, at):  # type: ignore[no-untyped-def]
    """The float16 in two bytes."""
    return from_half(np.int64(b[at]) | (np.int64(b[at + 1]) << 8))


@compiled
def _signed(v):  # type: ignore[no-untyped-def]
    """Bytes as two's complement."""
    return (v ^ 0x80) - 0x80


@compiled
def _legacy(begin, end, b, nbytes, offset, five, out):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 32
        d = splat(_half(b, at))
        m = splat(_half(b, at + 2)) if offset else splat(np.float32(0))
        at += 4 if offset else 2
        word = np.int32(0)
        if five:
            for k in range(4):
                word |= np.int32(b[at + k]) << np.int32(8 * k)
            at += 4
        middle = 16 if five else 8
        for half in range(2):
            q = (load_bytes(b, at) >> (4 * half)) & 15
            if five:
                q = q | (((splat_int(word) >> (lane_numbers() + 16 * half)) & 1) << 4)
            value = to_float(q) * d + m if offset else to_float(q - middle) * d
            store(out, to + half * LANES, value)


@compiled
def _eight(begin, end, b, nbytes, out):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 32
        d = splat(_half(b, at))
        for e in range(0, 32, LANES):
            store(out, to + e, to_float(_signed(load_bytes(b, at + 2 + e))) * d)


@compiled
def _two(begin, end, b, nbytes, out):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d, dmin = _half(b, at + 80), _half(b, at + 82)
        for e in range(0, 256, 16):
            both = b[at + (e >> 4)]
            scale, low = splat(d * np.float32(both & 15)), splat(dmin * np.float32(both >> 4))
            h, k, l = e >> 7, (e & 127) >> 5, e & 31  # noqa: E741
            q = (load_bytes(b, at + 16 + 32 * h + l) >> (2 * k)) & 3
            store(out, to + e, scale * to_float(q) - low)


@compiled
def _three(begin, end, b, nbytes, out):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d = _half(b, at + 108)
        for e in range(0, 256, 16):
            j = e >> 4
            low = b[at + 96 + j] & 15 if j < 8 else b[at + 88 + j] >> 4
            whole = np.int32(low) | (np.int32((b[at + 104 + (j & 3)] >> (2 * (j >> 2))) & 3) << np.int32(4))
            scale = splat(d * np.float32(whole - np.int32(32)))
            h, k, l = e >> 7, (e & 127) >> 5, e & 31  # noqa: E741
            q = (load_bytes(b, at + 32 + 32 * h + l) >> (2 * k)) & 3
            high = (load_bytes(b, at + l) >> (4 * h + k)) & 1
            store(out, to + e, scale * to_float(q + (high << 2) - 4))


@compiled
def _four_five(begin, end, b, nbytes, out):  # type: ignore[no-untyped-def]
    five = nbytes == 176
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d, dmin = _half(b, at), _half(b, at + 2)
        s = at + 4
        for j in range(8):
            if j < 4:
                whole, low = b[s + j] & 63, b[s + j + 4] & 63
            else:
                whole = (b[s + j + 4] & 15) | ((b[s + j - 4] >> 6) << 4)
                low = (b[s + j + 4] >> 4) | ((b[s + j] >> 6) << 4)
            scale, offset = splat(d * np.float32(whole)), splat(dmin * np.float32(low))
            nibbles = at + (48 if five else 16) + 32 * (j >> 1)
            for l in range(0, 32, LANES):  # noqa: E741
                q = (load_bytes(b, nibbles + l) >> (4 * (j & 1))) & 15
                if five:
                    q = q | (((load_bytes(b, at + 16 + l) >> j) & 1) << 4)
                store(out, to + 32 * j + l, scale * to_float(q) - offset)


@compiled
def _six(begin, end, b, nbytes, out):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d = _half(b, at + 208)
        for e in range(0, 256, 16):
            scale = splat(d * np.float32(np.int8(b[at + 192 + (e >> 4)])))
            h, k, l = e >> 7, (e & 127) >> 5, e & 31  # noqa: E741
            low = (load_bytes(b, at + 64 * h + 32 * (k & 1) + l) >> (4 * (k >> 1))) & 15
            high = (load_bytes(b, at + 128 + 32 * h + l) >> (2 * k)) & 3
            store(out, to + e, scale * to_float((low | (high << 4)) - 32))


def _decoder(name: str, run: Callable[..., None], *options: Any) -> Decode:
    block = TYPES[name]

    def decode(blocks: Bytes, columns: int) -> Floats:
        out = np.empty((len(blocks), columns), np.float32)
        over_tiles(run, out.size // block.values, writable(blocks).reshape(-1), block.nbytes, *options, out.reshape(-1))
        return out

    return decode


LEGACY_TYPES: Mapping[str, Decode] = {
    "Q4_0": _decoder("Q4_0", _legacy, False, False),
    "Q4_1": _decoder("Q4_1", _legacy, True, False),
    "Q5_0": _decoder("Q5_0", _legacy, False, True),
    "Q5_1": _decoder("Q5_1", _legacy, True, True),
    "Q8_0": _decoder("Q8_0", _eight),
}
K_TYPES: Mapping[str, Decode] = {
    "Q2_K": _decoder("Q2_K", _two),
    "Q3_K": _decoder("Q3_K", _three),
    "Q4_K": _decoder("Q4_K", _four_five),
    "Q5_K": _decoder("Q5_K", _four_five),
    "Q6_K": _decoder("Q6_K", _six),
}
