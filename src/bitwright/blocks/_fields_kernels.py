"""The machine code behind ``fields``: every function takes blocks ``begin .. end`` of a flat array apart or puts them together.

Vectors run along a block here. Arguments: blocks, bytes per block, two float16 fields as uint16, two byte fields, codes.
"""

# All take the same arguments, so that one loop runs them all.
# ruff: noqa: ARG001

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitwright.blocks._numba import compiled
from bitwright.blocks._vector import LANES, lane_bits, lane_numbers, load_bytes, splat_int, store_bytes

__all__ = ["KERNELS"]


@compiled
def _get(b, at):  # type: ignore[no-untyped-def]
    return np.uint16(np.int64(b[at]) | (np.int64(b[at + 1]) << 8))


@compiled
def _set(b, at, half):  # type: ignore[no-untyped-def]
    b[at] = np.uint8(half & 0xFF)
    b[at + 1] = np.uint8(half >> 8)


# --- blocks of 32 ---------------------------------------------------------------------------------------------------------------


@compiled
def _split_32(begin, end, b, nbytes, d, m, scales, mins, codes):  # type: ignore[no-untyped-def]
    offset, five = nbytes in (20, 24), nbytes in (22, 24)
    for block in range(begin, end):
        at, to = block * nbytes, block * 32
        d[block] = _get(b, at)
        if offset:
            m[block] = _get(b, at + 2)
        at += 4 if offset else 2
        word = np.int32(0)
        if five:
            for k in range(4):
                word |= np.int32(b[at + k]) << np.int32(8 * k)
            at += 4
        for half in range(2):
            q = (load_bytes(b, at) >> (4 * half)) & 15
            if five:
                q = q | (((splat_int(word) >> (lane_numbers() + 16 * half)) & 1) << 4)
            store_bytes(codes, to + half * LANES, q)


@compiled
def _join_32(begin, end, b, nbytes, d, m, scales, mins, codes):  # type: ignore[no-untyped-def]
    offset, five = nbytes in (20, 24), nbytes in (22, 24)
    for block in range(begin, end):
        at, to = block * nbytes, block * 32
        _set(b, at, d[block])
        if offset:
            _set(b, at + 2, m[block])
        at += 4 if offset else 2
        low, high = load_bytes(codes, to), load_bytes(codes, to + LANES)
        if five:
            word = lane_bits((low & 16) > 0) | (lane_bits((high & 16) > 0) << 16)
            for k in range(4):
                b[at + k] = np.uint8((word >> (8 * k)) & 0xFF)
            at += 4
        store_bytes(b, at, (low & 15) | ((high & 15) << 4))


