"""Charts of quality against size: every candidate named, nothing drawn over anything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bitwright.report.document import Candidate, Document
from bitwright.report.figures import (
    FONT,
    NARROW,
    WIDE,
    Chart,
    Sheet,
    log_ticks,
    no_ticks,
    plain,
    short,
    text_width,
    tick_text,
)
from bitwright.report.figures_labels import Label, Spot, place, stack
from bitwright.report.numbers import significant
from bitwright.report.palette import stand_in
from bitwright.report.verdict import GRADES

__all__ = ["frontier", "pareto_chart", "perplexity_chart"]

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
#: Height of a line of text, in pixels.
_LINE = 15.0
_LEFT, _TOP, _BELOW = 62.0, 28.0, 46.0
#: Steps away from the original on the perplexity axis.
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 1000.0)


@dataclass(frozen=True)
class _Point:
    """A candidate on a chart. on: it is on the frontier; chosen: the verdict speaks of it."""

    name: str
    x: float
    y: float
    on: bool
    chosen: bool


@dataclass(frozen=True)
class _Plot:
    """What is drawn. words: draw the verdict's limits.

    source: level of the original, from which distances are drawn as their square roots.
    """

    points: tuple[_Point, ...]
    label: str
    across: str
    up: str
    log: bool
    source: float | None = None
    words: bool = False

    def draw(self, key: str) -> Chart:
        """In both widths."""
        return Chart(_scatter(self, f"{key}-w", WIDE), _scatter(self, f"{key}-n", NARROW), self.label)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates, from left to right. Of equal points the first stays.

    >>> frontier([(4, 0.1), (3, 0.2), (5, 0.3), (3, 0.5)])
    [1, 0]
    """
    best = math.inf
    found = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def pareto_chart(document: Document, chosen: Candidate) -> Chart | None:
    """Size of the weight files against mean KL divergence. None where fewer than two candidates have one."""
    known = [
        (one, one.quality.kl.mean)
        for one in document.candidates
        if one.quality is not None and one.quality.kl is not None and math.isfinite(one.quality.kl.mean)
    ]
    if len(known) < 2:
        return None
    largest = max(one.size.weight_file_bytes for one, _ in known)
    unit, scale = next((pair for pair in _UNITS if largest >= pair[1]), _UNITS[-1])
    on = set(frontier([(one.size.weight_file_bytes, mean) for one, mean in known]))
    positive = [mean for _, mean in known if mean > 0]
    # A logarithmic axis has no zero: a model that predicts exactly what its source does is drawn at the lower edge.
    floor = min(positive) / 3 if positive else 1e-6
    points = tuple(
        _Point(one.name, one.size.weight_file_bytes / scale, mean if mean > 0 else floor, i in on, one is chosen)
        for i, (one, mean) in enumerate(known)
    )
    label = f"Size of the weight files against mean KL divergence of {len(points)} candidates, with the frontier"
    plot = _Plot(points, label, f"weight files, {unit}", "mean KL divergence, nats", log=True, words=True)
    return plot.draw("pareto")


def perplexity_chart(document: Document, chosen: Candidate) -> Chart | None:
    """Bits per weight against perplexity, the original's as a line. None where fewer than two candidates have both."""
    known = [
        (one, bits, one.quality)
        for one in document.candidates
        if one.quality is not None
        and (bits := one.size.bits_per_weight) is not None
        and math.isfinite(bits)
        and math.isfinite(one.quality.model.perplexity)
    ]
    if len(known) < 2:
        return None
    on = set(frontier([(bits, quality.model.perplexity) for _, bits, quality in known]))
    points = tuple(
        _Point(one.name, bits, quality.model.perplexity, i in on, one is chosen)
        for i, (one, bits, quality) in enumerate(known)
    )
    sources = (quality.source.perplexity for _, _, quality in known if quality.source is not None)
    source = next((value for value in sources if 0 < value < math.inf), None)
    values = [point.y for point in points]
    label = f"Bits per weight against perplexity of {len(points)} candidates"
    log = source is None and max(values) > 4 * min(values) > 0
    return _Plot(points, label, "bits per weight, whole model", "perplexity", log, source).draw("perplexity")


