"""ggml's searches for scales, over lanes: ``symmetric`` (make_qx_quants), ``feedback`` (make_q3_quants), ``affine`` (make_qkx2_quants
and make_qkx3_quants) and ``positive`` (make_qp_quants).

All work on flat float32 arrays in which value i of a group lies at ``[at + i * LANES + lane]``, and do ggml's float32 operations in
ggml's order. A candidate that wins leaves its parameters, not its codes: codes are a function of them and are formed once, at the end.

Rounding. ``v + 1.5 * 2^23`` holds v, rounded half to even, in its low bits, so a clamp on that sum and one subtraction give the code as a
float, in four operations that run on every vector unit. It is what ggml does as long as |v| < 2^22. Where that is not certain (``wild``: a
group of vanishing width, of values that have no weight) the code is formed with integers, which wrap around as ggml's do.
"""

from __future__ import annotations

import numpy as np

from bitwright.blocks._numba import compiled
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

__all__ = ["affine", "affine_codes", "feedback", "positive", "symmetric", "symmetric_codes"]

_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23
_SURE = np.float32(4e6)  # below 2^22
_EPS = np.float32(1e-15)  # smaller groups are all zero to ggml
_0, _1 = np.float32(0), np.float32(1)
_0_1 = np.float32(0.1)


@compiled
def _largest(x, at, n):  # type: ignore[no-untyped-def]
    """The first value of largest magnitude, and its magnitude."""
    most = splat(_0)
    value = splat(_0)
    for i in range(n):
        v = load(x, at + i * LANES)
        size = absolute(v)
        more = size > most
        most = select(more, size, most)
        value = select(more, v, value)
    return value, most


# --- symmetric ----------------------------------------------------------------------------------------------------------------


@compiled
def _products(x, wx, w, at, n, inverse, top):  # type: ignore[no-untyped-def]
    """Sums of w x l and w l l over a group for the codes l in -top .. top - 1 that ``inverse`` gives."""
    low, high = splat(_MAGIC - top), splat(_MAGIC + (top - _1))
    above = splat(_0)
    below = splat(_0)
    for i in range(n):
        code = smaller(larger(load(x, at + i * LANES) * inverse + _MAGIC, low), high) - _MAGIC
        above += load(wx, at + i * LANES) * code
        below += load(w, at + i * LANES) * code * code
    return above, below


@compiled
def _two_products(x, wx, w, at, n, first, second, top):  # type: ignore[no-untyped-def]
    """``_products`` of two candidates: their sums do not wait for each other."""
    low, high = splat(_MAGIC - top), splat(_MAGIC + (top - _1))
    above1, below1 = splat(_0), splat(_0)
    above2, below2 = splat(_0), splat(_0)
    for i in range(n):
        v, weight, product = load(x, at + i * LANES), load(w, at + i * LANES), load(wx, at + i * LANES)
        code = smaller(larger(v * first + _MAGIC, low), high) - _MAGIC
        above1 += product * code
        below1 += weight * code * code
        code = smaller(larger(v * second + _MAGIC, low), high) - _MAGIC
        above2 += product * code
        below2 += weight * code * code
    return above1, below1, above2, below2


@compiled
def symmetric(x, wx, w, at, n, top):  # type: ignore[no-untyped-def]
    """Scales ``(scale, inverse)`` for codes -top .. top - 1 that maximise (sum w x l)² / sum w l l over 19 candidates.

    w, wx: weights, and weights times x. inverse: what the winning codes were formed with, 0 for a group of zeros.
    """
    value, most = _largest(x, at, n)
    dead = most < _EPS
    value = select(dead, _1, value)
    chosen = -top / value
    above, below = _products(x, wx, w, at, n, chosen, top)
    scale = select(below != _0, above / below, _0)
    best = scale * above
    for k in range(-9, 9, 2):
        # -9, -8; -7, -6; ... 8, 9, without 0.
        k1, k2 = (k, k + 1) if k < -1 else ((-1, 1) if k == -1 else (k + 1, k + 2))
        first = -(top + _0_1 * np.float32(k1)) / value
        second = -(top + _0_1 * np.float32(k2)) / value
        above, below, above2, below2 = _two_products(x, wx, w, at, n, first, second, top)
        better = (below > _0) & (above * above > best * below)
        scale = select(better, above / below, scale)
        best = select(better, scale * above, best)
        chosen = select(better, first, chosen)
        better = (below2 > _0) & (above2 * above2 > best * below2)
        scale = select(better, above2 / below2, scale)
        best = select(better, scale * above2, best)
        chosen = select(better, second, chosen)
    return select(dead, _0, scale), select(dead, _0, chosen)


