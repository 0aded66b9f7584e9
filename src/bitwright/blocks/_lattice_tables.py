"""Points of ggml's lattices, and for every code that is no point the points a quantizer may replace it by.

A lattice holds vectors of four or eight values, each one of a few levels. A *code* packs a vector's level numbers, three bits each
(four values, eight levels) or two (eight values, three levels). For codes off the lattice ggml tries the points at the ``shells``
smallest distances |p - q|² between level numbers, nearest first, of equal distance in the order of their numbers. The points come from
the ``gguf`` package; the lists are computed at first use and stay in memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks._vector import LANES

__all__ = ["Lattice", "lattice", "level_tables"]

#: Type -> (bits per level number, levels, shells).
_SHAPES = {
    "IQ2_XXS": (2, 3, 2),
    "IQ2_XS": (2, 3, 2),
    "IQ2_S": (2, 3, 1),
    "IQ3_XXS": (3, 8, 2),
    "IQ3_S": (3, 8, 3),
    "IQ1_S": (2, 3, 3),
}


@dataclass(frozen=True, slots=True)
class Lattice:
    """One lattice.

    points: ``(n, values)`` float32, as decoding uses them; codes: ``(n,)`` uint16; number: code -> number of its point, -1 off the
    lattice; place: code -> 0 on the lattice, else ``first << 8 | rows``: where in ``lists``, in rows of ``LANES`` codes, its points lie,
    the last one repeated to fill the row.
    """

    points: NDArray[np.float32]
    codes: NDArray[np.uint16]
    number: NDArray[np.int16]
    place: NDArray[np.int32]
    lists: NDArray[np.uint16]


@functools.cache
def lattice(name: str) -> Lattice:
    """The lattice of a type; IQ1_M shares that of IQ1_S."""
    from gguf import quants

    width, levels, shells = _SHAPES[name]
    source = getattr(quants, name)
    source.init_grid()
    points = np.ascontiguousarray(source.grid.reshape(source.grid_shape), np.float32)
    values = points.shape[1]
    level_of = np.searchsorted(np.unique(points), points)
    packed = (1 << width * np.arange(values)).astype(np.int64)
    codes = level_of @ packed
    number = np.full(1 << 12 if width == 3 else 1 << 16, -1, np.int16)
    number[codes] = np.arange(len(codes))
    everything = np.stack(np.meshgrid(*[np.arange(levels)] * values, indexing="ij"), axis=-1).reshape(-1, values)
    off = everything[number[everything @ packed] < 0]
    chosen, counts = _nearest(off, level_of, shells)
    rows = -(-counts // LANES)
    first = np.cumsum(rows) - rows
    # Where in the lists every list's entries lie; entries past its end repeat the last one.
    ends = np.cumsum(counts)
    lane = np.arange(int(rows.sum()) * LANES) - np.repeat(first, rows * LANES) * LANES
    entry = np.repeat(ends - counts, rows * LANES) + np.minimum(lane, np.repeat(counts, rows * LANES) - 1)
    place = np.zeros(len(number), np.int32)
    place[off @ packed] = first << 8 | rows
    return Lattice(points, codes.astype(np.uint16), number, place, codes[chosen[entry]].astype(np.uint16))


def _nearest(
    off: NDArray[np.int64], points: NDArray[np.int64], shells: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the points in the ``shells`` nearest shells around every vector, one list after the other, and the lists' lengths."""
    chosen, counts = [], []
    p = points.astype(np.float32)
    for begin in range(0, len(off), 512):
        q = off[begin : begin + 512].astype(np.float32)
        # Small integers: exact in float32, in any order.
        distance = (q * q).sum(1)[:, None] + (p * p).sum(1) - np.float32(2) * (q @ p.T)
        edge = distance.min(1)
        for _ in range(shells - 1):
            edge = np.where(distance > edge[:, None], distance, np.inf).min(1)
        row, point = np.nonzero(distance <= edge[:, None])
        chosen.append(point[np.lexsort((point, distance[row, point], row))])
        counts.append(np.bincount(row, minlength=len(q)))
    return np.concatenate(chosen), np.concatenate(counts)


def level_tables(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two vectors of 16: the level (of 8 or 4) that the low bits of an index name, and the one that those above them do."""
    index = np.arange(LANES)
    return np.concatenate((levels[index % len(levels)], levels[index // len(levels)]))
