"""IQ4_NL and IQ4_XS: four bits that name one of 16 unevenly spaced levels.

    IQ4_NL    w = d K[q]                32 values under one float16 scale
    IQ4_XS    w = (d (s - 32)) K[q]     256 values, a six-bit scale for every 32

The scale of 32 values is the best of 16 candidates by weighted least squares, K's end laid near the largest value. Source: ggml
(``ggml_quantize_chunk``, whose bytes these are); ``LANES`` blocks in step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks._check import refuse_overflow
from bitwright.blocks._lookup import lookup
from bitwright.blocks._numba import bring, compiled, half_bits, over_tiles, put, scratch, starts_of, writable
from bitwright.blocks._vector import (
    LANES,
    absolute,
    bits,
    larger,
    load,
    nearest,
    select,
    smaller,
    splat,
    splat_int,
    sqrt,
    store,
    store_bytes,
    to_float,
    to_int,
)
from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.blocks.types import TYPES

__all__ = ["DECODE", "LEVELS", "QUANTIZE", "level_codes"]

#: K, the levels of both types.
LEVELS: NDArray[np.float32] = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)

_0, _1 = np.float32(0), np.float32(1)
_TINY = np.float32(1e-15)
_END = np.float32(127)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
_TRIALS = 16

# Which level is nearest changes at the 15 middles between two levels (there the upper one wins; near a middle both differences are
# exact in float32, so that comparing with the middle is comparing the differences). Multiples of 12.5, less 6.25, cut the axis into
# 16 pieces with one middle each at most: the rounded quotient names the piece, one comparison decides.
_PIECE = np.float32(0.08)
_FIRST, _LAST = np.float32(-8), np.float32(7)


def _pieces() -> NDArray[np.float32]:
    """For every piece the middle in it, the codes below and above it, and their levels; piece k at position k mod 16."""
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    table = np.empty((5, 16), np.float32)
    for piece in range(-8, 8):
        low = 12.5 * (piece - 0.5) if piece > -8 else -np.inf
        inside = np.flatnonzero((middles > low) & (middles < (12.5 * (piece + 0.5) if piece < 7 else np.inf)))
        below = int(np.sum(middles < low)) if len(inside) == 0 else int(inside[0])
        above = below + len(inside)
        middle = middles[inside[0]] if len(inside) else np.inf
        table[:, piece % 16] = middle, below, above, LEVELS[below], LEVELS[above]
    return table.reshape(-1)


_PIECES = _pieces()


@compiled
def _near(v, middles, below, above):  # type: ignore[no-untyped-def]
    """Lane by lane what ``below`` or ``above`` hold for the level nearest to ``v``."""
    place = bits(smaller(larger(v * _PIECE, splat(_FIRST)), splat(_LAST)) + _MAGIC)
    return select(v < lookup(middles, place), lookup(below, place), lookup(above, place))


@compiled
def _level_codes(v, pieces, codes):  # type: ignore[no-untyped-def]
    for at in range(0, len(v), LANES):
        found = _near(load(v, at), load(pieces, 0), load(pieces, LANES), load(pieces, 2 * LANES))
        store_bytes(codes, at, to_int(found))


def level_codes(v: Floats) -> Bytes:
    """Code of the level nearest to every value of a flat array; at a middle the upper one.

    >>> level_codes(np.array([-200, 7, 112], np.float32))
    array([ 0,  9, 15], dtype=uint8)
    """
    room = np.zeros(-(-len(v) // LANES) * LANES, np.float32)
    room[: len(v)] = v
    codes = np.empty(len(room), np.uint8)
    _level_codes(room, _PIECES, codes)
    return codes[: len(v)]


@compiled
def _weigh(values, size, weights, columns, first, count, w):  # type: ignore[no-untyped-def]
    """``w`` = q sqrt(sigma2 + x²) under importance weights q, sigma2 = twice the mean of x² over the block; else x²."""
    if len(weights) == 0:
        for i in range(size):
            v = load(values, i * LANES)
            store(w, i * LANES, v * v)
        return
    starts = np.empty(LANES, np.int64)
    for lane in range(LANES):
        starts[lane] = min(first + lane, count - 1) * size % columns
    bring(weights, starts, size, w)
    total = splat(_0)
    for i in range(size):
        v = load(values, i * LANES)
        total += v * v
    sigma2 = total * np.float32(2 / size)
    for i in range(size):
        v = load(values, i * LANES)
        store(w, i * LANES, load(w, i * LANES) * sqrt(sigma2 + v * v))


@compiled
def _fit(values, w, at, pieces, sums):  # type: ignore[no-untyped-def]
    """The scale of 32 values. sums: room for 2 x 16 vectors."""
    most, peak = splat(_0), splat(_0)
    for i in range(32):
        v = load(values, at + i * LANES)
        more = absolute(v) > most
        most, peak = select(more, absolute(v), most), select(more, v, peak)
    middles = load(pieces, 0)
    below, above = load(pieces, 3 * LANES), load(pieces, 4 * LANES)
    for batch in range(0, _TRIALS, 4):
        # Trial 0 starts from peak / 127, trial t > 0 is (t - 8 - 127) / peak. Four at a time hide the latency of additions.
        i0 = _1 / (peak / _END) if batch == 0 else np.float32(batch - 135) / peak
        i1, i2, i3 = (
            np.float32(batch - 134) / peak,
            np.float32(batch - 133) / peak,
            np.float32(batch - 132) / peak,
        )
        a0, a1, a2, a3 = splat(_0), splat(_0), splat(_0), splat(_0)
        b0, b1, b2, b3 = splat(_0), splat(_0), splat(_0), splat(_0)
        for i in range(32):
            v, weight = load(values, at + i * LANES), load(w, at + i * LANES)
            q = _near(i0 * v, middles, below, above)
            wq = weight * q
            a0, b0 = a0 + wq * v, b0 + wq * q
            q = _near(i1 * v, middles, below, above)
            wq = weight * q
            a1, b1 = a1 + wq * v, b1 + wq * q
            q = _near(i2 * v, middles, below, above)
            wq = weight * q
            a2, b2 = a2 + wq * v, b2 + wq * q
            q = _near(i3 * v, middles, below, above)
            wq = weight * q
            a3, b3 = a3 + wq * v, b3 + wq * q
        to = batch * 2 * LANES
        store(sums, to, a0)
        store(sums, to + LANES, b0)
        store(sums, to + 2 * LANES, a1)
        store(sums, to + 3 * LANES, b1)
        store(sums, to + 4 * LANES, a2)
        store(sums, to + 5 * LANES, b2)
        store(sums, to + 6 * LANES, a3)
        store(sums, to + 7 * LANES, b3)
    a, b = load(sums, 0), load(sums, LANES)
    scale = select(b > _0, a / b, _0)
    best = scale * a
    for trial in range(1, _TRIALS):
        a, b = load(sums, 2 * trial * LANES), load(sums, (2 * trial + 1) * LANES)
        better = (b > _0) & (a * a > best * b)
        scale = select(better, a / b, scale)
        best = select(better, scale * a, best)
    return select(most < _TINY, _0, scale)


@compiled
def _pack(values, at, inverse, pieces, out, to):  # type: ignore[no-untyped-def]
    """The codes of 32 values under a scale's inverse: value i < 16 in a low nibble, i + 16 in the high one."""
    middles, below, above = load(pieces, 0), load(pieces, LANES), load(pieces, 2 * LANES)
    for i in range(16):
        low = _near(inverse * load(values, at + i * LANES), middles, below, above)
        high = _near(inverse * load(values, at + (i + 16) * LANES), middles, below, above)
        store_bytes(out, (to + i) * LANES, to_int(low + high * np.float32(16)))


