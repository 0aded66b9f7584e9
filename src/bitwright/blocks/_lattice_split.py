"""The search of IQ1_S and IQ1_M: a group's scale, the offset of its levels, and points of a lattice of -1, 0 and 1.

    w = s (point + delta),  delta = 1/8 or -1/8

Sorted values fall into those that get -1, 0 and 1, so that a group has (n + 1) (n + 2) / 2 ways to be split. Sums over sorted values say
how well each fits under either delta; the best split gives scale, delta and codes, and vectors off the lattice take the best point of
their list. IQ1_S has a delta for 32 values, IQ1_M for every eight; there 16 values, two vectors, are split together. Source: ggml
(``ggml_quantize_chunk``); sums in ggml's order, ``LANES`` super-blocks in step.
"""

from __future__ import annotations

import numpy as np

from bitwright.blocks._lattice_fit import weigh
from bitwright.blocks._lattice_points import OFF, replace
from bitwright.blocks._numba import bring, compiled, half_bits, scratch, starts_of
from bitwright.blocks._vector import (
    LANES,
    absolute,
    any_lane,
    larger,
    load,
    nearest,
    select,
    smaller,
    splat,
    splat_int,
    store,
    to_float,
)

__all__ = ["split_tiles"]

_0, _1, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_SIZE = 256 * LANES
_LEAST = np.float32(-3.4028234663852886e38)
# Levels under delta = 1/8 and -1/8.
_P0, _P1, _P2 = np.float32(-0.875), np.float32(0.125), np.float32(1.125)
_M0, _M1, _M2 = np.float32(-1.125), np.float32(-0.125), np.float32(0.875)
# Differences of their squares.
_P01, _P12 = np.float32(0.75), np.float32(-1.25)
_M01, _M12 = np.float32(1.25), np.float32(-0.75)


