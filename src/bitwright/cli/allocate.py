"""``bitwright allocate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.advise.allocating import Allocation
    from bitwright.engine.recipe import Recipe

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def allocate(
    model: o.Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the recipe that comes out to this YAML file.")
    ] = None,
    fit: o.Fit = None,
    bits_per_weight: o.BitsPerWeight = None,
    candidates: o.Candidates = None,
    sensitivity: o.SensitivityMode = None,
    context: o.FitContext = None,
    batch: o.FitBatch = 1,
    kv: o.FitKv = "bf16",
    recipe: o.RecipeFile = None,
    method: o.Method = None,
    layout: o.Layout = None,
    head: Annotated[bool | None, typer.Option("--head/--no-head", help="The output head is part of it.")] = None,
    embeddings: Annotated[
        bool | None, typer.Option("--embeddings/--no-embeddings", help="The embeddings are part of it.")
    ] = None,
    type_: o.Type = None,
    imatrix: o.Imatrix = None,
    calibration: o.CalibrationFile = None,
    calibration_field: o.Field = None,
    seed: o.Seed = None,
    target: o.Target = None,
    max_memory: o.MaxMemory = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Print the whole curve of predicted loss against size.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Choose bits layer by layer under a budget; writes a recipe for ``quantize`` and no weights."""
    from bitwright.api import allocate as run
    from bitwright.cli.progress import ConsoleProgress
    from bitwright.io.files import write_text

    gguf = o.gguf_choice(type_, imatrix, None, None, None, None, None, None)
    budget = o.budget_of(
        model, fit=fit, bits_per_weight=bits_per_weight, candidates=candidates, sensitivity=sensitivity, context=context,
        batch=batch, kv=kv, gguf=layout == "gguf" or bool(gguf),
    )  # fmt: skip
    made = o.build_recipe(
        recipe, method=method, layout=layout, head=head, embeddings=embeddings, calibration=calibration,
        field=calibration_field, seed=seed, gguf=gguf, budget=budget,
    )  # fmt: skip
    if made.budget is None:
        raise InputError("there is no budget", mend="give --fit or --bits-per-weight")
    memory = o.parse_bytes(max_memory) if max_memory else None
    with ConsoleProgress() as progress:
        found = run(model, recipe=made, target=target, max_memory_bytes=memory, progress=progress)
    if output is not None:
        write_text(output, _yaml(found.recipe))
    if as_json:
        typer.echo(json.dumps({**found.to_json(), "recipe": found.recipe.model_dump(mode="json")}, indent=2))
        return
    _show(found, curve=curve)
    if output is not None:
        typer.echo(f"The recipe: {output}; carry it out with: bitwright quantize {model} -o OUT --recipe {output}")


def _yaml(recipe: Recipe) -> str:
    import yaml

    text: str = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=100_000)
    return text


def _show(found: Allocation, *, curve: bool) -> None:
    from bitwright.cli.tables import print_facts, print_table, size

    rows: list[tuple[str, ...]] = []
    for name, option in found.point.chosen.items():
        options = {other.label: other for other in found.choices[name]}
        reference = found.sensitivities[name].reference
        rows.append(
            (
                name,
                option.label,
                size(option.bytes),
                f"{option.loss:.2e}",
                f"{options[reference].loss:.2e} ({reference})",
            )
        )
    print_table(("weights that go together", "chosen", "bytes", "predicted loss", "measured loss"), rows)
    counts: dict[str, int] = {}
    for option in found.point.chosen.values():
        counts[option.label] = counts.get(option.label, 0) + 1
    facts: list[tuple[str, Any]] = [
        ("bits per weight", f"{found.bits_per_weight:.4f} over {found.weights:,} weights"),
        ("their bytes", size(found.point.bytes)),
        ("what is not quantized", size(found.kept_bytes)),
        ("predicted loss", f"{found.point.loss:.5f} nats of KL divergence, rounded to nearest; GPTQ loses less"),
        ("chosen", ", ".join(f"{count} x {label}" for label, count in sorted(counts.items()))),
    ]
    print_facts(facts)
    if curve:
        points = found.curve()
        print_table(
            ("bits per weight", "bytes", "predicted loss"),
            [(f"{8 * p.bytes / found.weights:.3f}", size(p.bytes), f"{p.loss:.6f}") for p in points],
        )