@compiled
def symmetric_codes(x, at, n, inverse, top, codes, to):  # type: ignore[no-untyped-def]
    """The codes, 0 .. 2 top - 1, that ``symmetric`` chose, as floats in ``codes``; 0 for a group of zeros."""
    low, high = _MAGIC - top, _MAGIC + (top - _1)
    dead = inverse == _0
    for i in range(n):
        v = load(x, at + i * LANES) * inverse + _MAGIC
        code = smaller(larger(v, splat(low)), splat(high)) - (_MAGIC - top)
        store(codes, to + i * LANES, select(dead, _0, code))


@compiled
def feedback(x, at, n, top, codes, to):  # type: ignore[no-untyped-def]
    """Scale for codes -top .. top - 1 with weights x²: one start, then up to five rounds of changing one code at a time.

    ``codes`` gets the codes 0 .. 2 top - 1 as floats.
    """
    value, most = _largest(x, at, n)
    dead = most < _EPS
    inverse = -top / select(dead, _1, value)
    low, high = np.int32(-top), np.int32(top) - np.int32(1)
    above = splat(_0)
    below = splat(_0)
    for i in range(n):
        v = load(x, at + i * LANES)
        code = to_float(smaller(larger(nearest(inverse * v), splat_int(low)), splat_int(high)))
        store(codes, to + i * LANES, code)
        weight = v * v
        above += weight * v * code
        below += weight * code * code
    for _ in range(5):
        changed = dead ^ dead
        for i in range(n):
            v = load(x, at + i * LANES)
            code = load(codes, to + i * LANES)
            weight = v * v
            wx = weight * v
            a = above - wx * code
            b = below - weight * code * code
            new = to_float(smaller(larger(nearest(v * b / a), splat_int(low)), splat_int(high)))
            a1 = a + wx * new
            b1 = b + weight * new * new
            better = (a > _0) & (new != code) & (b1 > _0) & (a1 * a1 * below > above * above * b1)
            above = select(better, a1, above)
            below = select(better, b1, below)
            store(codes, to + i * LANES, select(better, new, code))
            changed = changed | better
        if not any_lane(changed):
            break
    for i in range(n):
        store(codes, to + i * LANES, select(dead, _0, load(codes, to + i * LANES) + top))
    return select(dead | ~(below > _0), _0, above / below)


# --- affine -------------------------------------------------------------------------------------------------------------------


@compiled
def _wild(inverse, low, lowest, high):  # type: ignore[no-untyped-def]
    """True where rounding ``inverse * (x - low)`` might leave the range of the fast way for an x of some lane."""
    reach = larger(absolute(high - low), absolute(lowest - low)) * absolute(inverse)
    return any_lane(~(reach < _SURE))  # NaN counts


@compiled
def affine(x, w, at, n, top, first, step, count, by_size, room):  # type: ignore[no-untyped-def]
    """Scale and offset for codes 0 .. top over ``count + 1`` candidate widths, each refined by weighted regression.

    The error is the weighted sum of squares, or of magnitudes with ``by_size``. room: n * LANES floats of work space.
    Returns ``(scale, offset, inverse, base)``: x is about scale * code + offset with offset <= 0; the winning codes are those of
    ``inverse * (x - base)``, with inverse 0 for a group of equal values.
    """
    lowest = load(x, at)
    high = lowest
    weight = load(w, at)
    sum_w = weight
    sum_x = weight * lowest
    for i in range(1, n):
        v = load(x, at + i * LANES)
        weight = load(w, at + i * LANES)
        lowest = smaller(v, lowest)
        high = larger(v, high)
        sum_w += weight
        sum_x += weight * v
    low = select(lowest > _0, _0, lowest)
    dead = high <= low
    # Equal values: any width will do, their lane is not used.
    filler = select(dead, _1, _0)
    inverse = top / (high - low + filler)
    scale = _1 / inverse
    chosen, base = inverse, low
    affine_codes(x, at, n, inverse, low, top, room, 0)
    best = _error(x, w, at, n, scale, low, by_size, room)
    for k in range(count + 1):
        inverse = (first + step * np.float32(k) + top) / (high - low + filler)
        if _wild(inverse, low, lowest, high):
            affine_codes(x, at, n, inverse, low, top, room, 0)
            sum_l, sum_l2, sum_xl = _moments(x, w, at, n, room)
        else:
            sum_l = splat(_0)
            sum_l2 = splat(_0)
            sum_xl = splat(_0)
            for i in range(n):
                v = load(x, at + i * LANES)
                rounded = inverse * (v - low) + _MAGIC
                code = smaller(larger(rounded, splat(_MAGIC)), splat(_MAGIC + top)) - _MAGIC
                store(room, i * LANES, code)
                wl = load(w, at + i * LANES) * code
                sum_l += wl
                sum_l2 += wl * code
                sum_xl += wl * v
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        over = new_low > _0
        new_scale = select(over, sum_xl / sum_l2, new_scale)
        new_low = select(over, _0, new_low)
        error = _error(x, w, at, n, new_scale, new_low, by_size, room)
        better = (det > _0) & (error < best)
        best = select(better, error, best)
        scale = select(better, new_scale, scale)
        chosen = select(better, inverse, chosen)
        base = select(better, low, base)
        low = select(better, new_low, low)
    lowest = select(lowest > _0, _0, lowest)
    return select(dead, _0, scale), select(dead, lowest, low), select(dead, _0, chosen), base