def _scatter(plot: _Plot, key: str, width: float) -> str:
    narrow = width < 600
    names = [short(point.name, 18 if narrow else 32) for point in plot.points]
    sizes = [
        (text_width(plain(name), bold=point.chosen), _LINE) for name, point in zip(names, plot.points, strict=True)
    ]
    beside = 130.0 if plot.words else 52.0 if plot.source is not None else 0.0
    right = 14.0 + (0.0 if narrow else beside)
    height = (430.0 if narrow else 460.0) + 6 * max(0, len(names) - 12)
    with Sheet(key, width, height) as sheet:
        axes = _axes(sheet, plot, right)
        spots = _find_spots(sheet, axes, plot, sizes, right)
        if spots is not None:
            return _finish(sheet, axes, plot, names, sizes, spots, beside=not narrow)
    # No room near the points: the names get a column of their own, and the plot what is left of the width.
    side = min(max(size[0] for size in sizes) + 44, 0.55 * width)
    height = max(height, _TOP + _BELOW + len(names) * (_LINE + 4))
    with Sheet(key, width, height) as sheet:
        axes = _axes(sheet, plot, side)
        column = stack(_labels(sheet, axes, plot, sizes), width - side + 38, _TOP, height - _BELOW)
        return _finish(sheet, axes, plot, names, sizes, column, beside=False)


def _axes(sheet: Sheet, plot: _Plot, right: float) -> Any:
    """Axes with limits and ticks, which the search for places needs."""
    axes = sheet.axes(_LEFT, _TOP, sheet.width - _LEFT - right, sheet.height - _TOP - _BELOW)
    xs = [point.x for point in plot.points]
    span = max(xs) - min(xs) or max(abs(max(xs)), 1.0) * 0.2
    axes.set_xlim(min(xs) - 0.06 * span, max(xs) + 0.1 * span)
    axes.set_xlabel(plot.across)
    sheet.text(4, 10, plot.up, colour="muted", va="center")
    ys = [point.y for point in plot.points]
    if plot.log:
        ratio = max(max(ys) / min(ys), 2.0)
        low, high = min(ys) / ratio**0.08, max(ys) * ratio**0.08
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        ticks = log_ticks(low, high)
        axes.yaxis.set_minor_locator(no_ticks())
        axes.set_yticks(ticks, [tick_text(tick) for tick in ticks])
    elif plot.source is not None:
        _rooted(sheet, axes, plot.source, ys)
    else:
        span = max(ys) - min(ys) or max(abs(max(ys)), 1.0) * 0.1
        axes.set_ylim(min(ys) - 0.1 * span, max(ys) + 0.08 * span)
    axes.grid(axis="y", color=stand_in("line"), linewidth=0.8)
    return axes


def _rooted(sheet: Sheet, axes: Any, source: float, ys: Sequence[float]) -> None:
    """An axis on which the distance from the original is drawn as its square root: 0.1 % and 10 % can both be read."""
    import numpy as np

    def there(values: Any) -> Any:
        return np.sign(values - source) * np.sqrt(np.abs(values - source))

    def back(values: Any) -> Any:
        return source + np.sign(values) * np.square(values)

    far = max(*(abs(y - source) for y in ys), 1e-3 * abs(source))
    lowest = min(*ys, source)
    below = max(math.sqrt(max(0.0, source - lowest)) * 1.15, 0.12 * math.sqrt(far))
    above = max(math.sqrt(max(0.0, max(ys) - source)) * 1.08, 0.12 * math.sqrt(far))
    axes.set_yscale("function", functions=(there, back))
    axes.set_ylim(source - below**2, source + above**2)
    ticks = [source]
    for sign in (1, -1):
        last = sheet.pixel(axes, axes.get_xlim()[0], source)[1]
        for step in _STEPS:
            value = source * (1 + sign * step)
            if not source - below**2 < value < source + above**2:
                break
            at = sheet.pixel(axes, axes.get_xlim()[0], value)[1]
            if abs(at - last) >= 26:
                ticks.append(value)
                last = at
    axes.yaxis.set_minor_locator(no_ticks())
    axes.set_yticks(sorted(ticks), [significant(tick, 4) for tick in sorted(ticks)])


def _frontier_line(plot: _Plot) -> list[tuple[float, float]]:
    """Corners of the border between what has been reached and what has not: a staircase."""
    corners: list[tuple[float, float]] = []
    for index in frontier([(point.x, point.y) for point in plot.points]):
        point = plot.points[index]
        if corners:
            corners.append((point.x, corners[-1][1]))
        corners.append((point.x, point.y))
    return corners


