"""The sheet that charts of the page are drawn on: positions in CSS pixels, colours by name, SVG that lives inside HTML.

matplotlib writes a file of its own; inside a page its style rule would reach everything, its identifiers would collide with those of
the next chart, and its colours would not follow the reader's light or dark theme. ``Sheet.svg`` mends that.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from xml.etree import ElementTree

from bitwright.io.text import printable
from bitwright.report.charts import _SETTINGS, require_matplotlib
from bitwright.report.numbers import fixed, significant
from bitwright.report.palette import NAMES, stand_in

__all__ = [
    "FONT",
    "NARROW",
    "WIDE",
    "Chart",
    "Sheet",
    "log_ticks",
    "no_ticks",
    "plain",
    "short",
    "text_width",
    "tick_text",
]

#: Widths in CSS pixels of the two drawings of each chart: for screens and paper, and for telephones.
WIDE, NARROW = 1056, 360
#: Size of all text on charts, in CSS pixels.
FONT = 12.0

_XLINK = "{http://www.w3.org/1999/xlink}"
_HEX = re.compile(r"#[0-9a-f]{6}\b")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_COLOURS = {stand_in(name): f"var(--{name})" for name in NAMES}


@dataclass(frozen=True)
class Chart:
    """One chart in both widths. label: what it shows, for readers who do not see it; names in the SVG are escaped already."""

    wide: str
    narrow: str
    label: str


def plain(text: str) -> str:
    """A stranger's name without control characters, and without mathematical markup."""
    return printable(text).replace("$", r"\$")


