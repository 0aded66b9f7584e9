"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 values with one float16 scale, and in ``_1`` types one float16 offset.

    Q4_0, Q5_0, Q8_0    w = d (q - middle)        Q4_1, Q5_1    w = d q + m

Without weights the range of the block gives the scale; with weights ggml's searches do, with weights ``q sqrt(sigma2 + x²)``, q being the
importance of the column and sigma2 the mean square of the row. Byte for byte what ggml's ``ggml_quantize_chunk`` writes on x86-64;
``LANES`` blocks in step. Q8_0 has no use for weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitwright.blocks._check import refuse_overflow
from bitwright.blocks._decode import LEGACY_TYPES
from bitwright.blocks._numba import bring, compiled, half_bits, over_tiles, scratch, starts_of, writable
from bitwright.blocks._search import affine, affine_codes, symmetric, symmetric_codes
from bitwright.blocks._vector import (
    LANES,
    absolute,
    larger,
    load,
    select,
    smaller,
    splat,
    splat_int,
    sqrt,
    store,
    store_bytes,
    to_float,
    to_int,
    transpose_bytes,
)
from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.blocks.types import TYPES

__all__ = ["DECODE", "QUANTIZE"]

_0, _1, _HALF = np.float32(0), np.float32(1), np.float32(0.5)


# --- codes of 32 values in lanes, as int32 -------------------------------------------------------------------------------------


@compiled
def _whole(v):  # type: ignore[no-untyped-def]
    """Towards zero; 0 for what no byte holds, as 1 / d gives for a subnormal d."""
    return to_int(select(absolute(v) < np.float32(256), v, _0))


@compiled
def _symmetric(x, middle, codes):  # type: ignore[no-untyped-def]
    """Scale -m / middle for the value m of largest magnitude; codes trunc(x / scale + middle + 1/2), at most 2 middle - 1."""
    most = splat(_0)
    value = splat(_0)
    for i in range(32):
        v = load(x, i * LANES)
        size = absolute(v)
        value = select(size > most, v, value)
        most = larger(size, most)
    scale = value / -middle
    inverse = select(scale != _0, _1 / scale, _0)
    top = splat_int(np.int32(middle + middle) - np.int32(1))
    for i in range(32):
        store(codes, i * LANES, smaller(_whole(load(x, i * LANES) * inverse + (middle + _HALF)), top))
    return scale


@compiled
def _affine(x, top, codes):  # type: ignore[no-untyped-def]
    """Scale (max - min) / top and offset min; codes trunc((x - min) / scale + 1/2), at most ``top``."""
    low = load(x, 0)
    high = low
    for i in range(1, 32):
        v = load(x, i * LANES)
        low = smaller(v, low)
        high = larger(v, high)
    scale = (high - low) / top
    inverse = select(scale != _0, _1 / scale, _0)
    limit = splat_int(np.int32(top))
    for i in range(32):
        store(codes, i * LANES, smaller(_whole((load(x, i * LANES) - low) * inverse + _HALF), limit))
    return scale, low


@compiled
def _eight(x, codes):  # type: ignore[no-untyped-def]
    """Scale max |x| / 127; codes x / scale, rounded half away from zero."""
    most = splat(_0)
    for i in range(32):
        most = larger(absolute(load(x, i * LANES)), most)
    scale = most / np.float32(127)
    inverse = select(scale != _0, _1 / scale, _0)
    for i in range(32):
        v = load(x, i * LANES) * inverse
        v = select(absolute(v) < np.float32(256), v, _0)
        code = to_int(v)
        rest = v - to_float(code)
        store(codes, i * LANES, code + select(rest >= _HALF, 1, 0) - select(rest <= -_HALF, 1, 0))
    return scale


# --- codes to bytes -------------------------------------------------------------------------------------------------------------


@compiled
def _put_half(value, half, pairs, starts, at):  # type: ignore[no-untyped-def]
    """The float16 of every lane into its block, two bytes at byte ``at``; pairs: the output as uint16."""
    store(half, 0, half_bits(value))
    for lane in range(LANES):
        pairs[(starts[lane] + at) >> 1] = np.uint16(half[lane])


@compiled
def _put_nibbles(codes, packed, out, starts, at):  # type: ignore[no-untyped-def]
    """Low four bits of 32 codes in 16 bytes: elements j and j + 16 share byte j."""
    for j in range(16):
        low, high = load(codes, j * LANES), load(codes, (j + 16) * LANES)
        store_bytes(packed, j * LANES, (low & 15) | (high << 4))
    transpose_bytes(packed, 0, out, starts, at)


@compiled
def _put_fifth(codes, half, pairs, starts, at):  # type: ignore[no-untyped-def]
    """Bit 4 of element j as bit j of a word at byte ``at``."""
    word = splat_int(0)
    for j in range(32):
        word = word | (((load(codes, j * LANES) >> 4) & 1) << j)
    store(half, 0, word)
    for lane in range(LANES):
        pairs[(starts[lane] + at) >> 1] = np.uint16(half[lane] & 0xFFFF)
        pairs[(starts[lane] + at + 2) >> 1] = np.uint16((half[lane] >> 16) & 0xFFFF)


@compiled
def _whole_codes(fit, codes):  # type: ignore[no-untyped-def]
    for i in range(32):
        store(codes, i * LANES, to_int(load(fit, i * LANES)))


# --- the loops ------------------------------------------------------------------------------------------------------------------


