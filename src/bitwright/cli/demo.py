"""``bitwright demo``: the embedded model, quantized and measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.errors import InputError

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

#: name -> options of ``bitwright.quantize``
_RECIPES: dict[str, dict[str, Any]] = {
    "rtn 4-bit": {"method": "rtn", "bits": 4},
    "gptq 4-bit": {"method": "gptq", "bits": 4},
    "gptq 3-bit": {"method": "gptq", "bits": 3, "layout": "gptq"},
}


def find_example() -> Path:
    """The folder of the embedded model: in a source checkout, or where the wheel put it."""
    here = Path(__file__).resolve()
    for folder in (here.parents[3] / "examples" / "storylm-8m", here.parents[1] / "_examples" / "storylm-8m"):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        "the embedded model is not in this installation: the wheel leaves it out (17 MB)",
        mend="clone the repository and run `make demo`, or name a model folder of your own with --model",
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")] = Path("demo-output"),
    model: Annotated[Path | None, typer.Option("--model", help="Another model folder.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Another calibration and evaluation text.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Calibration sequences of 512 tokens.")] = 64,
    windows: Annotated[int, typer.Option("--windows", help="Evaluation windows of 512 tokens.")] = 32,
) -> None:
    """Quantize the embedded model three ways and print a quality table."""
    from bitwright import api
    from bitwright.cli.progress import ConsoleProgress
    from bitwright.cli.tables import print_table, size

    folder = model or find_example()
    calibration, held_out = _split(text or folder.parent / "storylm-8m-selfgen.txt", output)
    rows: list[tuple[str, ...]] = []
    for name, options in _RECIPES.items():
        began = time.monotonic()
        target = output / name.replace(" ", "-")
        with ConsoleProgress() as progress:
            progress.note(f"quantizing with {name}")
            result = api.quantize(
                folder, target, overwrite=True, resume="never", progress=progress,
                calibration={"text": str(calibration), "samples": samples, "length": 512}, **options,
            )  # fmt: skip
        seconds = time.monotonic() - began
        found = api.evaluate(target, against=folder, text=held_out, windows=windows).quality
        assert found.source is not None
        assert found.kl is not None
        assert found.top1 is not None
        if not rows:
            rows.append(
                ("original", size(result.plan.source_bytes), "16.000", f"{found.source.perplexity:.2f}", "", "", "")
            )
        rows.append(
            (
                name, size(result.plan.weight_file_bytes), f"{result.plan.quantized_bits_per_weight:.3f}",
                f"{found.model.perplexity:.2f}", f"{found.kl.mean:.5f}", f"{100 * found.top1:.1f} %", f"{seconds:.1f} s",
            )
        )  # fmt: skip
    print_table(("", "weight files", "bits/weight*", "perplexity", "mean KL", "top-1 equal", "time"), rows)
    typer.echo(f"* of the quantized layers. Measured on {windows} x 512 tokens that calibration did not see.")
    typer.echo(f"The quantized checkpoints are in {output}/; look at one with: bitwright inspect '{output}/gptq-4-bit'")


def _split(text: Path, output: Path) -> tuple[Path, Path]:
    """Calibration and evaluation halves of a text, so that nothing is measured on what it was fitted to."""
    try:
        content = text.read_text(encoding="utf-8")
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} or {output}: {error}", mend="check --text and --output") from error
    middle = content.find("\n", 2 * len(content) // 3)
    middle = middle if middle > 0 else 2 * len(content) // 3
    parts = (output / "calibration.txt", output / "evaluation.txt")
    parts[0].write_text(content[:middle], encoding="utf-8")
    parts[1].write_text(content[middle:], encoding="utf-8")
    return parts