@compiled
def _sort(x, w, n, ranks, wx, ws, halves):  # type: ignore[no-untyped-def]
    """Ranks of a group's values, equal ones in their order, and running sums of w x and w over the sorted values.

    wx, ws: (halves, n + 1) vectors; with two halves each sums over the values of its own half.
    """
    for j in range(n):
        v = load(x, j * LANES)
        rank = splat_int(0)
        for k in range(j):
            rank += select(load(x, k * LANES) <= v, 1, splat_int(0))
        for k in range(j + 1, n):
            rank += select(load(x, k * LANES) < v, 1, splat_int(0))
        store(ranks, j * LANES, rank)
    size = (n + 1) * LANES
    for i in range(halves * size):
        wx[i] = _0
        ws[i] = _0
    for j in range(n):
        base = np.int64(j * halves // n) * size + LANES
        for lane in range(LANES):
            weight = w[j * LANES + lane]
            to = base + np.int64(ranks[j * LANES + lane]) * LANES + lane
            wx[to] = weight * x[j * LANES + lane]
            ws[to] = weight
    for h in range(halves):
        a, b = splat(_0), splat(_0)
        for j in range(n + 1):
            a += load(wx, h * size + j * LANES)
            b += load(ws, h * size + j * LANES)
            store(wx, h * size + j * LANES, a)
            store(ws, h * size + j * LANES, b)


@compiled
def _split_one(wx, ws, n, room):  # type: ignore[no-untyped-def]
    """Best split of a group under one delta: scale (any sign) and ``first | second << 8 | minus << 16``, -1 where none fits."""
    end_x, end_w = load(wx, n * LANES), load(ws, n * LANES)
    for i in range(n + 1):
        rest_x, rest_w = end_x - load(wx, i * LANES), end_w - load(ws, i * LANES)
        store(room, 4 * i * LANES, rest_x * _P2)
        store(room, (4 * i + 1) * LANES, rest_w * _P2 * _P2)
        store(room, (4 * i + 2) * LANES, rest_x * _M2)
        store(room, (4 * i + 3) * LANES, rest_w * _M2 * _M2)
    best, scale, found = splat(_LEAST), splat(_0), splat_int(-1)
    for i in range(n + 1):
        x1, w1 = load(wx, i * LANES), load(ws, i * LANES)
        xp, wp = x1 * _P0, w1 * _P0 * _P0
        xm, wm = x1 * _M0, w1 * _M0 * _M0
        for k in range(i, n + 1):
            x12, w12 = load(wx, k * LANES) - x1, load(ws, k * LANES) - w1
            a = xp + x12 * _P1 + load(room, 4 * k * LANES)
            b = wp + w12 * _P1 * _P1 + load(room, (4 * k + 1) * LANES)
            better = (b > _0) & (a * a > best * b)
            if any_lane(better):
                s = a / b
                scale, best = select(better, s, scale), select(better, s * a, best)
                found = select(better, np.int32(i | k << 8), found)
            a = xm + x12 * _M1 + load(room, (4 * k + 2) * LANES)
            b = wm + w12 * _M1 * _M1 + load(room, (4 * k + 3) * LANES)
            better = (b > _0) & (a * a > best * b)
            if any_lane(better):
                s = a / b
                scale, best = select(better, s, scale), select(better, s * a, best)
                found = select(better, np.int32(i | k << 8 | 1 << 16), found)
    return scale, found


@compiled
def _split_two(wx, ws, n):  # type: ignore[no-untyped-def]
    """Best split of two vectors with a delta each: scale and ``first | second << 8 | minus of the first << 17 | of the second << 16``."""
    size = (n + 1) * LANES
    t0, t1 = load(wx, n * LANES), load(wx, size + n * LANES)
    u0, u1 = load(ws, n * LANES), load(ws, size + n * LANES)
    t0p, t0m, t1p, t1m = t0 * _P2, t0 * _M2, t1 * _P2, t1 * _M2
    u0p, u0m, u1p, u1m = u0 * _P2 * _P2, u0 * _M2 * _M2, u1 * _P2 * _P2, u1 * _M2 * _M2
    best, scale, found = splat(_LEAST), splat(_0), splat_int(-1)
    for i in range(n + 1):
        x0, x1 = load(wx, i * LANES), load(wx, size + i * LANES)
        w0, w1 = load(ws, i * LANES), load(ws, size + i * LANES)
        q0p, q0m, q1p, q1m = u0p + w0 * _P01, u0m + w0 * _M01, u1p + w1 * _P01, u1m + w1 * _M01
        for k in range(i, n + 1):
            s0, s1 = x0 + load(wx, k * LANES), x1 + load(wx, size + k * LANES)
            v0, v1 = load(ws, k * LANES), load(ws, size + k * LANES)
            a0p, a0m, a1p, a1m = t0p - s0, t0m - s0, t1p - s1, t1m - s1
            b0p, b0m, b1p, b1m = q0p + v0 * _P12, q0m + v0 * _M12, q1p + v1 * _P12, q1m + v1 * _M12
            for c in range(4):
                a = (a0p if c < 2 else a0m) + (a1m if c & 1 else a1p)
                b = (b0p if c < 2 else b0m) + (b1m if c & 1 else b1p)
                better = (b > _0) & (a * a > best * b)
                if any_lane(better):
                    s = a / b
                    scale, best = select(better, s, scale), select(better, s * a, best)
                    found = select(better, np.int32(i | k << 8 | c << 16), found)
    return scale, found


@compiled
def _group(x, w, n, halves, dead, levels, place, lists, codes, minus, room, todo):  # type: ignore[no-untyped-def]
    """Scale of a group (0 where it has none), its codes and for every vector 1 where delta is negative."""
    vectors = n // 8
    ranks = todo[: n * LANES]
    wx, ws = room[: halves * (n + 1) * LANES], room[halves * (n + 1) * LANES : 2 * halves * (n + 1) * LANES]
    _sort(x, w, n, ranks, wx, ws, halves)
    rest = room[2 * halves * (n + 1) * LANES :]
    if halves == 1:
        scale, found = _split_one(wx, ws, n, rest)
        both = splat_int(1)
    else:
        scale, found = _split_two(wx, ws, n)
        both = splat_int(3)
    dead = dead | (found < splat_int(0))
    turned = scale < _0
    scale = select(turned, _0 - scale, scale)
    deltas = (found >> 16) & both
    deltas = select(turned, both - deltas, deltas)
    first, second = found & 255, (found >> 8) & 255
    off = dead ^ dead
    for k in range(vectors):
        code = splat_int(0)
        for j in range(8):
            rank = load(ranks, (8 * k + j) * LANES)
            level = select(rank < first, 0, select(rank < second, 1, splat_int(2)))
            code = code | (select(turned, 2 - level, level) << (2 * j))
        code = select(dead, 0, code)
        negative = deltas & 1 if halves == 1 or k == 1 else deltas >> 1
        negative = select(dead, 0, negative)
        store(minus, k * LANES, negative)
        # A search knows one delta: first the vectors under the positive one, then the others.
        store(codes, k * LANES, select(negative == 0, code, 0))
        store(codes, (vectors + k) * LANES, select(negative == 0, 0, code))
    scales = rest[:LANES]
    store(scales, 0, scale)
    size, shift = vectors * LANES, 5 if vectors == 2 else 6
    replace(codes, 0, size, shift, 8, x, w, scales, levels[: 2 * LANES], place, lists, todo)
    replace(codes[size : 2 * size], 0, size, shift, 8, x, w, scales, levels[2 * LANES :], place, lists, todo)
    a, b = splat(_0), splat(_0)
    for k in range(vectors):
        positive = load(minus, k * LANES) == 0
        code = select(positive, load(codes, k * LANES), load(codes, (vectors + k) * LANES))
        off = off | ((code & OFF) != 0)
        code = code & 0xFFFF
        store(codes, k * LANES, code)
        delta = select(positive, np.float32(-0.875), splat(np.float32(-1.125)))
        for j in range(8):
            q = to_float((code >> (2 * j)) & 3) + delta
            wq = load(w, (8 * k + j) * LANES) * q
            a += wq * load(x, (8 * k + j) * LANES)
            b += wq * q
    scale = select(off & (a > _0) & (b > _0), a / b, scale)
    return select(dead, _0, scale)


@compiled
def _tile(x, weights, per_row, first, count, n, tables, number, index, sizes, minus, half):  # type: ignore[no-untyped-def]
    levels, place, lists = tables
    vectors, groups, halves = n // 8, 256 // n, 1 if n == 32 else 2
    room = scratch(2 * _SIZE + (groups + 6 * 33 + 8) * LANES)
    values, w = room[:_SIZE], room[_SIZE : 2 * _SIZE]
    fitted, more = room[2 * _SIZE : 2 * _SIZE + groups * LANES], room[2 * _SIZE + groups * LANES :]
    whole = scratch((32 + 8 + 32 + 32) * LANES).view(np.int32)
    codes, deltas, todo = whole[: 40 * LANES], whole[40 * LANES : 72 * LANES], whole[72 * LANES :]
    bring(x, starts_of(first, count, 256), 256, values)
    weigh(values, weights, per_row, first, count, np.float32(2), _0, w)
    least = np.float32(1e-12) if n == 32 else np.float32(1e-7)
    largest = splat(_0)
    for j in range(groups):
        at = j * n * LANES
        most = splat(_0)
        for i in range(n):
            most = larger(most, absolute(load(values, at + i * LANES)))
        # The codes of group j end up in their place; those of group j + 1, not yet there, are room for the second search.
        group = codes[j * vectors * LANES :]
        scale = _group(
            values[at : at + n * LANES], w[at : at + n * LANES], n, halves, most < least, levels, place, lists, group,
            deltas[j * vectors * LANES :], more, todo,
        )  # fmt: skip
        largest = larger(largest, scale)
        store(fitted, j * LANES, scale)
    none = largest == _0
    d = largest / np.float32(15)
    inverse = _1 / d
    a, b = splat(_0), splat(_0)
    for j in range(groups):
        size = nearest(_HALF * (inverse * load(fitted, j * LANES) - _1))
        size = select(none, 0, smaller(larger(size, splat_int(0)), splat_int(7)))
        if halves == 2:
            factor = to_float((size << 1) | 1)
            for k in range(j * vectors, (j + 1) * vectors):
                code = load(codes, k * LANES)
                delta = select(load(deltas, k * LANES) == 0, np.float32(-0.875), splat(np.float32(-1.125)))
                for i in range(8):
                    q = (to_float((code >> (2 * i)) & 3) + delta) * factor
                    wq = load(w, (8 * k + i) * LANES) * q
                    a += wq * load(values, (8 * k + i) * LANES)
                    b += wq * q
        store(todo, j * LANES, size)
    if halves == 2:
        d = select(b > _0, a / b, d) * np.float32(1.1125)
    else:
        d = d * np.float32(1.125)
    for j in range(groups * vectors):
        store(deltas, j * LANES, select(none, 0, load(deltas, j * LANES)))
    store(todo, groups * LANES, half_bits(select(none, _0, d)))
    for lane in range(min(LANES, count - first)):
        block = first + lane
        half[block] = np.uint16(todo[groups * LANES + lane])
        for j in range(groups):
            sizes[block * groups + j] = np.uint8(todo[j * LANES + lane])
        for k in range(32):
            index[block * 32 + k] = number[np.uint32(codes[k * LANES + lane])]
            minus[block * 32 + k] = np.uint8(deltas[k * LANES + lane])


@compiled
def split_tiles(begin, end, x, weights, per_row, n, tables, number, index, sizes, minus, half):  # type: ignore[no-untyped-def]
    """Quantize super-blocks of flat ``x`` (tiles ``begin .. end`` of ``LANES`` each) to numbers, which the caller packs.

    n: 32 (IQ1_S) or 16 (IQ1_M); tables: (``level_tables`` of both deltas, place, lists). Out, a row each super-block: index (32),
    sizes (256 / n) in 0 .. 7, minus (32) 1 for a negative delta, half.
    """
    for tile in range(begin, end):
        _tile(x, weights, per_row, tile * LANES, len(x) // 256, n, tables, number, index, sizes, minus, half)
