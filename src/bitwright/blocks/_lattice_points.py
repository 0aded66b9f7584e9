"""Codes that are off a lattice, and the points of their lists that come nearest: the inner loop of all lattice types.

A vector x with weights r takes the point q of its list that minimises the sum of r_i (s q_i - x_i)², summed in order; of equal ones the
first. 16 points of one list go in step. r_i (s q_i - x_i)² takes as many values as there are levels: they are computed once and looked
up for every point.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from bitwright.blocks._lookup import load_codes, lookup, lowest_lane, lowest_place, splat_at
from bitwright.blocks._numba import compiled
from bitwright.blocks._vector import LANES, load, select, splat, splat_int

__all__ = ["OFF", "replace"]

#: Marks a code that was replaced by a point of its list.
OFF = 1 << 16

_0 = np.float32(0)

# A call costs more than the work: every array is handed over in seven words.
_part: Any = numba.njit(inline="always")


@_part
def _costs(sized, x, root, at):  # type: ignore[no-untyped-def]
    """Weighted squares of one value under every level."""
    o = sized - splat_at(x, at)
    return splat_at(root, at) * o * o


@_part
def _four(p, where, at, sized, x, root, lists, codes):  # type: ignore[no-untyped-def]
    """Replace code ``p``, a vector of four values, by the nearest point of its list."""
    first, rows = np.int64(where >> 8) * LANES, where & 255
    c0, c1 = _costs(sized, x, root, at), _costs(sized, x, root, at + np.uint64(LANES))
    c2, c3 = _costs(sized, x, root, at + np.uint64(2 * LANES)), _costs(sized, x, root, at + np.uint64(3 * LANES))
    u = load_codes(lists, first)
    best = lookup(c0, u) + lookup(c1, u >> 3) + lookup(c2, u >> 6) + lookup(c3, u >> 9)
    if rows == 1:
        spot = lowest_lane(best)
    else:
        chosen = splat_int(0)
        for row in range(1, rows):
            u = load_codes(lists, first + row * LANES)
            cost = lookup(c0, u) + lookup(c1, u >> 3) + lookup(c2, u >> 6) + lookup(c3, u >> 9)
            less = cost < best
            best, chosen = select(less, cost, best), select(less, row, chosen)
        spot = lowest_place(best, chosen)
    codes[p] = np.int32(lists[np.uint64(first + spot)]) | OFF


@_part
def _eight(p, where, at, sized, high, x, root, lists, codes):  # type: ignore[no-untyped-def]
    """The same for eight values; ``high``: the scaled levels by bits 2 and 3 of an index."""
    first, rows = np.int64(where >> 8) * LANES, where & 255
    # The first two values have one table, of their sums.
    c1 = _costs(sized, x, root, at) + _costs(high, x, root, at + np.uint64(LANES))
    c2, c3 = _costs(sized, x, root, at + np.uint64(2 * LANES)), _costs(sized, x, root, at + np.uint64(3 * LANES))
    c4, c5 = _costs(sized, x, root, at + np.uint64(4 * LANES)), _costs(sized, x, root, at + np.uint64(5 * LANES))
    c6, c7 = _costs(sized, x, root, at + np.uint64(6 * LANES)), _costs(sized, x, root, at + np.uint64(7 * LANES))
    best, chosen = splat(_0), splat_int(0)
    for row in range(rows):
        u = load_codes(lists, first + row * LANES)
        cost = lookup(c1, u) + lookup(c2, u >> 4) + lookup(c3, u >> 6) + lookup(c4, u >> 8)
        cost = cost + lookup(c5, u >> 10) + lookup(c6, u >> 12) + lookup(c7, u >> 14)
        if row == 0:
            best = cost
        less = cost < best
        best, chosen = select(less, cost, best), select(less, row, chosen)
    spot = lowest_lane(best) if rows == 1 else lowest_place(best, chosen)
    codes[p] = np.int32(lists[np.uint64(first + spot)]) | OFF


@compiled
def replace(codes, begin, end, shift, dims, x, root, scales, levels, place, lists, todo):  # type: ignore[no-untyped-def]
    """Replace the codes ``begin .. end`` that are off the lattice by the nearest points of their lists.

    codes: flat, (trial, vector, lane), ``1 << shift`` of them a trial; scales: (trial, lane); levels: as q, by bits 0 .. 2 (four values)
    or 0 and 1 of an index, then, for eight values, by bits 2 and 3; todo: room for the places of codes.
    """
    # Those with one row of points from the front, the others from the back: no branch that cannot be foreseen.
    one, none = np.uint64(1), np.uint64(0)
    count, back = none, np.uint64(end - 1)
    for p in range(begin, end):
        rows = place[np.uint32(codes[p])] & 255
        todo[count] = p
        count += one if rows == 1 else none
        todo[back] = p
        back -= one if rows > 1 else none
    single, several = np.int64(count), np.int64(end) - 1 - np.int64(back)
    level, high = load(levels, 0), load(levels, LANES)
    mask = np.uint64((1 << shift) - 1)
    for n in range(single + several):
        item = np.uint64(todo[np.uint64(n if n < single else n - single + end - several)])
        lane, trial = item & np.uint64(LANES - 1), item >> np.uint64(shift)
        vector = (item & mask) >> np.uint64(4)
        at = vector * np.uint64(dims * LANES) + lane
        where = place[np.uint32(codes[item])]
        scale = splat_at(scales, trial * np.uint64(LANES) + lane)
        if dims == 4:
            _four(item, where, at, scale * level, x, root, lists, codes)
        else:
            _eight(item, where, at, scale * level, scale * high, x, root, lists, codes)