@compiled
def _tile(x, weights, columns, size, first, count, pieces, out):  # type: ignore[no-untyped-def]
    nbytes = 136 if size == 256 else 18
    room = scratch(2 * size * LANES + (2 * _TRIALS + 8) * LANES)
    values, w = room[: size * LANES], room[size * LANES : 2 * size * LANES]
    scales, sums = room[2 * size * LANES : (2 * size + 8) * LANES], room[(2 * size + 8) * LANES :]
    packed = np.empty(nbytes * LANES, np.uint8)
    bring(x, starts_of(first, count, size), size, values)
    _weigh(values, size, weights, columns, first, count, w)
    for j in range(size // 32):
        store(scales, j * LANES, _fit(values, w, j * 32 * LANES, pieces, sums))
    if size == 32:
        d = load(scales, 0)
        _pack(values, 0, select(d != _0, _1 / d, _0), pieces, packed, 2)
    else:
        most, peak = splat(_0), splat(_0)
        for j in range(8):
            scale = load(scales, j * LANES)
            more = absolute(scale) > most
            most, peak = select(more, absolute(scale), most), select(more, scale, peak)
        d = (_0 - peak) / np.float32(32)
        d = select(peak == _0, np.float32(-0.0), d)
        inverse = select(d != _0, _1 / d, _0)
        low, high = splat_int(0), splat_int(0)
        for j in range(8):
            whole = smaller(larger(nearest(inverse * load(scales, j * LANES)), splat_int(-32)), splat_int(31))
            scale = d * to_float(whole)
            _pack(values, j * 32 * LANES, select(scale != _0, _1 / scale, _0), pieces, packed, 8 + 16 * j)
            low = low | (((whole + 32) & 15) << (4 * j))
            high = high | (((whole + 32) >> 4) << (2 * j))
        for k in range(2):
            store_bytes(packed, (2 + k) * LANES, high >> (8 * k))
        for k in range(4):
            store_bytes(packed, (4 + k) * LANES, low >> (8 * k))
    half = half_bits(d)
    store_bytes(packed, 0, half)
    store_bytes(packed, LANES, half >> 8)
    put(packed, nbytes, out, starts_of(first, count, nbytes))


@compiled
def _run(begin, end, x, weights, columns, size, pieces, out):  # type: ignore[no-untyped-def]
    for tile in range(begin, end):
        _tile(x, weights, columns, size, tile * LANES, len(x) // size, pieces, out)


def _quantizer(name: str) -> Quantize:
    block = TYPES[name]

    def run(x: Floats, weights: Floats | None) -> Bytes:
        out = np.empty((x.shape[0], block.row_bytes(x.shape[1])), np.uint8)
        given = np.empty(0, np.float32) if weights is None else writable(weights)
        tiles = -(-x.size // (block.values * LANES))
        over_tiles(_run, tiles, writable(x).reshape(-1), given, x.shape[1], block.values, _PIECES, out.reshape(-1))
        refuse_overflow(name, x, out.reshape(-1).view(np.uint16).reshape(-1, block.nbytes // 2)[:, :1])
        return out

    return run


@np.errstate(over="ignore", invalid="ignore")
def _from_iq4_nl(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 18)
    d = b[:, :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate((b[:, 2:] & 15, b[:, 2:] >> 4), axis=1)
    return (d * LEVELS[codes]).reshape(-1, columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq4_xs(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 136)
    d = b[:, :2].copy().view(np.float16).astype(np.float32)
    high = b[:, 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), axis=2).reshape(-1, 8)
    scale: Floats = d * ((low | high << 4).astype(np.float32) - np.float32(32))
    q = b[:, 8:].reshape(-1, 8, 16)
    levels: Floats = LEVELS[np.concatenate((q & 15, q >> 4), axis=2)]
    return (scale[..., None] * levels).reshape(-1, columns)


QUANTIZE: Mapping[str, Quantize] = {name: _quantizer(name) for name in ("IQ4_NL", "IQ4_XS")}
DECODE: Mapping[str, Decode] = {"IQ4_NL": _from_iq4_nl, "IQ4_XS": _from_iq4_xs}
