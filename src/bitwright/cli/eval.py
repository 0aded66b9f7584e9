"""``bitwright eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="eval")
def evaluate_command(
    model: o.Model,
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text file.")],
    against: Annotated[
        str | None, typer.Option("--against", help="The original checkpoint; adds KL divergence and agreement.")
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Sliding windows that advance by this.  [default: non-overlapping]")
    ] = None,
    windows: Annotated[int | None, typer.Option("--windows", help="At most this many windows.  [default: all]")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Dtype of the activations: float32 or bfloat16.")] = "float32",
    kernel: Annotated[str, typer.Option("--kernel", help="auto, or reference (decode, then multiply).")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Perplexity on a text, and the divergence from the original, by the same code for both."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype} is unknown", mend="use float32 or bfloat16")
    from bitwright.api import evaluate
    from bitwright.core.tensor import parse_dtype

    result = evaluate(
        model,
        text=text,
        against=against,
        length=length,
        stride=stride,
        windows=windows,
        dtype=parse_dtype(dtype),
        kernel=kernel,
    )
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    from bitwright.cli.tables import show_evaluation

    show_evaluation(result)