def short(text: str, limit: int) -> str:
    """At most ``limit`` characters, the middle left out: both ends of a recipe's name tell it from its neighbours.

    >>> short("gptq-int4-g128-act-order", 13)
    'gptq-i…-order'
    """
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}…{text[len(text) - (limit - 1 - limit // 2) :]}"


def text_width(text: str, size: float = FONT, *, bold: bool = False) -> float:
    """Pixels that a text takes at most: as wide as in DejaVu Sans, which is wider than the fonts of readers."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        _quiet()
        font = FontProperties(size=size, weight="bold" if bold else "normal")
        width = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
    # Fonts of the measuring machine lack these; each fills a square.
    squares = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return float(width) + squares * size


def _quiet() -> None:
    """Names may hold characters that the font for measuring lacks; the reader has fonts of his own."""
    warnings.filterwarnings("ignore", "Glyph")
    warnings.filterwarnings("ignore", "Matplotlib currently does not support")


class Sheet(AbstractContextManager["Sheet"]):
    """A figure of ``width`` x ``height`` CSS pixels; ``key`` tells it from all others of the page."""

    def __init__(self, key: str, width: float, height: float) -> None:
        require_matplotlib()
        self.key, self.width, self.height = key, width, height
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._stack.enter_context(mpl.rc_context({**_SETTINGS, "font.size": FONT, "path.simplify": False}))
        self._stack.enter_context(warnings.catch_warnings())
        _quiet()
        # At 72 dots an inch matplotlib's points are the pixels of the SVG's view box.
        self.figure = Figure(figsize=(self.width / 72, self.height / 72), dpi=72, facecolor="none")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes in a rectangle of pixels from the top left corner, in the page's manner."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box, facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(stand_in("axis"))
        axes.tick_params(which="both", color=stand_in("axis"), labelcolor=stand_in("muted"), length=4, width=0.8, pad=5)
        axes.tick_params(which="minor", length=0)
        axes.xaxis.label.set_color(stand_in("muted"))
        axes.yaxis.label.set_color(stand_in("muted"))
        axes.set_axisbelow(True)
        return axes

    def text(self, x: float, y: float, text: str, *, colour: str = "ink", **options: Any) -> Any:
        """Text at pixels from the top left corner; ``text`` comes from us or went through ``plain``."""
        return self.figure.text(x / self.width, 1 - y / self.height, text, color=stand_in(colour), **options)

    def line(self, xs: Sequence[float], ys: Sequence[float], *, colour: str = "axis", width: float = 0.8) -> None:
        """A polyline through pixels from the top left corner, above everything that was drawn."""
        from matplotlib.lines import Line2D

        self.figure.add_artist(
            Line2D(
                [x / self.width for x in xs], [1 - y / self.height for y in ys], color=stand_in(colour), linewidth=width
            )
        )

    def pixel(self, axes: Any, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies, in pixels from the top left corner."""
        across, up = axes.transData.transform((x, y))
        return float(across), self.height - float(up)

    def svg(self, label: str) -> str:
        """The drawing as an ``svg`` element for HTML."""
        out = io.StringIO()
        self.figure.savefig(
            out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), facecolor="none"
        )
        root = ElementTree.fromstring(out.getvalue())
        _strip(root)
        _rename(root, self.key)
        for element in root.iter():
            _restyle(element)
        root.attrib = {
            "viewBox": f"0 0 {self.width:g} {self.height:g}",
            "role": "img",
            "aria-label": short(printable(label), 240),
            "style": f"max-width:{self.width:g}px",
        }
        return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _strip(root: ElementTree.Element) -> None:
    """No namespaces, which HTML has no need of, no rule for the whole page, no metadata, no ground."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = (element.text or "").strip() or None
        element.tail = None
        for name in list(element.attrib):
            if name.startswith(_XLINK):
                element.attrib[name.removeprefix(_XLINK)] = element.attrib.pop(name)
    for parent in root.iter():
        for child in list(parent):
            empty = child.tag in ("defs", "g") and not len(child) and not child.text
            if child.tag in ("metadata", "style") or empty:
                parent.remove(child)


def _rename(root: ElementTree.Element, key: str) -> None:
    """Identifiers that are used get the figure's key, the others go; ``label-…`` marks what tests and styles look for."""
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used.update(re.findall(r"url\(#([^)]+)\)", value))
        used.add(element.attrib.get("href", "").removeprefix("#"))
    used.discard("")
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in used:
            element.attrib["id"] = f"{key}-{name}"
        elif name.startswith("label-"):
            element.attrib["class"] = "label"
        if "href" in element.attrib:
            element.attrib["href"] = f"#{key}-{element.attrib['href'].removeprefix('#')}"
        for attribute, value in element.attrib.items():
            element.attrib[attribute] = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", value)


def _restyle(element: ElementTree.Element) -> None:
    """Colours by name, the page's font, and no more digits than a pixel has parts."""
    for name in ("d", "x", "y", "transform", "width", "height"):
        if name in element.attrib:
            rounded = _NUMBER.sub(lambda hit: f"{float(hit[0]):.2f}".rstrip("0").rstrip("."), element.attrib[name])
            element.attrib[name] = " ".join(rounded.split())
    style = element.attrib.get("style")
    if style is None:
        return
    kept = [part.strip() for part in style.split(";") if part.strip() and not part.strip().startswith("font-family")]
    element.attrib["style"] = _HEX.sub(lambda hit: _COLOURS.get(hit[0], hit[0]), ";".join(kept))


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round values between two positive limits for a logarithmic axis: powers of ten, with 2 and 5 or 3 between where there is room.

    >>> log_ticks(0.002, 0.3)
    [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    >>> log_ticks(1e-6, 1.0)
    [1e-06, 1e-05, 0.0001, 0.001, 0.01, 0.1, 1.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [
            float(f"{step}e{power}") for power in powers for step in steps if low <= float(f"{step}e{power}") <= high
        ]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def no_ticks() -> Any:
    """For axes whose minor ticks matplotlib would label too."""
    from matplotlib.ticker import NullLocator

    return NullLocator()


def tick_text(value: float) -> str:
    """A tick's label: no zeros at the end, no exponent where it can be read without.

    >>> tick_text(0.0020), tick_text(50.0), tick_text(1e-9)
    ('0.002', '50', '1e-09')
    """
    if value == 0 or not math.isfinite(value):
        return fixed(value, 0)
    return (
        f"{value:.0e}"
        if abs(value) < 1e-5
        else significant(value, 6).rstrip("0").rstrip(".")
        if value % 1
        else f"{value:.0f}"
    )
