"""Charts of speed and memory: one panel a quantity, one line a model, in groups of the same engine, device and batch size.

Bars start at zero and carry their number; every group has its own scale, since it is the models of one group that are to be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwright.evaluation.record import Speed, Spread
from bitwright.io.text import printable
from bitwright.report.figures import FONT, NARROW, WIDE, Chart, Sheet, plain, short, text_width
from bitwright.report.numbers import column
from bitwright.report.palette import stand_in

__all__ = ["Group", "groups_of", "speed_charts"]

#: Characters of a name.
_NAME, _NARROW_NAME = 28, 16


@dataclass(frozen=True)
class Group:
    """Models that were measured alike. title: engine, device, batch."""

    title: str
    rows: tuple[tuple[str, Speed], ...]


_Range = tuple[float, float, float]


@dataclass(frozen=True)
class _Panel:
    """One quantity. value: median, low and high, or None."""

    title: str
    value: Callable[[Speed], _Range | None]
    colour: str
    most_is_best: bool


def _spread(found: Spread | None) -> _Range | None:
    if found is None or not all(math.isfinite(value) for value in (found.median, found.low, found.high)):
        return None
    return found.median, found.low, found.high


def _memory(one: Speed) -> _Range | None:
    peak = one.peak_device_bytes if one.peak_device_bytes is not None else one.peak_resident_bytes
    return None if peak is None else (peak / 1e9, peak / 1e9, peak / 1e9)


_PANELS = (
    _Panel("time to first token, ms", lambda one: _spread(one.time_to_first_token_ms), "s2", False),
    _Panel("new tokens a second", lambda one: _spread(one.new_tokens_per_s), "s1", True),
    _Panel("peak memory, GB", _memory, "s4", False),
)


def groups_of(named: Sequence[tuple[str, Sequence[Speed]]]) -> list[Group]:
    """Measurements by engine, device and batch, in the order they come in; those without figures are left out."""
    found: dict[tuple[str, str, int], list[tuple[str, Speed]]] = {}
    for name, speeds in named:
        for one in speeds:
            if any(panel.value(one) for panel in _PANELS):
                found.setdefault((one.engine, one.device, one.batch), []).append((name, one))
    return [
        Group(f"{engine} on {device}, batch {batch}", tuple(rows)) for (engine, device, batch), rows in found.items()
    ]


def speed_charts(groups: Sequence[Group]) -> list[tuple[str, Chart]]:
    """One chart a group, with its title: medians as bars with the range of the repetitions."""
    panels = [panel for panel in _PANELS if any(panel.value(one) for group in groups for _, one in group.rows)]
    # All groups have the same columns, so that they stand below each other.
    names = {plain(short(name, _NAME)): None for group in groups for name, _ in group.rows}
    left = min(max((text_width(name) for name in names), default=0.0) + 12, 0.42 * WIDE)
    found = []
    for index, group in enumerate(groups):
        label = f"{', '.join(panel.title for panel in panels)}: {printable(group.title)}"
        wide = _draw(f"speed{index}-w", WIDE, group, panels, label, left)
        found.append((group.title, Chart(wide, _draw(f"speed{index}-n", NARROW, group, panels, label, None), label)))
    return found


def _draw(key: str, width: float, group: Group, panels: Sequence[_Panel], label: str, left: float | None) -> str:
    """Wide, with the width of the names given: all panels beside each other; narrow: below each other."""
    narrow = left is None
    row, limit, between = (17.0, _NARROW_NAME, 32.0) if narrow else (20.0, _NAME, 26.0)
    names = [plain(short(name, limit)) for name, _ in group.rows]
    edge = min(max(text_width(name) for name in names) + 12, 0.42 * width) if left is None else left
    stacks = [[panel] for panel in panels] if narrow else [list(panels)]
    tall = between + row * len(names)
    with Sheet(key, width, tall * len(stacks) + 4) as sheet:
        for index, together in enumerate(stacks):
            upper = index * tall
            each = (width - edge - 26.0 * (len(together) - 1)) / len(together)
            for place, panel in enumerate(together):
                x = edge + place * (each + 26.0)
                sheet.text(x, upper + between - 13, panel.title, colour="muted", va="center")
                _bars(sheet, group, panel, (x, upper + between, each), row)
            for i, name in enumerate(names):
                sheet.text(edge - 10, upper + between + (i + 0.5) * row, name, ha="right", va="center_baseline")
        return sheet.svg(label)


def _bars(sheet: Sheet, group: Group, panel: _Panel, corner: tuple[float, float, float], row: float) -> None:
    """The bars of one group and quantity, from ``corner``: left, top and width."""
    left, top, width = corner
    found = [panel.value(one) for _, one in group.rows]
    values = [None if one is None else one[0] for one in found]
    known = [value for value in values if value is not None]
    if not known:
        sheet.text(left, top + row / 2, "not measured", colour="muted", va="center_baseline", fontsize=FONT - 1)
        return
    texts = column(values, 3)
    best = max(known) if panel.most_is_best else min(known)
    # Room for the numbers at the ends of the bars.
    room = max(text_width(text) for text in texts) + 14
    scale = (width - room) / (max(one[2] for one in found if one is not None) or 1.0)
    axes = sheet.axes(left, top, width, row * len(found))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(row * len(found), 0)
    colour = stand_in(panel.colour)
    for i, (one, text) in enumerate(zip(found, texts, strict=True)):
        middle = (i + 0.5) * row
        if one is None:
            axes.text(4, middle, "not measured", color=stand_in("muted"), va="center_baseline", fontsize=FONT - 1)
            continue
        median, low, high = (scale * value for value in one)
        axes.barh(middle, median, height=0.62 * row, color=colour, alpha=0.3, linewidth=0)
        axes.plot(
            [median, median],
            [middle - 0.31 * row, middle + 0.31 * row],
            color=colour,
            linewidth=2,
            solid_capstyle="butt",
        )
        if high > low:
            axes.plot([low, high], [middle, middle], color=colour, linewidth=1.2, solid_capstyle="butt")
        axes.text(
            max(high, median) + 6, middle, text, color=stand_in("ink"), va="center_baseline", fontsize=FONT - 1,
            weight="bold" if len(known) > 1 and one[0] == best else "normal",
        )  # fmt: skip
