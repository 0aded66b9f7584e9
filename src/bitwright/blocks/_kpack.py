"""Lanes of a K-quant super-block in and out: values and weights brought into lanes, codes and scales packed into ggml's bytes.

Everything is flat and lane-wise: item i of the super-block in lane k lies at ``[i * LANES + k]``. Layouts: docs of ggml's block structs.
"""

from __future__ import annotations

import numpy as np

from bitwright.blocks._numba import bring, compiled, half_bits, half_value
from bitwright.blocks._vector import LANES, load, load_bytes, select, splat, sqrt, store, store_bytes

__all__ = ["importance", "mean_size", "pack_half", "pack_low_nibbles", "pack_pairs", "pack_two_bits", "pair", "total"]

_0 = np.float32(0)


@compiled
def importance(x, weights, per_row, first, count, factor, w):  # type: ignore[no-untyped-def]
    """``w`` = q sqrt(sigma2 + x²) for a whole super-block, q being its columns' weights, sigma2 = factor * sum of x² / 256."""
    starts = np.empty(LANES, np.int64)
    for lane in range(LANES):
        starts[lane] = min(first + lane, count - 1) % per_row * 256
    bring(weights, starts, 256, w)
    total = splat(_0)
    for i in range(256):
        v = load(x, i * LANES)
        total += v * v
    sigma2 = factor * total / np.float32(256)
    for i in range(256):
        v = load(x, i * LANES)
        store(w, i * LANES, load(w, i * LANES) * sqrt(sigma2 + v * v))


@compiled
def mean_size(x, at, w):  # type: ignore[no-untyped-def]
    """``w[at ..]`` = root mean square of a group of 32, plus |x|."""
    total = splat(_0)
    for i in range(32):
        v = load(x, at + i * LANES)
        total += v * v
    mean = sqrt(total / np.float32(32))
    for i in range(32):
        v = load(x, at + i * LANES)
        store(w, at + i * LANES, mean + select(v < _0, _0 - v, v))


@compiled
def total(w, at, n):  # type: ignore[no-untyped-def]
    """The sum of a group."""
    found = splat(_0)
    for i in range(n):
        found += load(w, at + i * LANES)
    return found


@compiled
def pack_half(value, out, at):  # type: ignore[no-untyped-def]
    """Two bytes of float16 at byte ``at``; returns the rounded value."""
    h = half_bits(value)
    store_bytes(out, at * LANES, h)
    store_bytes(out, (at + 1) * LANES, h >> 8)
    return half_value(h)


@compiled
def pack_pairs(scales, mins, out, at):  # type: ignore[no-untyped-def]
    """Eight six-bit scales and mins (int32) into the 12 bytes of Q4_K and Q5_K at byte ``at``."""
    for j in range(4):
        upper = load(scales, (j + 4) * LANES)
        store_bytes(out, (at + j) * LANES, load(scales, j * LANES) | ((upper >> 4) << 6))
        upper = load(mins, (j + 4) * LANES)
        store_bytes(out, (at + j + 4) * LANES, load(mins, j * LANES) | ((upper >> 4) << 6))
    for j in range(4, 8):
        both = (load(scales, j * LANES) & 15) | ((load(mins, j * LANES) & 15) << 4)
        store_bytes(out, (at + j + 4) * LANES, both)


@compiled
def pair(out, at, j):  # type: ignore[no-untyped-def]
    """Scale and min number ``j`` from those 12 bytes."""
    if j < 4:
        return load_bytes(out, (at + j) * LANES) & 63, load_bytes(out, (at + j + 4) * LANES) & 63
    both = load_bytes(out, (at + j + 4) * LANES)
    high = load_bytes(out, (at + j - 4) * LANES) >> 6, load_bytes(out, (at + j) * LANES) >> 6
    return (both & 15) | (high[0] << 4), (both >> 4) | (high[1] << 4)


@compiled
def pack_two_bits(codes, out, at):  # type: ignore[no-untyped-def]
    """The low two bits of 256 codes (bytes) into 64 bytes: byte 32 h + l holds elements 128 h + l + 32 k at bits 2 k."""
    for h in range(2):
        for l in range(32):  # noqa: E741
            e = 128 * h + l
            low = (load_bytes(codes, e * LANES) & 3) | ((load_bytes(codes, (e + 32) * LANES) & 3) << 2)
            high = (load_bytes(codes, (e + 64) * LANES) & 3) | ((load_bytes(codes, (e + 96) * LANES) & 3) << 2)
            store_bytes(out, (at + 32 * h + l) * LANES, low | (high << 4))


@compiled
def pack_low_nibbles(codes, out, at):  # type: ignore[no-untyped-def]
    """The low four bits of 256 codes into 128 bytes: byte 32 p + l holds elements 64 p + l (low) and 64 p + 32 + l (high)."""
    for p in range(4):
        for l in range(32):  # noqa: E741
            e = 64 * p + l
            low = load_bytes(codes, e * LANES) & 15
            high = load_bytes(codes, (e + 32) * LANES) & 15
            store_bytes(out, (at + 32 * p + l) * LANES, low | (high << 4))
