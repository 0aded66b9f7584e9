"""The search that IQ2 and IQ3 types share: for every group of 16 or 32 values a scale and points of a lattice.

    w = s (2 l + 1) / 2 * sign,  l the level numbers of a point

A group tries a range of scales. Under each its magnitudes are rounded to level numbers; vectors that come to lie off the lattice take
the nearest point of their list, nearest in the weighted square; the scale that would fit these codes best is kept if it is better than
what went before. Afterwards off-lattice vectors are chosen once more under the best scale. Source: ggml (``ggml_quantize_chunk``).

``LANES`` super-blocks go in step, and sums have ggml's order. All trials of a group are rounded first, then all codes off the lattice
replaced, then all trials weighed: what is found for one trial changes nothing for another.
"""

from __future__ import annotations

import numpy as np

from bitwright.blocks._lattice_points import OFF, replace
from bitwright.blocks._numba import bring, compiled, half_bits, scratch, starts_of
from bitwright.blocks._search import positive
from bitwright.blocks._vector import (
    LANES,
    any_lane,
    larger,
    load,
    nearest,
    select,
    smaller,
    splat,
    splat_int,
    sqrt,
    store,
    to_float,
)

__all__ = ["AGAIN_ALL", "AGAIN_ANY", "AGAIN_OFF", "fit_tiles", "weigh"]

_0, _1, _2, _HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
_SIZE = 256 * LANES

#: Which vectors are chosen once more under the best scale: those off the lattice; all of a group that has one; all.
AGAIN_OFF, AGAIN_ANY, AGAIN_ALL = 0, 1, 2


@compiled
def weigh(values, weights, per_row, first, count, factor, flat, w):  # type: ignore[no-untyped-def]
    """``w`` = q sqrt(sigma2 + x²) under importance weights q; without them flat * sigma2 + x². sigma2 = factor * mean of x²."""
    total = splat(_0)
    for i in range(256):
        v = load(values, i * LANES)
        total += v * v
    sigma2 = factor * total / np.float32(256)
    if len(weights) > 0:
        starts = np.empty(LANES, np.int64)
        for lane in range(LANES):
            starts[lane] = min(first + lane, count - 1) % per_row * 256
        bring(weights, starts, 256, w)
        for i in range(256):
            v = load(values, i * LANES)
            store(w, i * LANES, load(w, i * LANES) * sqrt(sigma2 + v * v))
    else:
        base = select(splat(flat) > _0, flat * sigma2, _0)
        for i in range(256):
            v = load(values, i * LANES)
            store(w, i * LANES, base + v * v)


@compiled
def _magnitudes(values, w, at, parity, x):  # type: ignore[no-untyped-def]
    """Magnitudes of eight values and their sign bits. With ``parity`` the number of signs is made even: the least important value
    keeps a negative magnitude.
    """
    signs = splat_int(0)
    for i in range(8):
        v = load(values, at + i * LANES)
        negative = v < _0
        store(x, i * LANES, select(negative, _0 - v, v))
        signs = signs | select(negative, 1 << i, splat_int(0))
    if parity:
        odd = signs ^ (signs >> 4)
        odd = odd ^ (odd >> 2)
        odd = (odd ^ (odd >> 1)) & 1
        least, which = splat(_0), splat_int(0)
        for i in range(8):
            v = load(values, at + i * LANES)
            size = load(w, at + i * LANES) * v * v
            if i == 0:
                least = size
            less = size < least
            least, which = select(less, size, least), select(less, i, which)
        for i in range(8):
            flip = (odd == 1) & (which == i)
            m = load(x, i * LANES)
            store(x, i * LANES, select(flip, _0 - m, m))
            signs = signs ^ select(flip, 1 << i, splat_int(0))
        signs = signs & 127
    return signs


