"""MXFP4 and NVFP4: E2M1 numbers under a small scale, a power of two for 32 values or an E4M3 number for 16.

    MXFP4    w = 2^(e - 128) E[q]        e = floor(log2 max|x|) + 125
    NVFP4    w = u(s) / 2 E[q]           s the E4M3 number next to max|x| / 6

E holds twice the E2M1 numbers, so that halves of the scales stand in the formulas. Of equally near numbers the first in E is taken,
hence the one nearer to zero. Source: OCP Microscaling Formats (MX) 1.0; ggml, whose bytes these are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks._numba import bring, compiled, over_tiles, scratch, starts_of, writable
from bitwright.blocks._vector import (
    LANES,
    absolute,
    larger,
    load,
    select,
    splat,
    splat_int,
    store,
    store_bytes,
    transpose_bytes,
)
from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.blocks.types import TYPES

__all__ = ["DECODE", "NUMBERS", "QUANTIZE", "small_bits", "small_half"]

#: E: twice the E2M1 number of every code.
NUMBERS: Floats = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)
_MAGNITUDES = tuple(NUMBERS[:8])


@compiled
def _largest(begin, end, x, size, most):  # type: ignore[no-untyped-def]
    """Largest magnitudes of groups of ``size`` values."""
    count = len(most)
    values, found = scratch(32 * LANES), scratch(LANES)
    for tile in range(begin, end):
        first = tile * LANES
        bring(x, starts_of(first, count, size), size, values)
        largest = splat(np.float32(0))
        for i in range(size):
            largest = larger(largest, absolute(load(values, i * LANES)))
        store(found, 0, largest)
        most[first : min(first + LANES, count)] = found[: min(LANES, count - first)]


@compiled
def _code(v, d):  # type: ignore[no-untyped-def]
    """Code of the number times ``d`` nearest to ``v``. One of the other sign is never nearer than 0: magnitudes are enough."""
    m = absolute(v)
    least, code = m, splat_int(0)
    for k in range(1, 8):
        off = absolute(d * _MAGNITUDES[k] - m)
        less = off < least
        least, code = select(less, off, least), select(less, k, code)
    return code | select((v < np.float32(0)) & (code > splat_int(0)), 8, splat_int(0))


@compiled
def _codes(begin, end, x, scale, size, groups, out):  # type: ignore[no-untyped-def]
    """Pack the codes of blocks of ``groups`` groups of ``size`` values: a group's first half in low nibbles, its second in high ones.

    ``out``: bytes of blocks that begin with ``groups`` bytes of scales.
    """
    values_of, half = size * groups, size // 2
    count, nbytes = len(x) // values_of, groups + half * groups
    values, d = scratch(64 * LANES), scratch(LANES)
    packed = np.empty(32 * LANES, np.uint8)
    for tile in range(begin, end):
        first = tile * LANES
        bring(x, starts_of(first, count, values_of), values_of, values)
        for g in range(groups):
            for lane in range(LANES):
                d[lane] = scale[min(first + lane, count - 1) * groups + g]
            factor = load(d, 0)
            for i in range(half):
                at = (g * size + i) * LANES
                low, high = _code(load(values, at), factor), _code(load(values, at + half * LANES), factor)
                store_bytes(packed, (g * half + i) * LANES, low | (high << 4))
        starts = starts_of(first, count, nbytes)
        for at in range(0, half * groups, LANES):
            transpose_bytes(packed, at * LANES, out, starts, groups + at)


def _most(x: Floats, size: int) -> Floats:
    most = np.empty(x.size // size, np.float32)
    over_tiles(_largest, -(-len(most) // LANES), writable(x).reshape(-1), size, most)
    return most


def _blocks(name: str, x: Floats, bits: NDArray[np.uint8], scale: Floats) -> Bytes:
    """Blocks of flat ``bits``, the scales' bytes, and codes under half scales."""
    block, groups = TYPES[name], TYPES[name].values * bits.size // x.size
    out = np.empty((x.shape[0], block.row_bytes(x.shape[1])), np.uint8)
    out.reshape(-1, block.nbytes)[:, :groups] = bits.reshape(-1, groups)
    tiles = -(-x.size // (block.values * LANES))
    over_tiles(_codes, tiles, writable(x).reshape(-1), scale, block.values // groups, groups, out.reshape(-1))
    return out


def _power(e: NDArray[np.uint8]) -> Floats:
    """2^(e - 128)."""
    word = e.astype(np.uint32)
    return np.where(word < 2, np.uint32(0x00200000) << (word & 1), (word - 1) << 23).astype(np.uint32).view(np.float32)


def _to_mxfp4(x: Floats, weights: Floats | None) -> Bytes:
    del weights
    most = _most(x, 32)
    # In float32, as ggml: just below a power of two a logarithm may round up to a whole number.
    with np.errstate(divide="ignore"):
        whole = np.floor(np.log2(most.astype(np.float64)).astype(np.float32))
    e = np.where(most > 0, whole + np.float32(125), 0).astype(np.int32).astype(np.uint8)
    return _blocks("MXFP4", x, e, _power(e))


@np.errstate(over="ignore", invalid="ignore")
def _from_mxfp4(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 17)
    codes = np.concatenate((b[:, 1:] & 15, b[:, 1:] >> 4), axis=1)
    return (_power(b[:, :1]) * NUMBERS[codes]).reshape(-1, columns)


def small_bits(x: Floats) -> NDArray[np.uint8]:
    """Unsigned E4M3 bits of non-negative numbers, half a step rounded up; from 256 on the largest, 448."""
    x = np.minimum(x, np.float32(448))
    # Three bits of mantissa remain, a carry goes into the exponent, whose bias becomes 7.
    normal = (x.view(np.uint32).astype(np.int64) + (1 << 19) >> 20) - (120 << 3)
    normal = np.where(normal >= 15 << 3, 0x7E, normal)
    subnormal = np.minimum((x * np.float32(512) + np.float32(0.5)).astype(np.int64), 7)
    return np.where(x < np.float32(2.0**-6), subnormal, normal).astype(np.uint8)


def small_half(bits: NDArray[np.uint8]) -> Floats:
    """Half of an unsigned E4M3 number; 127, which would be NaN, is 0. The sign bit is not looked at."""
    number = bits.astype(np.int32) & 127
    exponent, mantissa = number >> 3, number & 7
    value = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 11), np.ldexp(mantissa, -10)).astype(np.float32)
    return np.where(bits == 127, np.float32(0), value)


def _to_nvfp4(x: Floats, weights: Floats | None) -> Bytes:
    del weights
    bits = small_bits(_most(x, 16) / np.float32(6))
    return _blocks("NVFP4", x, bits, small_half(bits))


def _from_nvfp4(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 36)
    packed = b[:, 4:].reshape(-1, 4, 8)
    codes = np.concatenate((packed & 15, packed >> 4), axis=2)
    return (small_half(b[:, :4])[..., None] * NUMBERS[codes]).reshape(-1, columns)


QUANTIZE: Mapping[str, Quantize] = {"MXFP4": _to_mxfp4, "NVFP4": _to_nvfp4}
DECODE: Mapping[str, Decode] = {"MXFP4": _from_mxfp4, "NVFP4": _from_nvfp4}
