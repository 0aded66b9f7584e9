"""``bitwright eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.comparing import Wanted
    from bitwright.evaluating import Convention
    from bitwright.report.document import Document
    from bitwright.runtime.bench import BenchOptions

__all__ = ["app", "wanted"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="eval")
def evaluate_command(
    model: o.Model,
    text: o.Texts = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The original checkpoint; adds KL divergence and agreement.")
    ] = None,
    length: o.WindowLength = 512,
    stride: o.Stride = None,
    convention: o.ConventionName = None,
    windows: o.Windows = None,
    dtype: o.Activations = "float32",
    kernel: Annotated[str, typer.Option("--kernel", help="auto, or reference (decode, then multiply).")] = "auto",
    batch: o.EvalBatch = 1,
    device: o.Device = "auto",
    cache: o.UseCache = True,
    tasks: o.Tasks = None,
    task_limit: o.TaskLimit = None,
    allow_code: o.AllowCode = False,
    layers: o.LayerErrors = False,
    bench: o.Bench = False,
    gate: o.Gate = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report page to this file.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Enter the figures into the checkpoint's model card (README.md).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Perplexity, divergence from the original, tasks: measured by the same code for every layout. Exit code 3 where a gate is missed."""
    from bitwright.cli.progress import ConsoleProgress
    from bitwright.comparing import measure_one
    from bitwright.io.hub import resolve_model

    asked = wanted(
        text=text, length=length, stride=stride, convention=convention, windows=windows, dtype=dtype, kernel=kernel, batch=batch,
        device=device, cache=cache, tasks=tasks, task_limit=task_limit, allow_code=allow_code, layers=layers, bench=bench, gate=gate,
    )  # fmt: skip
    path = resolve_model(model, file=True)
    source = None if against is None else resolve_model(against, file=True)
    if card and not path.is_dir():
        raise InputError("a GGUF file has no model card", mend="drop --card")
    with ConsoleProgress() as progress:
        found = measure_one(path, source, asked, progress=progress)
    if html is not None:
        from bitwright.io.files import write_text
        from bitwright.report.page import render_page

        write_text(html, render_page(found))
    if card:
        from bitwright.report.measured_card import enter_figures

        enter_figures(path / "README.md", found)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        from bitwright.cli.measured_tables import show_document

        show_document(found)
    check_gate(found)


def wanted(
    *, text: list[str] | None, length: int, stride: int | None, convention: str | None, windows: int | None, dtype: str,
    kernel: str, batch: int, device: str, cache: bool, tasks: str | None, task_limit: int | None, allow_code: bool,
    layers: bool, bench: bool, gate: str | None,
) -> Wanted:  # fmt: skip
    """Flags as what is to be measured. InputError for what makes no sense."""
    if dtype not in ("float32", "bfloat16", "float16", "checkpoint"):
        raise InputError(f"--dtype {dtype} is unknown", mend="use float32, bfloat16, float16 or checkpoint")
    from bitwright.comparing import Wanted
    from bitwright.core.tensor import parse_dtype
    from bitwright.evaluating import read_texts
    from bitwright.evaluation.gate import parse_gate

    limits = parse_gate(gate) if gate is not None else ()
    return Wanted(
        texts=read_texts(text) if text else None,
        length=length,
        stride=stride,
        convention=cast("Convention | None", convention),
        windows=windows,
        dtype=None if dtype == "checkpoint" else parse_dtype(dtype),
        kernel=kernel,
        batch_size=batch,
        device=device,
        cache=cache,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()) if tasks else (),
        task_options={"limit": task_limit, "allow_code_execution": allow_code} if tasks else {},
        layers=layers,
        speed=_speed(device) if bench else None,
        gate=limits,
    )


def _speed(device: str) -> BenchOptions:
    """A short measurement; ``bitwright bench`` has all options."""
    from bitwright.runtime.bench import BenchOptions

    return BenchOptions(prompt_tokens=256, new_tokens=64, batch=(1,), repetitions=3, device=device)


def check_gate(found: Document) -> None:
    """Say for every candidate which limit it misses; VerifyError (exit code 3) where one does."""
    from bitwright.errors import VerifyError

    missed = [
        f"{candidate.name}: {line.sentence}" if len(found.candidates) > 1 else line.sentence
        for candidate in found.candidates
        for line in (candidate.gate.lines if candidate.gate is not None else ())
        if not line.passed
    ]
    if missed:
        raise VerifyError(f"quality gate: {'; '.join(missed)}", mend="use more bits, or a method that is calibrated")
