"""``bitwright plan``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bitwright.cli import options as o

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def plan(
    model: o.Model,
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
    head: Annotated[bool | None, typer.Option("--head/--no-head", help="Quantize the output head too.")] = None,
    embeddings: Annotated[
        bool | None, typer.Option("--embeddings/--no-embeddings", help="Quantize the embeddings too.")
    ] = None,
    calibration: o.CalibrationFile = None,
    samples: o.Samples = None,
    length: o.Length = None,
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
    target: o.Target = None,
    max_memory: o.MaxMemory = None,
    all_tensors: Annotated[bool, typer.Option("--all", help="List every tensor, not one block of each kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Per tensor what would become of it, in exact bytes; peak memory and disk; who will load the result. Reads no weights."""
    made = o.build_recipe(
        recipe, method=method, method_option=method_option, bits=bits, group_size=group_size, symmetric=symmetric, layout=layout,
        layout_option=layout_option, keep=keep, head=head, embeddings=embeddings, samples=samples, length=length,
        scheme=scheme, scheme_option=scheme_option, transform=transform, inputs=inputs, kv_cache=kv_cache, calibration=calibration,
        seed=seed, gguf=o.gguf_choice(type_, imatrix, tensor_type, embedding_type, output_type, pure, pre, split),
    )  # fmt: skip
    if made.layout == "gguf":
        from bitwright.cli.gguf_tables import show_gguf_plan
        from bitwright.engine.gguf_run import plan_gguf_file
        from bitwright.io.hub import resolve_model

        planned = plan_gguf_file(made, resolve_model(model, file=True), requantize=requantize)
        show_gguf_plan(planned, all_tensors=all_tensors, as_json=as_json)
        return
    from bitwright.engine.memory import forecast
    from bitwright.engine.modelwide import plan_rewritten
    from bitwright.engine.run import open_source
    from bitwright.io.hub import resolve_model

    with open_source(resolve_model(model)) as source:
        found, _ = plan_rewritten(made, source, target=target)
    expected = forecast(found, o.parse_bytes(max_memory) if max_memory else None)
    if not as_json:
        from bitwright.cli.tables import show_plan

        show_plan(found, expected, all_tensors=all_tensors)
        return
    typer.echo(
        json.dumps(
            {
                "weight_file_bytes": found.weight_file_bytes,
                "files": {shard.file_name: shard.total_bytes for shard in found.shards},
                "bits_per_weight": found.bits_per_weight,
                "quantized_bits_per_weight": found.quantized_bits_per_weight,
                "peak_memory_bytes": expected.peak_bytes,
                "temporary_disk_bytes": expected.disk_bytes,
                "engines": dict(found.engines),
                "notes": list(found.notes),
                "tensors": [
                    {
                        "name": e.tensor,
                        "action": e.action,
                        "shape": list(e.spec.shape),
                        "bytes": e.spec.nbytes,
                        "stored_bytes": e.stored_bytes,
                        "scheme": e.scheme.describe_all() if e.scheme else None,
                        "method": e.method.name if e.method else None,
                        "reason": e.reason,
                    }
                    for e in found.entries
                ],
            },
            indent=2,
        )
    )
