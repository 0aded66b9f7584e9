"""``bitwright inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli import options as o

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def inspect(
    model: o.Model,
    all_tensors: Annotated[bool, typer.Option("--all", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """What is in a checkpoint or a GGUF file, ours or another tool's: tensors, schemes, bits per weight, recipe, provenance."""
    from bitwright.io.hub import resolve_model

    path = resolve_model(model, file=True)
    if path.is_file():
        from bitwright.cli.gguf_tables import inspect_gguf

        inspect_gguf(path, all_tensors=all_tensors, as_json=as_json)
        return
    found = _look(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from bitwright.cli.tables import show_inspection

    show_inspection(found, all_tensors=all_tensors)


def _look(path: Path) -> dict[str, Any]:
    from bitwright.io.strict import load_json
    from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

    opened = open_checkpoint(path)
    quantized = isinstance(opened, DecodedSource)
    stored = opened.stored if isinstance(opened, DecodedSource) else opened
    tensors: list[dict[str, Any]] = []
    weights = 0
    for name, spec in opened.tensors.items():
        module = name.removesuffix(".weight")
        count = spec.nbytes // spec.dtype.itemsize
        weights += count
        line: dict[str, Any] = {"name": name, "shape": list(spec.shape), "parameters": count}
        if isinstance(opened, DecodedSource) and module in opened.modules and name.endswith(".weight"):
            scheme, shape = opened.modules[module]
            size = sum(part.nbytes for part in opened.layout.tensors(module, scheme, shape))
            line |= {"scheme": scheme.describe_all(), "stored_bytes": size, "bits_per_weight": 8 * size / count}
        else:
            line |= {"scheme": str(spec.dtype).removeprefix("torch."), "stored_bytes": spec.nbytes}
            line["bits_per_weight"] = 8 * spec.dtype.itemsize
        tensors.append(line)
    total = sum(line["stored_bytes"] for line in tensors)
    provenance = load_json(path / "bitwright.json") if (path / "bitwright.json").is_file() else None
    stored.close()
    return {
        "path": str(path),
        "layout": opened.layout.name if isinstance(opened, DecodedSource) else "dense",
        "quantized": quantized,
        "model_type": stored.config.get("model_type"),
        "parameters": weights,
        "data_bytes": total,
        "bits_per_weight": 8 * total / weights if weights else 0.0,
        "tensors": tensors,
        "provenance": provenance,
    }
