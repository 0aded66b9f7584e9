"""Charts of what happens inside the model: heat maps by role and block, errors along the blocks, weights before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.evaluation.record import BlockError, LayerError, WeightHistogram
from bitwright.report.document import Activation
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
from bitwright.report.figures_labels import spread
from bitwright.report.palette import HEAT_LEVELS, SERIES, stand_in

__all__ = [
    "HeatMap",
    "Scale",
    "activation_maps",
    "block_chart",
    "heat_chart",
    "histogram_chart",
    "layer_map",
    "scale_of",
]

#: Cells carry their number where at least this many pixels belong to each.
_NUMBERED = 27.0
_ROW = 27.0
_MULTIPLE = 500.0
#: An expert, or another numbered part of a role.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class HeatMap:
    """rows: labels; columns: block numbers; values: by (row, column), absent where nothing is known."""

    rows: tuple[str, ...]
    columns: tuple[int, ...]
    values: Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Scale:
    """From values to steps of colour. low is harmless; it is the larger number where smaller ones are worse (decibels)."""

    low: float
    high: float
    log: bool = False

    def level(self, value: float) -> int:
        """0 to ``HEAT_LEVELS - 1``."""
        low, high, at = (
            (math.log(max(x, 1e-300)) for x in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        if not math.isfinite(at):
            return 0 if (at > 0) == (self.low > self.high) else HEAT_LEVELS - 1
        share = (at - low) / (high - low) if high != low else 0.0
        return min(HEAT_LEVELS - 1, max(0, int(share * HEAT_LEVELS)))


def layer_map(layers: Sequence[LayerError]) -> HeatMap | None:
    """Signal-to-noise ratio in decibels of every linear's output; numbered parts (experts) are one row, the worst of them."""
    inside = [one for one in layers if one.block is not None]
    if not inside:
        return None
    values: dict[tuple[str, int], float] = {}
    rows: dict[str, None] = {}
    for one in inside:
        role = _NUMBER.sub("*", one.role)
        rows[role] = None
        assert one.block is not None
        key = (role, one.block)
        values[key] = min(values.get(key, math.inf), math.inf if one.snr_db is None else one.snr_db)
    return HeatMap(tuple(rows), tuple(sorted({block for _, block in values})), values)


def activation_maps(activations: Sequence[Activation]) -> tuple[HeatMap, HeatMap]:
    """Largest magnitude of every input, and the bits of int8 that one scale for the tensor loses."""
    rows = tuple(dict.fromkeys(one.label for one in activations))
    columns = tuple(sorted({one.block for one in activations}))
    largest = {(one.label, one.block): one.largest for one in activations}
    lost = {(one.label, one.block): one.lost_bits_tensor for one in activations}
    return HeatMap(rows, columns, largest), HeatMap(rows, columns, lost)


def scale_of(maps: Sequence[HeatMap], *, log: bool = False, falling: bool = False, least: int = 6) -> Scale:
    """One scale for all of them. falling: small numbers are the bad ones; least: what it spans at least, where it is not logarithmic."""
    values = [value for one in maps for value in one.values.values() if math.isfinite(value) and (value > 0 or not log)]
    if not values:
        return Scale(1.0, 2.0, log)
    low, high = min(values), max(values)
    if log:
        return Scale(low, high, log)
    low, high = math.floor(low), math.ceil(high)
    # Differences that mean nothing are not stretched over all colours.
    missing = max(0, least - (high - low))
    low, high = low - missing // 2, high + missing - missing // 2
    return Scale(high, low) if falling else Scale(low, high)


def heat_chart(key: str, found: HeatMap, scale: Scale, label: str, *, main: bool) -> Chart:
    """main: over the whole width, with numbers; else half of it, and the same drawing on telephones."""
    wide = _heat(f"{key}-w", WIDE if main else _MULTIPLE, found, scale, label)
    return Chart(wide, _heat(f"{key}-n", NARROW, found, scale, label), label)


