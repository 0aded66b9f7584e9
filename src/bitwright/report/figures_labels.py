"""Where the names of points go on a chart, so that none lies on another, on a point, or outside.

First each label looks for room near its point, the crowded ones first, on rings of growing radius; the nearest free place wins, straight
right and left before slanted ones. The best places for all labels together are NP-hard to find (Marks and Shieber, "The computational
complexity of cartographic label placement", 1991), so that this greedy search is tried in several orders and the best outcome kept.
Where none gives every label a place, they go into a column beside the chart, in the order of their points, each with a line to its
point: that always works if the column is high enough.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Label", "Spot", "place", "spread", "stack"]

#: Distances from the point's centre to the label's nearest edge, in pixels.
_RINGS = (11, 17, 24, 33, 45, 60, 78)
#: Directions in degrees, and what they cost: names are read to the right of their point.
_WAYS = (
    (0, 0), (45, 4), (-45, 4), (180, 3), (135, 6), (-135, 6), (90, 5), (-90, 5),
    (22, 3), (-22, 3), (158, 6), (-158, 6), (68, 6), (-68, 6), (112, 7), (-112, 7),
)  # fmt: skip
#: Orders that are tried beyond the plain ones.
_SHUFFLES = 40
#: Half the side of the square that a point takes.
_POINT = 7.0
#: Free pixels around a label.
_GAP = 3.0


@dataclass(frozen=True)
class Label:
    """A point in pixels, y downwards, and the size of its text. first: it is placed before all others where that is possible."""

    x: float
    y: float
    width: float
    height: float
    first: bool = False


@dataclass(frozen=True)
class Spot:
    """Top left corner of a label. line: where the line to its point ends, None where the label is beside it."""

    left: float
    top: float
    line: tuple[float, float] | None


_Box = tuple[float, float, float, float]
_Segment = tuple[float, float, float, float]


def place(
    labels: Sequence[Label], bounds: _Box, *, avoid: Sequence[_Segment] = (), blocked: Sequence[_Box] = ()
) -> list[Spot] | None:
    """A spot for each label near its point, or None where there is no room for all.

    bounds: left, top, right, bottom. avoid: segments that a label should not cover; blocked: boxes that it must not.
    """
    crowd = [sum(math.hypot(a.x - b.x, a.y - b.y) < 90 for b in labels) for a in labels]
    indices = range(len(labels))
    orders = [
        sorted(indices, key=lambda i: (not labels[i].first, -crowd[i], labels[i].x)),
        sorted(indices, key=lambda i: labels[i].x),
        sorted(indices, key=lambda i: -labels[i].x),
        sorted(indices, key=lambda i: labels[i].y),
        sorted(indices, key=lambda i: -labels[i].y),
    ]
    # The same shuffles every time: the same points give the same chart.
    shuffled = random.Random(0)
    orders += [shuffled.sample(indices, len(indices)) for _ in range(_SHUFFLES)]
    best: tuple[float, list[Spot]] | None = None
    for order in orders:
        found = _greedy(labels, order, bounds, avoid, blocked)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return best[1] if best else None


def _greedy(
    labels: Sequence[Label], order: Sequence[int], bounds: _Box, avoid: Sequence[_Segment], blocked: Sequence[_Box]
) -> tuple[float, list[Spot]] | None:
    points = [(one.x - _POINT, one.y - _POINT, one.x + _POINT, one.y + _POINT) for one in labels]
    boxes: list[_Box] = list(blocked)
    lines: list[_Segment] = []
    spots: dict[int, Spot] = {}
    total = 0.0
    for index in order:
        one = labels[index]
        best: tuple[float, _Box, _Segment | None] | None = None
        for ring in _RINGS:
            if best is not None and ring > best[0]:
                break
            for angle, price in _WAYS:
                box, end = _boxed(one, ring, angle)
                if not _inside(box, bounds):
                    continue
                wide = _grown(box, _GAP)
                if any(_overlap(wide, other) for other in boxes) or any(_overlap(box, other) for other in points):
                    continue
                line = (one.x, one.y, *end) if ring > _RINGS[1] else None
                if any(_crosses(other, wide) for other in lines):
                    continue
                if line and (any(_crosses(line, b) for b in boxes) or any(_meet(line, other) for other in lines)):
                    continue
                cost = ring + price + 12.0 * sum(_crosses(other, box) for other in avoid)
                if line:
                    through = (
                        other for i, other in enumerate(points) if i != index and _crosses(line, _grown(other, -3))
                    )
                    cost += 10.0 + 25.0 * sum(1 for _ in through)
                if best is None or cost < best[0]:
                    best = cost, box, line
        if best is None:
            return None
        cost, box, line = best
        # Far labels are dear: one long line is worse than three short ones.
        total += cost**1.5
        boxes.append(box)
        if line:
            lines.append(line)
        spots[index] = Spot(box[0], box[1], (line[2], line[3]) if line else None)
    return total, [spots[index] for index in range(len(labels))]


def stack(labels: Sequence[Label], left: float, top: float, bottom: float) -> list[Spot]:
    """All labels in a column at ``left``, in the order of their points, each as near to its point's height as the others let it."""
    order = sorted(range(len(labels)), key=lambda i: (labels[i].y, labels[i].x))
    heights = [labels[i].height + _GAP for i in order]
    tops = spread([labels[i].y - labels[i].height / 2 for i in order], heights, top, bottom)
    spots: dict[int, Spot] = {}
    for index, at in zip(order, tops, strict=True):
        spots[index] = Spot(left, at, (left - 4, at + labels[index].height / 2))
    return [spots[index] for index in range(len(labels))]


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Positions near the wanted ones, which ascend, such that none overlaps the next; beyond ``high`` where there is no room.

    >>> spread([10, 11, 40], [10, 10, 10], 0, 100)
    [5.5, 15.5, 40.0]
    """
    # Neighbours that touch form a group that moves as one, to the mean of what its members want (pool adjacent violators).
    groups: list[list[float]] = []  # start, height, members, sum of the members' wishes for the start
    for place_, height in zip(wanted, heights, strict=True):
        groups.append([float(place_), float(height), 1.0, float(place_)])
        while len(groups) > 1 and groups[-2][0] + groups[-2][1] > groups[-1][0]:
            _, height_, members, wish = groups.pop()
            before = groups[-1]
            before[3] += wish - members * before[1]
            before[1] += height_
            before[2] += members
            before[0] = before[3] / before[2]
    return _clamped(groups, heights, low, high)


def _clamped(groups: Sequence[Sequence[float]], heights: Sequence[float], low: float, high: float) -> list[float]:
    tops: list[float] = []
    for start, _, members, _ in groups:
        at = start
        for _ in range(int(members)):
            tops.append(at)
            at += heights[len(tops) - 1]
    # From below upwards, then from above downwards: the upper limit holds in any case.
    limit = high
    for index in reversed(range(len(tops))):
        tops[index] = min(tops[index], limit - heights[index])
        limit = tops[index]
    limit = low
    for index, top in enumerate(tops):
        tops[index] = max(top, limit)
        limit = tops[index] + heights[index]
    return tops


def _boxed(one: Label, ring: float, angle: float) -> tuple[_Box, tuple[float, float]]:
    """The label's box at that distance in that direction, and its nearest point."""
    across, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = one.x + ring * across, one.y + ring * down
    # The box hangs on the point: at its left edge to the right of it, at its middle above it.
    left = x - one.width * (1 - across) / 2 if abs(across) < 0.4 else (x if across > 0 else x - one.width)
    top = y - one.height * (1 - down) / 2
    box = (left, top, left + one.width, top + one.height)
    return box, (min(max(one.x, box[0]), box[2]), min(max(one.y, box[1]), box[3]))


def _grown(box: _Box, by: float) -> _Box:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _inside(box: _Box, bounds: _Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(line: _Segment, box: _Box) -> bool:
    """Whether a segment touches a box: clipped against each side in turn (Liang and Barsky, 1984)."""
    x, y, dx, dy = line[0], line[1], line[2] - line[0], line[3] - line[1]
    first, last = 0.0, 1.0
    for step, room in ((-dx, x - box[0]), (dx, box[2] - x), (-dy, y - box[1]), (dy, box[3] - y)):
        if step == 0:
            if room < 0:
                return False
        elif step < 0:
            first = max(first, room / step)
        else:
            last = min(last, room / step)
    return first <= last


def _meet(a: _Segment, b: _Segment) -> bool:
    """Whether two segments cross."""

    def side(line: _Segment, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    return side(a, b[0], b[1]) * side(a, b[2], b[3]) < 0 and side(b, a[0], a[1]) * side(b, a[2], a[3]) < 0