@compiled
def _row_squares(begin, end, x, columns, out):  # type: ignore[no-untyped-def]
    """Mean square of every row, summed left to right."""
    rows = len(out)
    values = scratch(32 * LANES)
    for tile in range(begin, end):
        first = tile * LANES
        starts = starts_of(first, rows, columns)
        total = splat(_0)
        for column in range(0, columns, 32):
            bring(x[column:], starts, 32, values)
            for i in range(32):
                v = load(values, i * LANES)
                total += v * v
        store(values, 0, total / np.float32(columns))
        for lane in range(min(LANES, rows - first)):
            out[first + lane] = values[lane]


@compiled
def _weights_of(values, weights, squares, per_row, first, count, w, wx):  # type: ignore[no-untyped-def]
    """Weights of a tile, and weights times x."""
    starts = np.empty(LANES, np.int64)
    for lane in range(LANES):
        block = min(first + lane, count - 1)
        starts[lane] = block % per_row * 32
        wx[lane] = squares[block // per_row]
    sigma2 = load(wx, 0)
    bring(weights, starts, 32, w)
    for i in range(32):
        v = load(values, i * LANES)
        weight = load(w, i * LANES) * sqrt(sigma2 + v * v)
        store(w, i * LANES, weight)
        store(wx, i * LANES, weight * v)


@compiled
def _tile(x, weights, squares, per_row, first, count, offset, five, nbytes, values, w, wx, codes, packed, out, pairs):  # type: ignore[no-untyped-def]
    starts = starts_of(first, count, 32)
    places = starts_of(first, count, nbytes)
    bring(x, starts, 32, values)
    if len(weights):
        _weights_of(values, weights, squares, per_row, first, count, w, wx)
    after = 2
    if offset:
        top = np.float32(31) if five else np.float32(15)
        if len(weights):
            scale, low, inverse, base = affine(values, w, 0, 32, top, np.float32(-0.9), np.float32(0.05), 36, False, wx)
            affine_codes(values, 0, 32, inverse, base, top, wx, 0)
            _whole_codes(wx, codes)
        else:
            scale, low = _affine(values, top, codes)
        _put_half(low, codes[32 * LANES :], pairs, places, 2)
        after = 4
    else:
        middle = np.float32(16) if five else np.float32(8)
        if len(weights):
            scale, inverse = symmetric(values, wx, w, 0, 32, middle)
            symmetric_codes(values, 0, 32, inverse, middle, wx, 0)
            _whole_codes(wx, codes)
        else:
            scale = _symmetric(values, middle, codes)
    _put_half(scale, codes[32 * LANES :], pairs, places, 0)
    if five:
        _put_fifth(codes, codes[32 * LANES :], pairs, places, after)
        after += 4
    _put_nibbles(codes, packed, out, places, after)


@compiled
def _q45(begin, end, x, weights, squares, per_row, offset, five, nbytes, out, pairs):  # type: ignore[no-untyped-def]
    count = len(x) // 32
    room = scratch(132 * LANES)
    values, w, wx = room[: 32 * LANES], room[32 * LANES : 64 * LANES], room[64 * LANES : 96 * LANES]
    codes = room[96 * LANES :].view(np.int32)
    packed = np.empty(16 * LANES, np.uint8)
    for tile in range(begin, end):
        _tile(
            x, weights, squares, per_row, tile * LANES, count, offset, five, nbytes,
            values, w, wx, codes, packed, out, pairs,
        )  # fmt: skip


@compiled
def _tile_8(x, first, count, values, codes, packed, out, pairs):  # type: ignore[no-untyped-def]
    places = starts_of(first, count, 34)
    bring(x, starts_of(first, count, 32), 32, values)
    _put_half(_eight(values, codes), codes[32 * LANES :], pairs, places, 0)
    for i in range(32):
        store_bytes(packed, i * LANES, load(codes, i * LANES))
    transpose_bytes(packed, 0, out, places, 2)
    transpose_bytes(packed, 16 * LANES, out, places, 18)


@compiled
def _q8(begin, end, x, out, pairs):  # type: ignore[no-untyped-def]
    count = len(x) // 32
    room = scratch(66 * LANES)
    values, codes = room[: 32 * LANES], room[32 * LANES :].view(np.int32)
    packed = np.empty(32 * LANES, np.uint8)
    for tile in range(begin, end):
        _tile_8(x, tile * LANES, count, values, codes, packed, out, pairs)


# --- the doors ------------------------------------------------------------------------------------------------------------------


def _run(name: str, x: Floats, weights: Floats | None) -> Bytes:
    block = TYPES[name]
    rows, columns = x.shape
    out = np.empty((rows, block.row_bytes(columns)), np.uint8)
    flat, bytes_, pairs = writable(x).reshape(-1), out.reshape(-1), out.reshape(-1).view(np.uint16)
    tiles = -(-x.size // 32 // LANES)
    offset = name in ("Q4_1", "Q5_1")
    if name == "Q8_0":
        over_tiles(_q8, tiles, flat, bytes_, pairs)
    else:
        given = np.empty(0, np.float32) if weights is None else writable(weights)
        squares = np.empty(0 if weights is None else rows, np.float32)
        if weights is not None:
            over_tiles(_row_squares, -(-rows // LANES), flat, columns, squares)
        over_tiles(
            _q45, tiles, flat, given, squares, columns // 32, offset, name[1] == "5", block.nbytes, bytes_, pairs
        )
    refuse_overflow(name, x, pairs.reshape(-1, block.nbytes // 2)[:, : 2 if offset else 1])
    return out


def _quantizer(name: str) -> Quantize:
    return lambda x, weights: _run(name, x, weights)


QUANTIZE: Mapping[str, Quantize] = {name: _quantizer(name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}

DECODE: Mapping[str, Decode] = LEGACY_TYPES
