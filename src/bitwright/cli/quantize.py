"""``bitwright quantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def quantize(
    model: o.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder (or NAME.gguf) to write; it appears only when it is whole.")
    ],
    recipe: o.RecipeFile = None,
    method: o.Method = None,
    method_option: o.MethodOption = None,
    scheme: o.Scheme = None,
    scheme_option: o.SchemeOption = None,
    transform: o.Transform = None,
    inputs: o.Inputs = None,
    kv_cache: o.KvCache = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    layout: o.Layout = None,
    layout_option: o.LayoutOption = None,
    keep: o.Keep = None,
    head: Annotated[
        bool | None, typer.Option("--head/--no-head", help="Quantize the output head too.  [default: no-head]")
    ] = None,
    embeddings: Annotated[
        bool | None, typer.Option("--embeddings/--no-embeddings", help="Quantize the embeddings too (native layout).")
    ] = None,
    strict: Annotated[bool | None, typer.Option("--strict/--no-strict", help="Fail instead of falling back.")] = None,
    calibration: o.CalibrationFile = None,
    calibration_field: o.Field = None,
    samples: o.Samples = None,
    length: o.Length = None,
    packing: o.Packing = None,
    chat_template: o.ChatTemplate = None,
    seed: o.Seed = None,
    type_: o.Type = None,
    imatrix: o.Imatrix = None,
    tensor_type: o.TensorType = None,
    embedding_type: o.EmbeddingType = None,
    output_type: o.OutputType = None,
    pure: o.Pure = None,
    pre: o.Pre = None,
    split: o.Split = None,
    requantize: o.Requantize = False,
    fit: o.Fit = None,
    bits_per_weight: o.BitsPerWeight = None,
    candidates: o.Candidates = None,
    sensitivity: o.SensitivityMode = None,
    context: o.FitContext = None,
    batch: o.FitBatch = 1,
    kv: o.FitKv = "bf16",
    target: o.Target = None,
    resume: Annotated[str, typer.Option("--resume", help="auto, require or never.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, in one rename.")] = False,
    max_memory: o.MaxMemory = None,
    allow_pickle: o.AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Quantize a checkpoint folder (or a GGUF file, to another one); nothing is visible at OUTPUT before it is whole and verified."""
    if resume not in ("auto", "require", "never"):
        raise InputError(f"--resume {resume} is unknown", mend="use auto, require or never")
    gguf = o.gguf_choice(type_, imatrix, tensor_type, embedding_type, output_type, pure, pre, split)
    if output.suffix == ".gguf" and layout is None:
        layout = "gguf"
    budget = o.budget_of(
        model, fit=fit, bits_per_weight=bits_per_weight, candidates=candidates, sensitivity=sensitivity, context=context,
        batch=batch, kv=kv, gguf=layout == "gguf" or bool(gguf),
    )  # fmt: skip
    made = o.build_recipe(
        recipe, method=method, method_option=method_option, bits=bits, group_size=group_size, symmetric=symmetric, layout=layout,
        layout_option=layout_option, keep=keep, head=head, embeddings=embeddings, strict=strict, calibration=calibration,
        field=calibration_field, samples=samples, length=length, packing=packing, chat_template=chat_template, seed=seed,
        scheme=scheme, scheme_option=scheme_option, transform=transform, inputs=inputs, kv_cache=kv_cache, gguf=gguf,
        budget=budget,
    )  # fmt: skip
    from bitwright.cli.progress import ConsoleProgress

    memory = o.parse_bytes(max_memory) if max_memory else None
    when = cast(Literal["auto", "require", "never"], resume)
    if made.layout == "gguf":
        from bitwright.api import to_gguf
        from bitwright.cli.gguf_tables import show_gguf_result

        with ConsoleProgress() as progress:
            written = to_gguf(
                model, output, recipe=made, resume=when, overwrite=overwrite, max_memory_bytes=memory,
                allow_pickle=allow_pickle, requantize=requantize, progress=progress,
            )  # fmt: skip
        show_gguf_result(written, as_json=as_json)
        return
    from bitwright.api import quantize as run

    with ConsoleProgress() as progress:
        result = run(
            model, output, recipe=made, resume=when, overwrite=overwrite, max_memory_bytes=memory, allow_pickle=allow_pickle,
            target=target, progress=progress,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    from bitwright.cli.tables import show_result

    show_result(result)
