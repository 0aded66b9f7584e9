"""``bitwright imatrix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def imatrix(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder or hub name; or an importance matrix, to rewrite it.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="NAME.gguf, or NAME.dat for llama.cpp's older format.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Text file, JSONL, dataset folder or dataset:NAME[:SPLIT].  [default: the model's own samples]",
        ),
    ] = None,
    samples: o.Samples = None,
    length: o.Length = None,
    seed: o.Seed = None,
    max_memory: o.MaxMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """How much each input of every matrix matters, E[x²], for `quantize --imatrix` and for llama.cpp's own tools."""
    from bitwright.gguf.imatrix import read_imatrix, write_imatrix

    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already", mend="choose another output path, or pass --overwrite")
    if output.suffix not in (".gguf", ".dat"):
        raise InputError(f"{output} is called neither .gguf nor .dat", mend="name the output imatrix.gguf")
    path = Path(model)
    if path.is_file():
        found = read_imatrix(path)
        write_imatrix(found, output)
    else:
        from bitwright.api import collect_imatrix
        from bitwright.cli.progress import ConsoleProgress

        with ConsoleProgress() as progress:
            found = collect_imatrix(
                model, output, text=text, samples=samples or 128, length=length or 512, seed=seed or 0,
                max_memory_bytes=o.parse_bytes(max_memory) if max_memory else None, progress=progress,
            )  # fmt: skip
    from bitwright.cli.tables import print_facts

    tokens = max(int(sums.counts.max()) for sums in found.entries.values())
    print_facts([("written", str(output)), ("tensors", str(len(found.entries))), ("tokens", str(tokens))])