def _labels(sheet: Sheet, axes: Any, plot: _Plot, sizes: Sequence[tuple[float, float]]) -> list[Label]:
    return [
        Label(*sheet.pixel(axes, point.x, point.y), *size, first=point.chosen)
        for point, size in zip(plot.points, sizes, strict=True)
    ]


def _find_spots(
    sheet: Sheet, axes: Any, plot: _Plot, sizes: Sequence[tuple[float, float]], right: float
) -> list[Spot] | None:
    bounds = (_LEFT + 3, _TOP, sheet.width - right, sheet.height - _BELOW - 3)
    corners = [sheet.pixel(axes, *corner) for corner in _frontier_line(plot)]
    avoid = [(*a, *b) for a, b in pairwise(corners)]
    blocked = []
    if plot.source is not None:
        level = sheet.pixel(axes, plot.points[0].x, plot.source)[1]
        avoid.append((bounds[0], level, bounds[2], level))
        blocked.append((bounds[0], level, bounds[0] + text_width(_source_text(plot.source)) + 8, level + 22))
    return place(_labels(sheet, axes, plot, sizes), bounds, avoid=avoid, blocked=blocked)


def _source_text(source: float) -> str:
    return f"original {significant(source, 4)}"


def _finish(
    sheet: Sheet, axes: Any, plot: _Plot, names: Sequence[str], sizes: Sequence[tuple[float, float]], spots: Sequence[Spot], *, beside: bool
) -> str:  # fmt: skip
    if plot.words:
        _words(sheet, axes, beside=beside)
    if plot.source is not None:
        _original(sheet, axes, plot.source, beside=beside)
    line = _frontier_line(plot)
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color=stand_in("accent"), linewidth=1.3, alpha=0.4, zorder=2)
    for point in plot.points:
        if point.chosen:
            axes.plot([point.x], [point.y], "o", ms=15, mfc="none", mec=stand_in("accent"), mew=1.4, zorder=4)
        axes.plot(
            [point.x], [point.y], "o", ms=8, mew=1.5, zorder=5,
            mec=stand_in("accent" if point.on else "axis"), mfc=stand_in("accent" if point.on else "paper"),
        )  # fmt: skip
    for index, (point, name, size, spot) in enumerate(zip(plot.points, names, sizes, spots, strict=True)):
        x, y = sheet.pixel(axes, point.x, point.y)
        if spot.line is not None:
            sheet.line((x, spot.line[0]), (y, spot.line[1]), colour="axis", width=0.7)
        # Readers' fonts are narrower than the one that was measured: text starts at the side of its point.
        middle = spot.left + size[0] / 2
        anchor = "center" if abs(middle - x) < 2 else "right" if middle < x else "left"
        start = {"center": middle, "right": spot.left + size[0], "left": spot.left}[anchor]
        sheet.text(
            start, spot.top + size[1] / 2, plain(name), colour="ink" if point.on else "muted", va="center_baseline",
            ha=anchor, weight="bold" if point.chosen else "normal", gid=f"label-{index}",
        )  # fmt: skip
    return sheet.svg(plot.label)


def _original(sheet: Sheet, axes: Any, source: float, *, beside: bool) -> None:
    """The original's level, and beside the axis how far the ticks are from it."""
    axes.axhline(source, color=stand_in("s2"), linewidth=1.4)
    x, y = sheet.pixel(axes, axes.get_xlim()[0], source)
    sheet.text(x + 6, y + 5, _source_text(source), colour="s2", va="top", gid="label-original")
    if not beside:
        return
    for tick in axes.get_yticks():
        if tick != source:
            x, y = sheet.pixel(axes, axes.get_xlim()[1], tick)
            share = f"{100 * (tick / source - 1):+.4g} %".replace("-", "−")
            sheet.text(x + 8, y, share, colour="muted", va="center_baseline")


def _words(sheet: Sheet, axes: Any, *, beside: bool) -> None:
    """The limits of the verdict, and its words where there is room beside the axis."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    before = low
    for found in GRADES:
        after = min(found.kl, high)
        if after <= low or before >= high:
            continue
        top, bottom = (sheet.pixel(axes, right, level)[1] for level in (after, before))
        if beside and bottom - top > _LINE:
            x = sheet.pixel(axes, right, low)[0] + 10
            sheet.text(x, (top + bottom) / 2, found.short, colour="muted", va="center", fontsize=FONT - 1)
        if after < high:
            axes.axhline(after, color=stand_in("axis"), linewidth=0.9, linestyle=(0, (2, 4)), zorder=1)
        before = after
