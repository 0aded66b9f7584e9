"""The colours of the page, on light and on dark ground. Charts name them; the page's style sheet says what they are.

Contrast is computed as in WCAG 2.2 ("relative luminance", "contrast ratio").
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["DARK", "HEAT_LEVELS", "LIGHT", "NAMES", "SERIES", "contrast", "ramp", "stand_in"]

#: Steps of a heat map; as many as a reader can tell from each other, and few enough for one path each.
HEAT_LEVELS = 12
SERIES = ("s1", "s2", "s3", "s4", "s5")

_LIGHT = {
    "paper": "#ffffff", "soft": "#f4f5f7", "ink": "#16191d", "muted": "#59616c", "line": "#dfe2e6", "axis": "#8d95a0",
    "accent": "#1a5fb4", "good": "#0b6e4a", "warn": "#8a5200", "bad": "#b3261e",
    "s1": "#1a5fb4", "s2": "#c2570c", "s3": "#0f7b62", "s4": "#7a4fb0", "s5": "#b0305c",
}  # fmt: skip
_DARK = {
    "paper": "#14171b", "soft": "#1c2026", "ink": "#e8eaed", "muted": "#a0a8b3", "line": "#2e343c", "axis": "#727b87",
    "accent": "#7db4f5", "good": "#5cc995", "warn": "#e6b450", "bad": "#f48b83",
    "s1": "#7db4f5", "s2": "#f0a35e", "s3": "#58c7a6", "s4": "#c0a4f0", "s5": "#f28aa8",
}  # fmt: skip


def ramp(stops: Sequence[str], count: int) -> list[str]:
    """Colours at even steps along straight lines between the stops, in the cube of gamma-corrected RGB.

    >>> ramp(["#000000", "#0000ff", "#00ffff"], 5)
    ['#000000', '#000080', '#0000ff', '#0080ff', '#00ffff']
    """
    points = [_channels(stop) for stop in stops]
    found = []
    for step in range(count):
        place = step / (count - 1) * (len(points) - 1)
        low = min(int(place), len(points) - 2)
        mixed = (a + (place - low) * (b - a) for a, b in zip(points[low], points[low + 1], strict=True))
        found.append("#" + "".join(f"{int(255 * value + 0.5):02x}" for value in mixed))
    return found


def contrast(first: str, second: str) -> float:
    """Contrast ratio, 1 to 21.

    >>> round(contrast("#ffffff", "#000000")), contrast("#777777", "#777777")
    (21, 1.0)
    """
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _channels(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _with_heat(colours: dict[str, str], stops: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """h0 .. : from harmless, next to the ground, to what stands out; t0 ..: the text on each, whichever of two can be read."""
    steps = ramp(stops, HEAT_LEVELS)
    return {
        **colours,
        **{f"h{i}": step for i, step in enumerate(steps)},
        **{f"t{i}": max(texts, key=lambda text: contrast(text, step)) for i, step in enumerate(steps)},
    }


LIGHT = _with_heat(_LIGHT, ("#f1f4f7", "#fbe6b4", "#f7b860", "#e5703a", "#b52a33", "#6f1030"), ("#16191d", "#ffffff"))
DARK = _with_heat(_DARK, ("#20252c", "#4a3036", "#8a3d3a", "#cc6236", "#f3a850", "#ffedc2"), ("#ffffff", "#000000"))
NAMES = tuple(LIGHT)


def stand_in(name: str) -> str:
    """A colour for matplotlib that nothing else has; it becomes ``var(--name)`` in the page.

    >>> stand_in("paper"), stand_in("soft")
    ('#0a0b01', '#0a0b02')
    """
    return f"#0a0b{NAMES.index(name) + 1:02x}"