@compiled
def _round(x, n, dims, width, inverse, use, codes, at):  # type: ignore[no-untyped-def]
    """Codes of a group's vectors under a scale's inverse; 0 in lanes not in ``use``."""
    top = splat_int((1 << width) - 1 if width == 3 else 2)
    for k in range(n // dims):
        code = splat_int(0)
        for i in range(dims):
            level = nearest(_HALF * (inverse * load(x, (k * dims + i) * LANES) - _1))
            level = smaller(larger(level, splat_int(0)), top)
            code = code | (level << np.int32(width * i))
        store(codes, at + k * LANES, select(use, code, 0))


@compiled
def _sums(codes, at, wx, w, n, dims, width):  # type: ignore[no-untyped-def]
    """Sum of w x q and of w q² of a group, q = 2 l + 1."""
    a, b = splat(_0), splat(_0)
    mask = np.int32((1 << width) - 1)
    for k in range(n // dims):
        code = load(codes, at + k * LANES)
        for i in range(dims):
            q = to_float((((code >> np.int32(width * i)) & mask) << 1) | 1)
            e = (k * dims + i) * LANES
            a += load(wx, e) * q
            b += load(w, e) * q * q
    return a, b


@compiled
def _fit(x, w, wx, root, n, dims, width, trials, least, start, again, levels, place, lists, codes, scales, todo):  # type: ignore[no-untyped-def]
    """Scale (0 for a dead group) of a group of magnitudes; ``codes[:n // dims * LANES]`` its codes."""
    vectors = n // dims
    per_trial = vectors * LANES
    shift = 5 if vectors == 2 else 6 if vectors == 4 else 7
    last = len(trials)
    most = load(x, 0)
    for i in range(1, n):
        v = load(x, i * LANES)
        most = select(most > v, most, v)
    dead = most < least
    if start:
        scale = positive(x, w, n, np.float32(4), todo)
        most = scale * np.float32(3)
        dead = dead | ~(most > _0)
    else:
        scale = most / np.float32(15 if width == 3 else 5)
    most = select(dead, _1, most)
    for t in range(last):
        inverse = trials[t] / most
        store(scales, t * LANES, _1 / inverse)
        _round(x, n, dims, width, inverse, ~dead, codes, t * per_trial)
    replace(codes, 0, last * per_trial, shift, dims, x, root, scales, levels, place, lists, todo)
    best = splat(_0)
    kept = last * per_trial
    for k in range(vectors):
        store(codes, kept + k * LANES, splat_int(OFF if again == AGAIN_ANY else 0))
    for t in range(last):
        a, b = _sums(codes, t * per_trial, wx, w, n, dims, width)
        better = (b > _0) & (a * a > best * b)
        scale = select(better, a / b, scale)
        best = select(better, scale * a, best)
        for k in range(vectors):
            code = select(better, load(codes, t * per_trial + k * LANES), load(codes, kept + k * LANES))
            store(codes, kept + k * LANES, code)
    anything = splat_int(OFF if again == AGAIN_ALL else 0)
    for k in range(vectors):
        anything = anything | load(codes, kept + k * LANES)
    use = ((anything & OFF) != 0) & (scale > _0) & ~dead
    if any_lane(use):
        # The codes under the best scale go where those of the first trial were.
        store(scales, 0, scale)
        _round(x, n, dims, width, _1 / scale, use, codes, 0)
        if again == AGAIN_OFF:
            for k in range(vectors):
                off = (load(codes, kept + k * LANES) & OFF) != 0
                store(codes, k * LANES, select(off, load(codes, k * LANES), 0))
        replace(codes, 0, per_trial, shift, dims, x, root, scales, levels, place, lists, todo)
        for k in range(vectors):
            code = load(codes, kept + k * LANES)
            new = use if again != AGAIN_OFF else use & ((code & OFF) != 0)
            store(codes, kept + k * LANES, select(new, load(codes, k * LANES), code))
        a, b = _sums(codes, kept, wx, w, n, dims, width)
        scale = select(use & (b > _0), a / b, scale)
    for k in range(vectors):
        store(codes, k * LANES, select(dead, 0, load(codes, kept + k * LANES) & 0xFFFF))
    return select(dead, _0, scale), dead


@compiled
def _tile(x, weights, per_row, first, count, shape, factors, trials, flags, tables, into):  # type: ignore[no-untyped-def]
    n, dims, width = shape
    factor, flat, least, fudge = factors
    parity, start, again = flags
    levels, place, lists, number = tables
    signs, index, sizes, alive, half = into
    vectors, groups, eights = n // dims, 256 // n, n // 8
    room = scratch(2 * _SIZE + (3 * 32 + 16 + len(trials)) * LANES)
    values, w = room[:_SIZE], room[_SIZE : 2 * _SIZE]
    small = room[2 * _SIZE :]
    size, wx, root = small[: 32 * LANES], small[32 * LANES : 64 * LANES], small[64 * LANES : 96 * LANES]
    fitted, scales = small[96 * LANES : 112 * LANES], small[112 * LANES :]
    codes = scratch((len(trials) + 1) * vectors * LANES).view(np.int32)
    todo = scratch(max(len(trials) * vectors, n) * LANES).view(np.int32)
    bring(x, starts_of(first, count, 256), 256, values)
    weigh(values, weights, per_row, first, count, factor, flat, w)
    largest = splat(_0)
    for j in range(groups):
        at = j * n * LANES
        group_w = w[at : at + n * LANES]
        for k in range(eights):
            store(todo, k * LANES, _magnitudes(values, w, at + 8 * k * LANES, parity, size[8 * k * LANES :]))
        for k in range(eights):
            for lane in range(min(LANES, count - first)):
                signs[(first + lane) * 32 + j * eights + k] = np.uint8(todo[k * LANES + lane])
        for i in range(n):
            weight = load(group_w, i * LANES)
            store(root, i * LANES, sqrt(weight))
            store(wx, i * LANES, weight * load(size, i * LANES))
        scale, dead = _fit(
            size,
            group_w,
            wx,
            root,
            n,
            dims,
            width,
            trials,
            least,
            start,
            again,
            levels,
            place,
            lists,
            codes,
            scales,
            todo,
        )
        negative = scale < _0
        scale = select(negative, _0 - scale, scale)
        largest = larger(largest, scale)
        store(fitted, j * LANES, scale)
        flip = select(negative, 127 if parity else 255, splat_int(0))
        keep = select(dead, 0, splat_int(255))
        store(todo, 0, flip)
        store(todo, LANES, keep)
        for lane in range(min(LANES, count - first)):
            block = first + lane
            alive[block * groups + j] = todo[LANES + lane] != 0
            for k in range(eights):
                at = block * 32 + j * eights + k
                signs[at] = np.uint8((np.int32(signs[at]) ^ todo[lane]) & todo[LANES + lane])
            for k in range(vectors):
                index[(block * groups + j) * vectors + k] = number[np.uint32(codes[k * LANES + lane])]
    d = largest / np.float32(31)
    none = largest == _0
    inverse = _1 / d
    store(todo, 0, half_bits(select(none, _0, d * fudge)))
    store(todo, 17 * LANES, select(none, 1, splat_int(0)))
    for j in range(groups):
        whole = nearest(_HALF * (inverse * load(fitted, j * LANES) - _1))
        whole = smaller(larger(whole, splat_int(0)), splat_int(15))
        store(todo, (j + 1) * LANES, select(none, 0, whole))
    for lane in range(min(LANES, count - first)):
        block = first + lane
        if (
            parity and todo[17 * LANES + lane] != 0
        ):  # types with an even number of signs store nothing under a scale of 0
            signs[block * 32 : (block + 1) * 32] = 0
            index[block * groups * vectors : (block + 1) * groups * vectors] = 0
        half[block] = np.uint16(todo[lane])
        for j in range(groups):
            sizes[block * groups + j] = np.uint8(todo[(j + 1) * LANES + lane])


@compiled
def fit_tiles(begin, end, x, weights, per_row, shape, factors, trials, flags, tables, into):  # type: ignore[no-untyped-def]
    """Quantize super-blocks of flat ``x`` (tiles ``begin .. end`` of ``LANES`` each) to numbers, which the caller packs.

    shape: (values of a group, values of a vector, bits of a level number); factors: (of sigma2, of sigma2 in unweighted weights, what
    magnitude is dead, of d); trials: numerators of the inverse scales tried; flags: (even number of signs, start from a fitted scale,
    AGAIN_*); tables: (``level_tables``, place, lists, number); into: flat arrays, a row each super-block: signs (32), index (256 /
    values of a vector), sizes 0 .. 15 and alive (a group each), half.
    """
    for tile in range(begin, end):
        _tile(x, weights, per_row, tile * LANES, len(x) // 256, shape, factors, trials, flags, tables, into)