@compiled
def _split_8(begin, end, b, nbytes, d, m, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        d[block] = _get(b, block * nbytes)
        for e in range(0, 32, LANES):
            store_bytes(codes, block * 32 + e, load_bytes(b, block * nbytes + 2 + e) ^ 0x80)


@compiled
def _join_8(begin, end, b, nbytes, d, m, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        _set(b, block * nbytes, d[block])
        for e in range(0, 32, LANES):
            store_bytes(b, block * nbytes + 2 + e, load_bytes(codes, block * 32 + e) ^ 0x80)


# --- Q2_K, Q3_K -----------------------------------------------------------------------------------------------------------------


@compiled
def _split_two_bits(b, at, codes, to):  # type: ignore[no-untyped-def]
    for h in range(2):
        for l in range(0, 32, LANES):  # noqa: E741
            four = load_bytes(b, at + 32 * h + l)
            for k in range(4):
                store_bytes(codes, to + 128 * h + 32 * k + l, (four >> (2 * k)) & 3)


@compiled
def _join_two_bits(b, at, codes, to):  # type: ignore[no-untyped-def]
    for h in range(2):
        for l in range(0, 32, LANES):  # noqa: E741
            four = splat_int(0)
            for k in range(4):
                four = four | ((load_bytes(codes, to + 128 * h + 32 * k + l) & 3) << (2 * k))
            store_bytes(b, at + 32 * h + l, four)


@compiled
def _split_2(begin, end, b, nbytes, d, dmin, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at = block * nbytes
        d[block], dmin[block] = _get(b, at + 80), _get(b, at + 82)
        both = load_bytes(b, at)
        store_bytes(scales, block * 16, both & 15)
        store_bytes(mins, block * 16, both >> 4)
        _split_two_bits(b, at + 16, codes, block * 256)


@compiled
def _join_2(begin, end, b, nbytes, d, dmin, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at = block * nbytes
        store_bytes(b, at, (load_bytes(scales, block * 16) & 15) | (load_bytes(mins, block * 16) << 4))
        _join_two_bits(b, at + 16, codes, block * 256)
        _set(b, at + 80, d[block])
        _set(b, at + 82, dmin[block])


@compiled
def _split_3(begin, end, b, nbytes, d, none, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d[block] = _get(b, at + 108)
        for j in range(16):
            low = (np.int64(b[at + 96 + (j & 7)]) >> (4 * (j >> 3))) & 15
            high = (np.int64(b[at + 104 + (j & 3)]) >> (2 * (j >> 2))) & 3
            scales[block * 16 + j] = np.uint8(low | (high << 4))
        _split_two_bits(b, at + 32, codes, to)
        for e in range(0, 256, LANES):
            high = (load_bytes(b, at + (e & 31)) >> (e >> 5)) & 1
            store_bytes(codes, to + e, load_bytes(codes, to + e) | (high << 2))


@compiled
def _join_3(begin, end, b, nbytes, d, none, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        for k in range(96, 108):
            b[at + k] = 0
        for j in range(16):
            whole = np.int64(scales[block * 16 + j]) & 63
            place = at + 96 + (j & 7)
            b[place] = np.uint8(b[place] | ((whole & 15) << (4 if j >= 8 else 0)))
            place = at + 104 + (j & 3)
            b[place] = np.uint8(b[place] | ((whole >> 4) << (2 * (j >> 2))))
        for l in range(0, 32, LANES):  # noqa: E741
            high = splat_int(0)
            for j in range(8):
                high = high | (((load_bytes(codes, to + 32 * j + l) >> 2) & 1) << j)
            store_bytes(b, at + l, high)
        _join_two_bits(b, at + 32, codes, to)
        _set(b, at + 108, d[block])


# --- Q4_K, Q5_K -----------------------------------------------------------------------------------------------------------------


@compiled
def _split_45(begin, end, b, nbytes, d, dmin, scales, mins, codes):  # type: ignore[no-untyped-def]
    five = nbytes == 176
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d[block], dmin[block] = _get(b, at), _get(b, at + 2)
        s = at + 4
        for j in range(4):
            scales[block * 8 + j] = b[s + j] & 63
            mins[block * 8 + j] = b[s + j + 4] & 63
            scales[block * 8 + j + 4] = (b[s + j + 8] & 15) | ((b[s + j] >> 6) << 4)
            mins[block * 8 + j + 4] = (b[s + j + 8] >> 4) | ((b[s + j + 4] >> 6) << 4)
        nibbles = at + (48 if five else 16)
        for j in range(8):
            for l in range(0, 32, LANES):  # noqa: E741
                q = (load_bytes(b, nibbles + 32 * (j >> 1) + l) >> (4 * (j & 1))) & 15
                if five:
                    q = q | (((load_bytes(b, at + 16 + l) >> j) & 1) << 4)
                store_bytes(codes, to + 32 * j + l, q)


@compiled
def _join_45(begin, end, b, nbytes, d, dmin, scales, mins, codes):  # type: ignore[no-untyped-def]
    five = nbytes == 176
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        _set(b, at, d[block])
        _set(b, at + 2, dmin[block])
        s = at + 4
        for j in range(4):
            upper_scale, upper_min = scales[block * 8 + j + 4], mins[block * 8 + j + 4]
            b[s + j] = np.uint8((scales[block * 8 + j] & 63) | ((upper_scale >> 4) << 6))
            b[s + j + 4] = np.uint8((mins[block * 8 + j] & 63) | ((upper_min >> 4) << 6))
            b[s + j + 8] = np.uint8((upper_scale & 15) | ((upper_min & 15) << 4))
        nibbles = at + (48 if five else 16)
        for l in range(0, 32, LANES):  # noqa: E741
            high = splat_int(0)
            for p in range(4):
                low, up = load_bytes(codes, to + 64 * p + l), load_bytes(codes, to + 64 * p + 32 + l)
                store_bytes(b, nibbles + 32 * p + l, (low & 15) | ((up & 15) << 4))
                high = high | (((low >> 4) & 1) << (2 * p)) | (((up >> 4) & 1) << (2 * p + 1))
            if five:
                store_bytes(b, at + 16 + l, high)


# --- Q6_K -----------------------------------------------------------------------------------------------------------------------


@compiled
def _split_6(begin, end, b, nbytes, d, none, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d[block] = _get(b, at + 208)
        store_bytes(scales, block * 16, load_bytes(b, at + 192))
        for e in range(0, 256, LANES):
            h, k, l = e >> 7, (e & 127) >> 5, e & 31  # noqa: E741
            low = (load_bytes(b, at + 64 * h + 32 * (k & 1) + l) >> (4 * (k >> 1))) & 15
            high = (load_bytes(b, at + 128 + 32 * h + l) >> (2 * k)) & 3
            store_bytes(codes, to + e, low | (high << 4))


@compiled
def _join_6(begin, end, b, nbytes, d, none, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at = block * nbytes
        for h in range(2):
            for l in range(0, 32, LANES):  # noqa: E741
                e = block * 256 + 128 * h + l
                q0, q1 = load_bytes(codes, e), load_bytes(codes, e + 32)
                q2, q3 = load_bytes(codes, e + 64), load_bytes(codes, e + 96)
                store_bytes(b, at + 64 * h + l, (q0 & 15) | ((q2 & 15) << 4))
                store_bytes(b, at + 64 * h + 32 + l, (q1 & 15) | ((q3 & 15) << 4))
                high = ((q0 >> 4) & 3) | (((q1 >> 4) & 3) << 2) | (((q2 >> 4) & 3) << 4) | (((q3 >> 4) & 3) << 6)
                store_bytes(b, at + 128 + 32 * h + l, high)
        store_bytes(b, at + 192, load_bytes(scales, block * 16))
        _set(b, at + 208, d[block])


# --- IQ4_XS ---------------------------------------------------------------------------------------------------------------------


@compiled
def _split_xs(begin, end, b, nbytes, d, none, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        d[block] = _get(b, at)
        upper = np.int64(_get(b, at + 2))
        for j in range(8):
            low = (b[at + 4 + (j >> 1)] >> (4 * (j & 1))) & 15
            scales[block * 8 + j] = np.uint8(low | (((upper >> (2 * j)) & 3) << 4))
            pair = load_bytes(b, at + 8 + 16 * j)
            store_bytes(codes, to + 32 * j, pair & 15)
            store_bytes(codes, to + 32 * j + LANES, pair >> 4)


@compiled
def _join_xs(begin, end, b, nbytes, d, none, scales, mins, codes):  # type: ignore[no-untyped-def]
    for block in range(begin, end):
        at, to = block * nbytes, block * 256
        _set(b, at, d[block])
        upper = np.int64(0)
        for j in range(4):
            first, second = scales[block * 8 + 2 * j] & 63, scales[block * 8 + 2 * j + 1] & 63
            b[at + 4 + j] = np.uint8((first & 15) | ((second & 15) << 4))
            upper |= np.int64((first >> 4) | ((second >> 4) << 2)) << (4 * j)
        _set(b, at + 2, upper)
        for j in range(8):
            low, high = load_bytes(codes, to + 32 * j), load_bytes(codes, to + 32 * j + LANES)
            store_bytes(b, at + 8 + 16 * j, (low & 15) | ((high & 15) << 4))


#: Type -> (take apart, put together).
KERNELS: Mapping[str, tuple[Any, Any]] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"), (_split_32, _join_32)),
    **dict.fromkeys(("Q4_K", "Q5_K"), (_split_45, _join_45)),
    "Q8_0": (_split_8, _join_8),
    "Q2_K": (_split_2, _join_2),
    "Q3_K": (_split_3, _join_3),
    "Q6_K": (_split_6, _join_6),
    "IQ4_XS": (_split_xs, _join_xs),
}
