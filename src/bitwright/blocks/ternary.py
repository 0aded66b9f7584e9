"""TQ1_0 and TQ2_0: a block of 256 values -d, 0 and d.

    w = d (t - 1),  t = 0, 1, 2

d is the largest magnitude, t - 1 = x / d rounded half away from zero. TQ2_0 stores two bits a digit. TQ1_0 stores five digits a byte: v =
sum of t_n 3^(4 - n) as ceil(256 v / 243), from which digit n is had by multiplying with 3^n modulo 256, then with 3, and taking what
carries over. Source: ggml, whose bytes these are; ``LANES`` blocks in step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitwright.blocks._check import refuse_overflow
from bitwright.blocks._numba import bring, compiled, half_bits, over_tiles, put, scratch, starts_of, writable
from bitwright.blocks._vector import (
    LANES,
    absolute,
    larger,
    load,
    select,
    splat,
    splat_int,
    store_bytes,
    to_float,
    to_int,
)
from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.blocks.types import TYPES

__all__ = ["DECODE", "QUANTIZE"]

_0, _1, _HALF = np.float32(0), np.float32(1), np.float32(0.5)


@compiled
def _digit(x, element, inverse):  # type: ignore[no-untyped-def]
    """0, 1 or 2. Under the infinite inverse of a subnormal d every digit is 1, as converting infinity or NaN in ggml gives."""
    v = load(x, element * LANES) * inverse
    found = 1 + select(v >= _HALF, 1, splat_int(0)) - select(v <= -_HALF, 1, splat_int(0))
    return select(inverse > np.float32(3.4028234663852886e38), 1, found)


@compiled
def _five(x, element, step, digits, inverse):  # type: ignore[no-untyped-def]
    """The byte of five digits, the first the highest; those from ``digits`` on are 0."""
    v = splat_int(0)
    for n in range(5):
        v = v + v + v
        if n < digits:
            v = v + _digit(x, element + n * step, inverse)
    # Exact: a quotient that is not whole is at least 1/243 away from the next whole number.
    return to_int((to_float(v) * np.float32(256) + np.float32(242)) / np.float32(243))


@compiled
def _run(begin, end, x, out, two):  # type: ignore[no-untyped-def]
    count = len(x) // 256
    nbytes = 66 if two else 54
    values = scratch(256 * LANES)
    packed = np.empty(66 * LANES, np.uint8)
    for tile in range(begin, end):
        bring(x, starts_of(tile * LANES, count, 256), 256, values)
        d = splat(_0)
        for i in range(256):
            d = larger(d, absolute(load(values, i * LANES)))
        inverse = select(d > _0, _1 / d, _0)
        if two:
            for h in range(2):
                for m in range(32):
                    v = splat_int(0)
                    for n in range(4):
                        v = v | (_digit(values, 128 * h + 32 * n + m, inverse) << (2 * n))
                    store_bytes(packed, (32 * h + m) * LANES, v)
        else:
            for m in range(32):
                store_bytes(packed, m * LANES, _five(values, m, 32, 5, inverse))
            for m in range(16):
                store_bytes(packed, (32 + m) * LANES, _five(values, 160 + m, 16, 5, inverse))
            for m in range(4):
                store_bytes(packed, (48 + m) * LANES, _five(values, 240 + m, 4, 4, inverse))
        half = half_bits(d)
        store_bytes(packed, (nbytes - 2) * LANES, half)
        store_bytes(packed, (nbytes - 1) * LANES, half >> 8)
        put(packed, nbytes, out, starts_of(tile * LANES, count, nbytes))


def _quantizer(name: str) -> Quantize:
    block = TYPES[name]

    def run(x: Floats, weights: Floats | None) -> Bytes:
        del weights
        out = np.empty((x.shape[0], block.row_bytes(x.shape[1])), np.uint8)
        over_tiles(_run, -(-x.size // (256 * LANES)), writable(x).reshape(-1), out.reshape(-1), name == "TQ2_0")
        refuse_overflow(name, x, out.reshape(-1).view(np.uint16).reshape(-1, block.nbytes // 2)[:, -1:])
        return out

    return run


_POWERS = np.array((1, 3, 9, 27, 81), np.uint8)


@np.errstate(over="ignore", invalid="ignore")
def _from_tq1_0(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 54)
    parts = (
        b[:, None, :32] * _POWERS[:, None],
        b[:, None, 32:48] * _POWERS[:, None],
        b[:, None, 48:52] * _POWERS[:4, None],
    )
    shifted = np.concatenate([part.reshape(len(b), -1) for part in parts], axis=1).astype(np.uint16)
    digits = (shifted * np.uint16(3) >> 8).astype(np.float32) - np.float32(1)
    return (b[:, 52:].copy().view(np.float16).astype(np.float32) * digits).reshape(-1, columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_tq2_0(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 66)
    digits = b[:, :64].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    d = b[:, 64:].copy().view(np.float16).astype(np.float32)
    return (d * (digits.reshape(-1, 256).astype(np.float32) - np.float32(1))).reshape(-1, columns)


QUANTIZE: Mapping[str, Quantize] = {name: _quantizer(name) for name in ("TQ1_0", "TQ2_0")}
DECODE: Mapping[str, Decode] = {"TQ1_0": _from_tq1_0, "TQ2_0": _from_tq2_0}