def _heat(key: str, width: float, found: HeatMap, scale: Scale, label: str) -> str:
    names = [short(row, 44 if width > 600 else 22 if width > 400 else 16) for row in found.rows]
    left = min(max(text_width(plain(name)) for name in names) + 12, 0.45 * width)
    top, below, right = 4.0, 38.0, 4.0
    cell = (width - left - right) / len(found.columns)
    # A model of three blocks needs no cells as wide as a hand.
    cell = min(cell, 120.0)
    row = _ROW if width > 400 else 24.0
    height = top + row * len(names) + below
    with Sheet(key, width, height) as sheet:
        axes = sheet.axes(left, top, cell * len(found.columns), row * len(names))
        axes.set_xlim(0, len(found.columns))
        axes.set_ylim(len(names), 0)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, pad=6)
        axes.set_yticks([i + 0.5 for i in range(len(names))], [plain(name) for name in names])
        widest = text_width(str(found.columns[-1]), FONT) + 6
        step = max(1, math.ceil(widest / cell))
        step = next(nice for nice in (1, 2, 4, 5, 8, 10, 16, 20, 40, 50, 100, step) if nice >= step)
        shown = range(0, len(found.columns), step)
        axes.set_xticks([i + 0.5 for i in shown], [str(found.columns[i]) for i in shown])
        axes.set_xlabel("block", labelpad=2)
        _cells(axes, found, scale, gap=1.0 / cell if cell > 8 else 0.0, lift=1.0 / row)
        longest = max((len(_cell_text(value, scale)) for value in found.values.values()), default=1)
        if cell >= max(_NUMBERED, 7.0 * longest):
            _numbers(axes, found, scale)
        return sheet.svg(label)


def _cells(axes: Any, found: HeatMap, scale: Scale, *, gap: float, lift: float) -> None:
    """One path for all cells of a colour: a path each would make the page five times as large."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    at = {column: i for i, column in enumerate(found.columns)}
    corners: dict[int, list[tuple[float, float]]] = {}
    for y, row in enumerate(found.rows):
        for column, x in at.items():
            value = found.values.get((row, column))
            if value is None or math.isnan(value):
                continue
            right, bottom = x + 1 - gap, y + 1 - lift
            corners.setdefault(scale.level(value), []).extend(
                [(x, y), (right, y), (right, bottom), (x, bottom), (x, y)]
            )
    for level, points in sorted(corners.items()):
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(points) // 5)
        patch = PathPatch(Path(points, codes), facecolor=stand_in(f"h{level}"), linewidth=0, edgecolor="none")
        patch.set_clip_on(False)
        patch.set_snap(False)
        axes.add_patch(patch)


def _numbers(axes: Any, found: HeatMap, scale: Scale) -> None:
    at = {column: i for i, column in enumerate(found.columns)}
    for (row, column), value in found.values.items():
        if not math.isnan(value):
            axes.text(
                at[column] + 0.5, found.rows.index(row) + 0.5, _cell_text(value, scale), ha="center", va="center_baseline",
                color=stand_in(f"t{scale.level(value)}"), fontsize=FONT - 1,
            )  # fmt: skip


def _cell_text(value: float, scale: Scale) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    few = scale.log or abs(scale.high - scale.low) < 12
    return f"{value:.1f}" if few and abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"


def block_chart(blocks: Sequence[BlockError], others: Mapping[str, Sequence[BlockError]], name: str) -> Chart | None:
    """Error of every block's output: with the source's input, with the quantized model's own, and the latter of other candidates."""
    known = [one for one in blocks if 0 < one.own < math.inf or 0 < one.total < math.inf]
    if len(known) < 2:
        return None
    label = f"Relative error of every block's output, own and total, of {name}"

    def draw(key: str, width: float) -> str:
        return _lines(key, width, known, others, label)

    return Chart(draw("blocks-w", WIDE), draw("blocks-n", NARROW), label)


