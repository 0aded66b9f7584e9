"""``bitwright analyze``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.evaluation.outliers import OutlierReport

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def analyze(
    model: o.Model,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="Text as for calibration: file, JSONL, dataset.  [default: the model's own samples]"
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Sequences.")] = 32,
    length: Annotated[int, typer.Option("--length", help="Tokens a sequence.")] = 512,
    threshold: Annotated[float, typer.Option("--threshold", help="Magnitude above which a value is an outlier.")] = 6.0,
    top: Annotated[int, typer.Option("--top", help="Worst channels listed for each input.")] = 5,
    chart: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE.svg", help="Draw a heat map and the worst input's channels.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling and of the choice of sequences.")] = 0,
    max_memory: o.MaxMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Outliers among the inputs of every linear layer, and what they mean for 8-bit inputs. Nothing is quantized."""
    if chart is not None:
        _check_chart(chart)
    from bitwright.api import analyze as run
    from bitwright.cli.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        report = run(
            model,
            text=text,
            samples=samples,
            length=length,
            threshold=threshold,
            top=top,
            seed=seed,
            max_memory_bytes=o.parse_bytes(max_memory) if max_memory else None,
            progress=progress,
        )
    if chart is not None:
        _draw(report, chart)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
        return
    _show(report)


def _check_chart(chart: Path) -> None:
    """Refuse before the model runs what could not be drawn afterwards."""
    from bitwright.report.charts import require_matplotlib

    if chart.suffix.lower() != ".svg":
        raise InputError(f"--chart {chart}: only SVG is drawn", mend="name a file that ends in .svg")
    if not chart.absolute().parent.is_dir():
        raise InputError(f"--chart {chart}: its folder does not exist", mend="create the folder first")
    require_matplotlib()


def _draw(report: OutlierReport, chart: Path) -> None:
    from bitwright.io.files import os_error
    from bitwright.report.charts import outlier_chart

    drawn = outlier_chart(report)
    try:
        chart.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise os_error(error, f"writing {chart}") from error


def _share(value: float) -> str:
    """A share in percent, where nothing shows as such.

    >>> _share(0.0), _share(0.00123)
    ('0', '0.123')
    """
    return f"{100 * value:.3g}" if value else "0"


def _show(report: OutlierReport) -> None:
    from bitwright.cli.tables import print_table
    from bitwright.io.text import printable

    rows = [
        (
            f"{seen.block} {seen.label}",
            f"{seen.largest:.4g}",
            f"{seen.sigma:.3g}",
            "-" if seen.kurtosis is None else f"{seen.kurtosis:.3g}",
            _share(seen.share_above),
            _share(seen.share_above_6_sigma),
            ", ".join(f"{c.index} {c.ratio:.3g}x" for c in seen.channels),
            f"{seen.lost_bits_tensor:.1f}",
            f"{seen.lost_bits_token:.1f}",
            seen.advice,
        )
        for seen in report.inputs
    ]
    above = f"% above {report.threshold:g}"
    headings = (
        "block, layers",
        "max |x|",
        "sigma",
        "kurtosis",
        above,
        "% above 6 sigma",
        "worst channels",
        "bits lost: tensor",
    )
    print_table((*headings, "token", "advice"), rows)
    for advice, count in report.to_json()["advice"].items():
        if count:
            meaning = next(seen.meaning for seen in report.inputs if seen.advice == advice)
            typer.echo(f"{count:>4} of {len(report.inputs)}  {advice + ':':<13}{meaning}")
    typer.echo(f"text: {printable(report.text)}, {report.tokens} tokens")
