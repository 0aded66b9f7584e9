"""``bitwright compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from bitwright.cli import options as o
from bitwright.cli.eval import check_gate, wanted
from bitwright.errors import InputError

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def compare(
    model: o.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for models, results.json and report.html.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", help="YAML file, preset, or gguf:TYPE (also gguf:TYPE+imatrix, gguf:TYPE+gptq); repeatable."
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", help="A set of recipes: all-4bit, all-8bit, small, gguf; repeatable."),
    ] = None,
    text: o.Texts = None,
    length: o.WindowLength = 512,
    stride: o.Stride = None,
    convention: o.ConventionName = None,
    windows: o.Windows = None,
    dtype: o.Activations = "float32",
    batch: o.EvalBatch = 1,
    device: o.Device = "auto",
    tasks: o.Tasks = None,
    task_limit: o.TaskLimit = None,
    allow_code: o.AllowCode = False,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Measure the error of every layer too.")] = True,
    bench: o.Bench = False,
    gate: o.Gate = None,
    calibration: o.CalibrationFile = None,
    samples: o.Samples = None,
    calibration_length: Annotated[
        int | None, typer.Option("--calibration-length", help="Tokens a calibration sequence.  [default: 512]")
    ] = None,
    seed: o.Seed = None,
    keep: Annotated[str, typer.Option("--keep-models", help="all, or none: delete each once it is measured.")] = "all",
    max_memory: o.MaxMemory = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Use a folder that holds something else already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Quantize a model with several recipes, measure all of them alike, and draw a report. Continues where it was interrupted."""
    from bitwright.cli.measured_tables import show_document
    from bitwright.cli.progress import ConsoleProgress
    from bitwright.comparing import compare_recipes, entries_of
    from bitwright.io.hub import resolve_model
    from bitwright.report.page import require_page

    # Before anything is quantized.
    require_page()
    if keep not in ("all", "none"):
        raise InputError(f"--keep-models {keep} is unknown", mend="use all or none")
    given = {"text": calibration, "samples": samples, "length": calibration_length}
    changes: dict[str, Any] = {} if seed is None else {"seed": seed}
    if any(value is not None for value in given.values()):
        changes["calibration"] = {key: value for key, value in given.items() if value is not None}
    entries = entries_of(recipe or [], preset or [], changes)
    asked = wanted(
        text=text, length=length, stride=stride, convention=convention, windows=windows, dtype=dtype, kernel="auto", batch=batch,
        device=device, cache=True, tasks=tasks, task_limit=task_limit, allow_code=allow_code, layers=layers, bench=bench,
        gate=gate,
    )  # fmt: skip
    with ConsoleProgress() as progress:
        found = compare_recipes(
            resolve_model(model), entries, output, asked, keep=cast(Literal["all", "none"], keep), overwrite=overwrite,
            max_memory_bytes=o.parse_bytes(max_memory) if max_memory else None, progress=progress,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        show_document(found)
        typer.echo(f"The report: {output / 'report.html'}; the figures: {output / 'results.json'}")
    check_gate(found)