def _lines(
    key: str, width: float, blocks: Sequence[BlockError], others: Mapping[str, Sequence[BlockError]], label: str
) -> str:
    narrow = width < 600
    series: list[tuple[str, list[tuple[int, float]], str, Any, float]] = [
        ("total", [(one.block, one.total) for one in blocks if 0 < one.total < math.inf], "s1", "-", 2.2),
        ("own", [(one.block, one.own) for one in blocks if 0 < one.own < math.inf], "s2", (0, (5, 2)), 1.8),
    ]
    for index, (name, found) in enumerate(others.items()):
        colour = (*SERIES[2:], "muted")[index % 4]
        series.append(
            (
                short(name, 22),
                [(one.block, one.total) for one in found if 0 < one.total < math.inf],
                colour,
                (0, (1, 2)),
                1.4,
            )
        )
    series = [one for one in series if one[1]]
    names = [plain(one[0]) for one in series]
    left, top, below = 62.0, 26.0, 44.0
    # On telephones the names stand above the plot, one a line; elsewhere at the ends of their lines.
    key_rows = len(series) if narrow else 0
    right = 14.0 if narrow else max(text_width(name) for name in names) + 24
    height = (320.0 if narrow else 360.0) + 18 * key_rows
    with Sheet(key, width, height) as sheet:
        axes = sheet.axes(left, top + 18 * key_rows, width - left - right, height - top - below - 18 * key_rows)
        values = [value for one in series for _, value in one[1]]
        low, high = min(values) / 1.25, max(values) * 1.25
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        ticks = log_ticks(low, high)
        axes.yaxis.set_minor_locator(no_ticks())
        axes.set_yticks(ticks, [tick_text(tick) for tick in ticks])
        first, last = min(x for one in series for x, _ in one[1]), max(x for one in series for x, _ in one[1])
        axes.set_xlim(first - 0.02 * (last - first), last + 0.01 * (last - first))
        axes.xaxis.set_major_locator(_whole())
        axes.set_xlabel("block")
        axes.grid(axis="y", color=stand_in("line"), linewidth=0.8)
        sheet.text(4, 10, "relative error of the block's output", colour="muted", va="center")
        for _, points, colour, dashes, thickness in reversed(series):
            axes.plot(*zip(*points, strict=True), color=stand_in(colour), linestyle=dashes, linewidth=thickness)
        ends = [sheet.pixel(axes, *one[1][-1]) for one in series]
        if narrow:
            for i, (name, one) in enumerate(zip(names, series, strict=True)):
                y = top + 18 * i + 4
                _swatch(sheet, left, y, one)
                sheet.text(left + 34, y, name, va="center")
        else:
            order = sorted(range(len(series)), key=lambda i: ends[i][1])
            tops = spread([ends[i][1] - 8 for i in order], [16.0] * len(order), top, height - below)
            for i, at in zip(order, tops, strict=True):
                x, y = ends[i]
                sheet.line((x + 3, x + 12), (y, at + 8), colour="axis", width=0.7)
                sheet.text(x + 16, at + 8, names[i], colour=series[i][2], va="center_baseline", gid=f"label-{i}")
        return sheet.svg(label)


def _swatch(sheet: Sheet, left: float, y: float, one: tuple[str, list[tuple[int, float]], str, Any, float]) -> None:
    from matplotlib.lines import Line2D

    sheet.figure.add_artist(
        Line2D(
            [left / sheet.width, (left + 26) / sheet.width], [1 - y / sheet.height] * 2, color=stand_in(one[2]),
            linestyle=one[3], linewidth=one[4],
        )
    )  # fmt: skip


def _whole() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=2)


def histogram_chart(histograms: Sequence[WeightHistogram]) -> Chart | None:
    """Weights of up to six modules, before as an area and after as a line."""
    shown = [one for one in histograms if _drawable(one)][:6]
    if not shown:
        return None
    label = f"Histograms of the weights of {len(shown)} modules, before and after"

    def draw(key: str, width: float, across: int) -> str:
        return _histograms(key, width, shown, across, label)

    return Chart(draw("weights-w", WIDE, min(3, len(shown))), draw("weights-n", NARROW, 1), label)


def _drawable(found: WeightHistogram) -> bool:
    """Whether there is an axis, and something on it."""
    numbers = (*found.edges, *found.source, *found.model)
    lengths = len(found.source) == len(found.model) == len(found.edges) - 1
    return (
        lengths
        and all(map(math.isfinite, numbers))
        and found.edges[-1] > found.edges[0]
        and any(found.source)
        and any(found.model)
    )


def _histograms(key: str, width: float, shown: Sequence[WeightHistogram], across: int, label: str) -> str:
    gap, top, tall, below = 28.0, 26.0, 150.0 if across > 1 else 120.0, 34.0
    each = min((width - gap * (across - 1)) / across, 480.0)
    rows = math.ceil(len(shown) / across)
    with Sheet(key, width, rows * (top + tall + below)) as sheet:
        for index, one in enumerate(shown):
            left, upper = (index % across) * (each + gap), (index // across) * (top + tall + below)
            axes = sheet.axes(left + 2, upper + top, each - 4, tall)
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
            axes.stairs(one.source, one.edges, fill=True, color=stand_in("axis"), alpha=0.35, linewidth=0)
            axes.stairs(one.model, one.edges, color=stand_in("s1"), linewidth=1.4, baseline=None)
            axes.set_xlim(one.edges[0], one.edges[-1])
            axes.set_ylim(0, 1.05 * max(*one.source, *one.model))
            axes.xaxis.set_major_locator(_few())
            axes.xaxis.set_major_formatter(_tick_formatter())
            sheet.text(left + 2, upper + 12, plain(short(one.module, int(each / 8.2))), va="center")
        return sheet.svg(label)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, steps=[1, 2, 5, 10], prune="both")


def _tick_formatter() -> Callable[[float, int], str]:
    return lambda value, _: tick_text(round(value, 10)).replace("-", "−")
