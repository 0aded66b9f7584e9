"""Charts as SVG text, drawn by matplotlib (extra ``report``). The same data give the same bytes for one version of matplotlib."""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bitwright.errors import InputError
from bitwright.io.text import printable

if TYPE_CHECKING:
    from bitwright.evaluation.outliers import LayerInput, OutlierReport

__all__ = ["outlier_chart", "require_matplotlib"]

#: Columns of the profile; where a layer has more channels, neighbours share one and the largest shows.
_PROFILE_POINTS = 1024
#: Cells of the heat map carry their number up to this many blocks.
_NUMBERED_BLOCKS = 16
#: Characters of a row's name; long ones are cut on the left, where they are all alike.
_NAME = 44
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "bitwright",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.linewidth": 0.6,
}


def require_matplotlib() -> None:
    """InputError where matplotlib is not installed; imports nothing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("charts are drawn by matplotlib", mend="pip install bitwright[report]")


def _plain(text: str) -> str:
    """Names come from strangers' files: no control characters, no mathematical markup."""
    return printable(text).replace("$", r"\$")


def _short(text: str) -> str:
    return text if len(text) <= _NAME else "…" + text[1 - _NAME :]


def outlier_chart(report: OutlierReport) -> str:
    """Largest magnitude of every input by block as a heat map, and the channels of the input that loses most."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(seen.label for seen in report.inputs))
    blocks = sorted({seen.block for seen in report.inputs})
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Names may hold characters that the font for measuring lacks; the viewer of the SVG has its own fonts.
        warnings.filterwarnings("ignore", "Glyph")
        width = 4.2 + max(4.8, 0.42 * min(len(blocks), 40))
        figure = Figure(figsize=(width, 3.9 + 0.32 * len(labels)), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(0.32 * len(labels) + 0.4, 2.4))
        _heat_map(figure, above, report.inputs, labels, blocks)
        _profile(below, report.worst)
        figure.suptitle(_plain(f"{report.model}: inputs of its linear layers over {report.tokens} tokens"), fontsize=11)
        out = io.StringIO()
        # No date: the same report gives the same file.
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _heat_map(
    figure: Any, axes: Any, inputs: Sequence[LayerInput], labels: Sequence[str], blocks: Sequence[int]
) -> None:
    from matplotlib.colors import LogNorm

    grid = [[math.nan] * len(blocks) for _ in labels]
    for seen in inputs:
        if seen.largest > 0:
            grid[labels.index(seen.label)][blocks.index(seen.block)] = seen.largest
    known = [value for row in grid for value in row if not math.isnan(value)]
    # A scale that spans nothing cannot be drawn; nor one of a model whose inputs are all zero.
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else 2 * low)
    image = axes.imshow(grid, aspect="auto", cmap="YlOrRd", interpolation="nearest", norm=norm)
    axes.set_yticks(range(len(labels)), [_plain(_short(label)) for label in labels])
    step = -(-len(blocks) // 20)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_xlabel("block")
    axes.set_title("largest |x|", loc="left", fontsize=9)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.tick_params(which="both", labelsize=7)
    if len(blocks) > _NUMBERED_BLOCKS:
        return
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if norm(value) > 0.7 else "black"
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=7, color=colour)


def _profile(axes: Any, worst: LayerInput) -> None:
    values = worst.profile.tolist()
    span = -(-len(values) // _PROFILE_POINTS)
    heights = [max(values[i : i + span]) for i in range(0, len(values), span)]
    # One path: a line for every channel would make the file ten times as large.
    axes.stairs(heights, [i * span - 0.5 for i in range(len(heights) + 1)], fill=True, color="#4477aa")
    live = sorted(value for value in values if value > 0)
    if live:
        median = (live[(len(live) - 1) // 2] + live[len(live) // 2]) / 2
        axes.axhline(median, color="#222222", linewidth=0.8, linestyle="--")
        axes.text(
            1.005, median, "median", transform=axes.get_yaxis_transform(), fontsize=7, va="center", color="#666666"
        )
    for channel in worst.channels[:3]:
        right = channel.index > 0.8 * len(values)
        axes.annotate(
            f"channel {channel.index}: {channel.ratio:.3g}x",
            (channel.index, channel.largest),
            xytext=(-4 if right else 4, -2),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=7,
            color="#aa3311",
        )
    axes.set_xlim(-0.01 * len(values), 1.01 * len(values))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("channel")
    axes.set_ylabel("largest |x|")
    title = f"block {worst.block}, {_short(worst.label)}: loses {worst.lost_bits_tensor:.1f} of 8 bits per tensor"
    axes.set_title(_plain(title), loc="left", fontsize=9)