@compiled
def _error(x, w, at, n, scale, low, by_size, room):  # type: ignore[no-untyped-def]
    """Weighted error of the codes in ``room``."""
    error = splat(_0)
    if by_size:
        for i in range(n):
            off = scale * load(room, i * LANES) + low - load(x, at + i * LANES)
            error += load(w, at + i * LANES) * absolute(off)
    else:
        for i in range(n):
            off = scale * load(room, i * LANES) + low - load(x, at + i * LANES)
            error += load(w, at + i * LANES) * (off * off)
    return error


@compiled
def _moments(x, w, at, n, room):  # type: ignore[no-untyped-def]
    """Sums of w l, w l l and w l x over the codes l in ``room``."""
    sum_l = splat(_0)
    sum_l2 = splat(_0)
    sum_xl = splat(_0)
    for i in range(n):
        code = load(room, i * LANES)
        wl = load(w, at + i * LANES) * code
        sum_l += wl
        sum_l2 += wl * code
        sum_xl += wl * load(x, at + i * LANES)
    return sum_l, sum_l2, sum_xl


@compiled
def affine_codes(x, at, n, inverse, base, top, codes, to):  # type: ignore[no-untyped-def]
    """The codes ``inverse * (x - base)``, clamped to 0 .. top, as floats in ``codes``; for any values at all."""
    limit = splat_int(np.int32(top))
    for i in range(n):
        code = nearest(inverse * (load(x, at + i * LANES) - base))
        store(codes, to + i * LANES, to_float(smaller(larger(code, splat_int(np.int32(0))), limit)))


# --- positive -----------------------------------------------------------------------------------------------------------------


@compiled
def positive(x, w, n, top, codes):  # type: ignore[no-untyped-def]
    """Scale for non-negative values and codes 0 .. top, weighted: eight candidates, then up to five rounds of single changes.

    For the scales and offsets of a super-block. ``codes`` (int32, n * LANES) gets the codes.
    """
    limit = np.int32(top)
    most = splat(_0)
    for i in range(n):
        v = load(x, i * LANES)
        most = larger(most, v)
    dead = most < _EPS
    most = select(dead, _1, most)
    inverse = top / most
    scale = _1 / inverse
    best = splat(_0)
    for i in range(n):
        v = load(x, i * LANES)
        off = v - scale * to_float(nearest(inverse * v) & 0xFF)
        best += load(w, i * LANES) * off * off
    for k in range(-4, 5):
        if k == 0:
            continue
        candidate = (_0_1 * np.float32(k) + top) / most
        scale = _1 / candidate
        error = splat(_0)
        for i in range(n):
            v = load(x, i * LANES)
            off = v - scale * to_float(smaller(nearest(candidate * v), splat_int(limit)))
            error += load(w, i * LANES) * off * off
        better = error < best
        best = select(better, error, best)
        inverse = select(better, candidate, inverse)
    above = splat(_0)
    below = splat(_0)
    for i in range(n):
        v = load(x, i * LANES)
        whole = smaller(nearest(inverse * v), splat_int(limit))
        store(codes, i * LANES, whole & 0xFF)
        code = to_float(whole)
        weight = load(w, i * LANES)
        above += weight * v * code
        below += weight * code * code
    for _ in range(5):
        changed = dead ^ dead
        for i in range(n):
            v = load(x, i * LANES)
            weight = load(w, i * LANES)
            old = load(codes, i * LANES)
            code = to_float(old)
            a = above - weight * v * code
            b = below - weight * code * code
            whole = smaller(nearest(v * b / a), splat_int(limit))
            new = to_float(whole)
            a1 = a + weight * v * new
            b1 = b + weight * new * new
            better = (a > _0) & (b > _0) & (whole != old) & (a1 * a1 * below > above * above * b1)
            above = select(better, a1, above)
            below = select(better, b1, below)
            store(codes, i * LANES, select(better, whole & 0xFF, old))
            changed = changed | better
        if not any_lane(changed):
            break
    for i in range(n):
        store(codes, i * LANES, select(dead, 0, load(codes, i * LANES)))
    return select(dead | ~(below > _0), _0, above / below)
