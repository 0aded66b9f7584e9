"""K-quants: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, super-blocks of 256 values in groups of 16 or 32 with scales that are themselves integers.

    Q2_K, Q4_K, Q5_K    w = (d sc) q - dmin m       Q3_K, Q6_K    w = (d sc) (q - middle)

Groups are fitted one by one, their scales are rounded to 4, 6 or 8 bits under float16 factors d and dmin, and codes are chosen
anew under what was rounded. Byte for byte what ggml's ``ggml_quantize_chunk`` writes on x86-64; ``LANES`` super-blocks in step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitwright.blocks._check import refuse_overflow
from bitwright.blocks._decode import K_TYPES
from bitwright.blocks._kpack import (
    importance,
    mean_size,
    pack_half,
    pack_low_nibbles,
    pack_pairs,
    pack_two_bits,
    pair,
    total,
)
from bitwright.blocks._numba import bring, compiled, over_tiles, put, scratch, starts_of, writable
from bitwright.blocks._search import affine, affine_codes, feedback, positive, symmetric, symmetric_codes
from bitwright.blocks._vector import (
    LANES,
    absolute,
    any_lane,
    larger,
    load,
    load_bytes,
    nearest,
    select,
    smaller,
    splat,
    splat_int,
    store,
    store_bytes,
    to_float,
    to_int,
)
from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.blocks.types import TYPES

__all__ = ["DECODE", "QUANTIZE"]

_SIZE = 256 * LANES
_0, _1, _2 = np.float32(0), np.float32(1), np.float32(2)
_3, _15, _31, _32, _63 = np.float32(3), np.float32(15), np.float32(31), np.float32(32), np.float32(63)
_4 = np.float32(4)
_TINY = np.float32(1e-15)


# --- steps that several types share -------------------------------------------------------------------------------------------


@compiled
def _requantize(x, at, n, scale, offset, low, high, shift, fit, codes):  # type: ignore[no-untyped-def]
    """Codes of a group under rounded parameters: clamp((x + offset) / scale) + shift; where the scale is 0 those in ``fit`` stay."""
    zero = scale == _0
    for i in range(n):
        code = nearest((load(x, at + i * LANES) + offset) / scale)
        code = smaller(larger(code, splat_int(low)), splat_int(high)) + shift
        code = select(zero, to_int(load(fit, i * LANES)), code)
        store_bytes(codes, at + i * LANES, code)


@compiled
def _by_largest(values, n, top, out):  # type: ignore[no-untyped-def]
    """Integers 0 .. top for non-negative values, the largest of which gets ``top``; returns the factor, unrounded."""
    most = splat(_0)
    for j in range(n):
        v = load(values, j * LANES)
        most = select(v > most, v, most)
    inverse = select(most > _0, top / most, _0)
    for j in range(n):
        code = nearest(inverse * load(values, j * LANES)) & 0xFF
        store(out, j * LANES, smaller(code, splat_int(np.int32(top))))
    return most / top


@compiled
def _signed_largest(values, n):  # type: ignore[no-untyped-def]
    """The first value of largest magnitude."""
    most = splat(_0)
    value = splat(_0)
    for j in range(n):
        v = load(values, j * LANES)
        size = absolute(v)
        more = size > most
        most = select(more, size, most)
        value = select(more, v, value)
    return value


# --- Q4_K, Q5_K: 8 groups of 32 -----------------------------------------------------------------------------------------------


@compiled
def _tile_45(x, weights, per_row, first, count, out, five):  # type: ignore[no-untyped-def]
    starts = starts_of(first, count, 256)
    room = scratch(2 * _SIZE + 112 * LANES)
    values, w = room[:_SIZE], room[_SIZE : 2 * _SIZE]
    fit = room[2 * _SIZE : 2 * _SIZE + 32 * LANES]
    small = room[2 * _SIZE + 32 * LANES :]
    scales, mins = small[: 8 * LANES], small[8 * LANES : 16 * LANES]
    sums, inverses = small[16 * LANES : 24 * LANES], small[24 * LANES : 32 * LANES]
    bases, whole = small[32 * LANES : 40 * LANES], small[40 * LANES :].view(np.int32)
    whole_scales, whole_mins = whole[: 8 * LANES], whole[8 * LANES : 16 * LANES]
    packed = np.empty(176 * LANES, np.uint8)
    codes = np.empty(_SIZE, np.uint8)
    nbytes = 176 if five else 144
    top = _31 if five else _15
    bring(x, starts, 256, values)
    weighted = len(weights) > 0
    begin, step, steps = np.float32(-0.9), np.float32(0.05), 36
    if weighted:
        importance(values, weights, per_row, first, count, _2, w)
    else:
        begin, step, steps = (np.float32(-0.5), np.float32(0.1), 15) if five else (np.float32(-1), np.float32(0.1), 20)
    for j in range(8):
        at = j * 32 * LANES
        if weighted:
            store(sums, j * LANES, total(w, at, 32))
        else:
            mean_size(values, at, w)
        scale, offset, inverse, base = affine(values, w, at, 32, top, begin, step, steps, False, fit)
        store(scales, j * LANES, scale)
        store(mins, j * LANES, _0 - offset)
        store(inverses, j * LANES, inverse)
        store(bases, j * LANES, base)
    if weighted:
        d = positive(scales, sums, 8, _63, whole_scales)
        dmin = positive(mins, sums, 8, _63, whole_mins)
        if five:
            for j in range(8):
                store(whole_scales, j * LANES, smaller(load(whole_scales, j * LANES), splat_int(63)))
                store(whole_mins, j * LANES, smaller(load(whole_mins, j * LANES), splat_int(63)))
    else:
        d = _by_largest(scales, 8, _63, whole_scales)
        dmin = _by_largest(mins, 8, _63, whole_mins)
    d = pack_half(d, packed, 0)
    dmin = pack_half(dmin, packed, 2)
    pack_pairs(whole_scales, whole_mins, packed, 4)
    for j in range(8):
        at = j * 32 * LANES
        whole_scale, whole_min = pair(packed, 4, j)
        scale = d * to_float(whole_scale)
        if any_lane(scale == _0):
            affine_codes(values, at, 32, load(inverses, j * LANES), load(bases, j * LANES), top, fit, 0)
        _requantize(values, at, 32, scale, dmin * to_float(whole_min), 0, np.int32(top), 0, fit, codes)
    if five:
        for l in range(32):  # noqa: E741
            high = splat_int(0)
            for j in range(8):
                high = high | ((load_bytes(codes, (32 * j + l) * LANES) >> 4) << j)
            store_bytes(packed, (16 + l) * LANES, high)
        pack_low_nibbles(codes, packed, 48)
    else:
        pack_low_nibbles(codes, packed, 16)
    put(packed, nbytes, out, starts_of(first, count, nbytes))


@compiled
def _q45(begin, end, x, weights, per_row, out, five):  # type: ignore[no-untyped-def]
    count = len(x) // 256
    for tile in range(begin, end):
        _tile_45(x, weights, per_row, tile * LANES, count, out, five)


# --- Q2_K: 16 groups of 16 ----------------------------------------------------------------------------------------------------


@compiled
def _tile_2(x, weights, per_row, first, count, out):  # type: ignore[no-untyped-def]
    starts = starts_of(first, count, 256)
    room = scratch(2 * _SIZE + 128 * LANES)
    values, w = room[:_SIZE], room[_SIZE : 2 * _SIZE]
    small = room[2 * _SIZE :]
    fit, scales, mins = small[: 16 * LANES], small[16 * LANES : 32 * LANES], small[32 * LANES : 48 * LANES]
    sums, inverses = small[48 * LANES : 64 * LANES], small[64 * LANES : 80 * LANES]
    bases, whole = small[80 * LANES : 96 * LANES], small[96 * LANES :].view(np.int32)
    whole_scales, whole_mins = whole[: 16 * LANES], whole[16 * LANES :]
    packed = np.empty(84 * LANES, np.uint8)
    codes = np.empty(_SIZE, np.uint8)
    bring(x, starts, 256, values)
    weighted = len(weights) > 0
    begin, step, steps = np.float32(-0.5), np.float32(0.1), 15
    if weighted:
        importance(values, weights, per_row, first, count, _1, w)
        begin, step, steps = np.float32(-0.9), np.float32(0.05), 36
    else:
        for i in range(256):
            store(w, i * LANES, absolute(load(values, i * LANES)))
    for j in range(16):
        at = j * 16 * LANES
        scale, offset, inverse, base = affine(values, w, at, 16, _3, begin, step, steps, not weighted, fit)
        store(sums, j * LANES, total(w, at, 16))
        store(scales, j * LANES, scale)
        store(mins, j * LANES, _0 - offset)
        store(inverses, j * LANES, inverse)
        store(bases, j * LANES, base)
    if weighted:
        d = positive(scales, sums, 16, _15, whole_scales)
        dmin = positive(mins, sums, 16, _15, whole_mins)
    else:
        d = _by_largest(scales, 16, _15, whole_scales)
        dmin = _by_largest(mins, 16, _15, whole_mins)
    d = pack_half(d, packed, 80)
    dmin = pack_half(dmin, packed, 82)
    for j in range(16):
        at = j * 16 * LANES
        both = load(whole_scales, j * LANES) | (load(whole_mins, j * LANES) << 4)
        store_bytes(packed, j * LANES, both)
        scale = d * to_float(both & 15)
        if any_lane(scale == _0):
            affine_codes(values, at, 16, load(inverses, j * LANES), load(bases, j * LANES), _3, fit, 0)
        _requantize(values, at, 16, scale, dmin * to_float((both >> 4) & 15), 0, 3, 0, fit, codes)
    pack_two_bits(codes, packed, 16)
    put(packed, 84, out, starts_of(first, count, 84))


@compiled
def _q2(begin, end, x, weights, per_row, out):  # type: ignore[no-untyped-def]
    count = len(x) // 256
    for tile in range(begin, end):
        _tile_2(x, weights, per_row, tile * LANES, count, out)


# --- Q3_K: 16 groups of 16, signed --------------------------------------------------------------------------------------------


@compiled
def _tile_3(x, weights, per_row, first, count, out):  # type: ignore[no-untyped-def]
    starts = starts_of(first, count, 256)
    room = scratch(2 * _SIZE + 112 * LANES)
    values, w = room[:_SIZE], room[_SIZE : 2 * _SIZE]
    small = room[2 * _SIZE :]
    fit, wx, scales = small[: 16 * LANES], small[16 * LANES : 32 * LANES], small[32 * LANES : 48 * LANES]
    sums, inverses = small[48 * LANES : 64 * LANES], small[64 * LANES : 80 * LANES]
    whole = small[80 * LANES : 96 * LANES]
    scaled = small[96 * LANES :]
    packed = np.empty(110 * LANES, np.uint8)
    codes = np.empty(_SIZE, np.uint8)
    bring(x, starts, 256, values)
    weighted = len(weights) > 0
    if weighted:
        importance(values, weights, per_row, first, count, _2, w)
        for j in range(16):
            at = j * 16 * LANES
            for i in range(16):
                store(wx, i * LANES, load(w, at + i * LANES) * load(values, at + i * LANES))
            scale, inverse = symmetric(values[at:], wx, w[at:], 0, 16, _4)
            store(scales, j * LANES, scale)
            store(inverses, j * LANES, inverse)
            store(sums, j * LANES, total(w, at, 16))
        for j in range(16):
            store(scaled, j * LANES, load(sums, j * LANES) * load(scales, j * LANES))
        d, inverse = symmetric(scales, scaled, sums, 0, 16, _32)
        symmetric_codes(scales, 0, 16, inverse, _32, whole, 0)
    else:
        for j in range(16):
            store(scales, j * LANES, feedback(values, j * 16 * LANES, 16, _4, fit, 0))
        most = _signed_largest(scales, 16)
        none = most == _0
        inverse = np.float32(-32) / most
        for j in range(16):
            code = nearest(inverse * load(scales, j * LANES))
            code = smaller(larger(code, splat_int(-32)), splat_int(31)) + 32
            store(whole, j * LANES, select(none, _0, to_float(code)))
        d = select(none, _0, _1 / inverse)
    d = pack_half(d, packed, 108)
    for j in range(4):
        high = splat_int(0)
        for k in range(4):
            high = high | ((to_int(load(whole, (4 * k + j) * LANES)) >> 4) << (2 * k))
        store_bytes(packed, (104 + j) * LANES, high)
    for j in range(8):
        low, high = to_int(load(whole, j * LANES)), to_int(load(whole, (j + 8) * LANES))
        store_bytes(packed, (96 + j) * LANES, (low & 15) | (high << 4))
    for j in range(16):
        at = j * 16 * LANES
        scale = d * (load(whole, j * LANES) - _32)
        if any_lane(scale == _0):
            if weighted:
                symmetric_codes(values, at, 16, load(inverses, j * LANES), _4, fit, 0)
            else:
                feedback(values, at, 16, _4, fit, 0)
        _requantize(values, at, 16, scale, splat(_0), -4, 3, 4, fit, codes)
    for l in range(32):  # noqa: E741
        high = splat_int(0)
        for j in range(8):
            high = high | ((load_bytes(codes, (32 * j + l) * LANES) >> 2) << j)
        store_bytes(packed, l * LANES, high)
    pack_two_bits(codes, packed, 32)
    put(packed, 110, out, starts_of(first, count, 110))


@compiled
def _q3(begin, end, x, weights, per_row, out):  # type: ignore[no-untyped-def]
    count = len(x) // 256
    for tile in range(begin, end):
        _tile_3(x, weights, per_row, tile * LANES, count, out)


# --- Q6_K: 16 groups of 16, signed, 8-bit scales ------------------------------------------------------------------------------


@compiled
def _tile_6(x, weights, per_row, first, count, out):  # type: ignore[no-untyped-def]
    starts = starts_of(first, count, 256)
    room = scratch(2 * _SIZE + 64 * LANES)
    values, w = room[:_SIZE], room[_SIZE : 2 * _SIZE]
    small = room[2 * _SIZE :]
    fit, wx, scales = small[: 16 * LANES], small[16 * LANES : 32 * LANES], small[32 * LANES : 48 * LANES]
    inverses = small[48 * LANES :]
    packed = np.empty(210 * LANES, np.uint8)
    codes = np.empty(_SIZE, np.uint8)
    bring(x, starts, 256, values)
    weighted = len(weights) > 0
    if weighted:
        for lane in range(LANES):
            starts[lane] = min(first + lane, count - 1) % per_row * 256
        bring(weights, starts, 256, w)
    for j in range(16):
        at = j * 16 * LANES
        for i in range(16):
            v = load(values, at + i * LANES)
            if not weighted:
                store(w, at + i * LANES, v * v)
            store(wx, i * LANES, load(w, at + i * LANES) * v)
        scale, inverse = symmetric(values[at:], wx, w[at:], 0, 16, _32)
        store(scales, j * LANES, scale)
        store(inverses, j * LANES, inverse)
    most = _signed_largest(scales, 16)
    none = absolute(most) < _TINY
    inverse = np.float32(-128) / most
    d = pack_half(select(none, _0, _1 / inverse), packed, 208)
    for j in range(16):
        at = j * 16 * LANES
        whole = smaller(nearest(inverse * load(scales, j * LANES)), splat_int(127))
        whole = select(none, 0, whole)
        store_bytes(packed, (192 + j) * LANES, whole)
        scale = d * to_float(whole)
        if any_lane(scale == _0):
            symmetric_codes(values, at, 16, load(inverses, j * LANES), _32, fit, 0)
            for i in range(16):
                store(fit, i * LANES, select(none, _0, load(fit, i * LANES)))
        _requantize(values, at, 16, scale, splat(_0), -32, 31, 32, fit, codes)
    for h in range(2):
        for l in range(32):  # noqa: E741
            a = load_bytes(codes, (128 * h + l) * LANES)
            b = load_bytes(codes, (128 * h + l + 32) * LANES)
            c = load_bytes(codes, (128 * h + l + 64) * LANES)
            e = load_bytes(codes, (128 * h + l + 96) * LANES)
            store_bytes(packed, (64 * h + l) * LANES, (a & 15) | (c << 4))
            store_bytes(packed, (64 * h + l + 32) * LANES, (b & 15) | (e << 4))
            high = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((e >> 4) << 6)
            store_bytes(packed, (128 + 32 * h + l) * LANES, high)
    put(packed, 210, out, starts_of(first, count, 210))


@compiled
def _q6(begin, end, x, weights, per_row, out):  # type: ignore[no-untyped-def]
    count = len(x) // 256
    for tile in range(begin, end):
        _tile_6(x, weights, per_row, tile * LANES, count, out)


# --- the doors ----------------------------------------------------------------------------------------------------------------

#: Where a block's float16 fields lie.
_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def _run(name: str, x: Floats, weights: Floats | None) -> Bytes:
    block = TYPES[name]
    rows, columns = x.shape
    out = np.empty((rows, block.row_bytes(columns)), np.uint8)
    given = np.empty(0, np.float32) if weights is None else writable(weights)
    tiles = -(-out.size // block.nbytes // LANES)
    arguments = (writable(x).reshape(-1), given, columns // 256, out.reshape(-1))
    if name in ("Q4_K", "Q5_K"):
        over_tiles(_q45, tiles, *arguments, name == "Q5_K")
    else:
        over_tiles({"Q2_K": _q2, "Q3_K": _q3, "Q6_K": _q6}[name], tiles, *arguments)
    pairs = out.reshape(-1).view(np.uint16).reshape(-1, block.nbytes // 2)
    refuse_overflow(name, x, pairs[:, [at // 2 for at in _HALVES[name]]])
    return out


def _quantizer(name: str) -> Quantize:
    return lambda x, weights: _run(name, x, weights)


QUANTIZE: Mapping[str, Quantize] = {name: _quantizer(name) for name in _HALVES}
DECODE: Mapping[str, Decode] = K_TYPES
