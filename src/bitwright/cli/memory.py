"""``bitwright memory``."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.advise.memory import MemoryForecast
    from bitwright.advise.stored import Known

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_LAYOUTS = "gptq, awq, compressed-tensors, bitsandbytes, fp8, native, gguf or dense"
_LABELS = {"kv_cache": "KV cache", "head": "output head"}


@app.command()
def memory(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, GGUF file, or org/name on the hub; or give --params.", show_default=False
        ),
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", help="A number of parameters such as 70B: a typical shape is taken.")
    ] = None,
    hidden: Annotated[int | None, typer.Option("--hidden", help="With --params: width of the model.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="With --params: number of layers.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="With --params: query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="With --params: key and value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option("--head-dim", help="With --params: size of a head.")] = None,
    intermediate: Annotated[int | None, typer.Option("--intermediate", help="With --params: width of the MLP.")] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", help="With --params: size of the vocabulary.")] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", help=f"{_LAYOUTS}.  [default: as stored; compressed-tensors with --params]"),
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="Bits of a weight; 16 for plain weights.  [default: the layout's]")
    ] = None,
    group_size: Annotated[
        str | None, typer.Option("--group-size", help="Columns that share a scale.  [default: the layout's]")
    ] = None,
    type_: o.Type = None,
    recipe: o.RecipeFile = None,
    context: Annotated[int, typer.Option("--context", help="Tokens of a sequence, prompt and answer.")] = 8192,
    batch: Annotated[int, typer.Option("--batch", help="Sequences at a time.")] = 1,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="KV cache: fp16, bf16, fp8, int8, q8_0, q4_0.  [default: 16 bits]"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", help="transformers, llamacpp or vllm.  [default: llamacpp for GGUF, else transformers]"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="cpu or cuda: whose memory is counted.  [default: cpu; cuda for vllm and training]"
        ),
    ] = None,
    all_logits: Annotated[
        bool, typer.Option("--all-logits", help="Logits of every position, as an evaluation wants them.")
    ] = False,
    finetune: Annotated[str, typer.Option("--finetune", help="none, lora, qlora or full.")] = "none",
    lora_rank: Annotated[int, typer.Option("--lora-rank", help="Rank of the adapters.")] = 16,
    lora_target: Annotated[
        list[str] | None,
        typer.Option("--lora-target", help="A linear that gets adapters, such as q_proj; repeatable.  [default: all]"),
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, adamw8bit or sgd.")] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing.")
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Of activations and plain weights.  [default: the model's; bfloat16; float32 for full]"
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option("--fits", metavar="SIZE", help="Say whether it fits, for example 24GB; exit code 1 where not."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """What a model takes in memory while it serves or is trained, part by part. Reads headers alone."""
    sizes = {
        "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "intermediate": intermediate,
        "vocab": vocab,
    }  # fmt: skip
    if finetune == "qlora" and layout is None and not _quantized_already(model):
        layout = "bitsandbytes"
    elif finetune == "full":
        layout, dtype = layout or "dense", dtype or "float32"
    elif finetune == "lora" and layout is None and type_ is None and bits is None:
        layout = "dense"
    known = _known(model, params, sizes, layout, bits, group_size, type_, recipe, dtype)
    found = _forecast(
        known,
        context,
        batch,
        kv,
        engine,
        device,
        all_logits,
        finetune,
        lora_rank,
        lora_target,
        optimizer,
        checkpointing,
    )
    bound = o.parse_bytes(limit) if limit is not None else None
    if as_json:
        value = {**found.to_json(), "fits": None if bound is None else found.fits(bound)}
        typer.echo(json.dumps(value, indent=2, allow_nan=False))
    else:
        _show(found, bound)
    if bound is not None and not found.fits(bound):
        raise typer.Exit(1)


def _quantized_already(model: str | None) -> bool:
    """True for a model at hand that need not be quantized for QLoRA."""
    from bitwright.advise.stored import is_quantized
    from bitwright.io.hub import resolve_model

    return model is not None and is_quantized(resolve_model(model, file=True))


def _known(
    model: str | None, params: str | None, sizes: dict[str, int | None], layout: str | None, bits: int | None, group_size: str | None,
    type_: str | None, recipe: str | None, dtype: str | None,
) -> Known:  # fmt: skip
    """Shape and weights of what was asked about."""
    if (model is None) == (params is None):
        raise InputError("one model is needed", mend="name a folder or a file, or give --params 7B")
    if type_ is not None:
        layout = "gguf"
    groups: int | str | None = int(group_size) if group_size is not None and group_size.isdigit() else group_size
    if params is not None:
        return _guessed(params, sizes, layout or "compressed-tensors", bits, groups, type_, recipe, dtype or "bfloat16")
    if any(value is not None for value in sizes.values()):
        raise InputError("a model has its own sizes", mend="give sizes with --params alone")
    return _present(str(model), layout, bits, groups, type_, recipe, dtype)


def _guessed(
    params: str, sizes: dict[str, int | None], layout: str, bits: int | None, group_size: int | str | None, type_: str | None,
    recipe: str | None, dtype: str,
) -> Known:  # fmt: skip
    from bitwright.advise.shape import parse_parameters, shape_for
    from bitwright.advise.stored import Known
    from bitwright.advise.weights import weight_bytes

    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    shape = shape_for(parse_parameters(params))
    if given:
        words = ", ".join(f"{name} {value}" for name, value in given.items())
        shape = replace(shape, **given, source=f"{shape.source}; given: {words}")
    weights = weight_bytes(
        shape, layout=layout, bits=bits, group_size=group_size, type=type_, dtype=dtype, recipe=_recipe_values(recipe)
    )
    return Known(shape=shape, weights=weights, dtype=dtype, file=layout == "gguf")


def _recipe_values(recipe: str | None) -> dict[str, Any] | None:
    from bitwright.engine.recipe import load_recipe

    return None if recipe is None else load_recipe(recipe).model_dump()


def _present(
    model: str, layout: str | None, bits: int | None, group_size: int | str | None, type_: str | None, recipe: str | None,
    dtype: str | None,
) -> Known:  # fmt: skip
    """A model at hand: as it is stored, or as a recipe would store it."""
    from bitwright.advise.stored import is_quantized, planned_weights, stored_weights
    from bitwright.advise.weights import default_recipe, gguf_type
    from bitwright.engine.recipe import load_recipe, make_recipe
    from bitwright.io.hub import resolve_model

    path = resolve_model(model, file=True)
    asked = recipe is not None or bits is not None or layout not in (None, "dense")
    if not asked or (bits == 16 and layout in (None, "dense")) or is_quantized(path):
        if asked and not (bits == 16 and layout in (None, "dense")):
            raise InputError(
                f"{model} is quantized already", mend="drop --layout, --bits and --type; it is counted as stored"
            )
        known = stored_weights(path)
        return known if dtype is None else _in_dtype(known, dtype)
    if recipe is not None:
        values: dict[str, Any] = load_recipe(recipe).model_dump()
    elif layout == "gguf":
        values = {"layout": "gguf", "gguf": {"type": type_ or gguf_type(bits or 4)}}
    else:
        values = default_recipe(layout or "compressed-tensors", bits=bits, group_size=group_size)
    known = planned_weights(path, make_recipe(values))
    return known if dtype is None else replace(known, dtype=dtype)


def _in_dtype(known: Known, dtype: str) -> Known:
    """A checkpoint whose plain weights are loaded in another dtype."""
    from bitwright.advise.weights import DTYPES

    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' is unknown", mend=f"use one of: {', '.join(DTYPES)}")
    if known.file:
        return known
    ratio = DTYPES[dtype] / DTYPES[known.dtype]
    w = known.weights
    plain = w.scales == 0
    weights = replace(
        w, weights=int(w.weights * ratio) if plain else w.weights, embeddings=int(w.embeddings * ratio), head=int(w.head * ratio),
        recipe=f"{w.recipe}, loaded in {dtype}",
    )  # fmt: skip
    return replace(known, weights=weights, dtype=dtype)


def _forecast(
    known: Known, context: int, batch: int, kv: str | None, engine: str | None, device: str | None, all_logits: bool, finetune: str,
    lora_rank: int, lora_target: list[str] | None, optimizer: str, checkpointing: bool,
) -> MemoryForecast:  # fmt: skip
    from bitwright.advise.memory import forecast_serving, forecast_training
    from bitwright.advise.training import ALL_LINEAR

    device = device or ("cuda" if finetune != "none" or engine == "vllm" else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device '{device}' is unknown", mend="use cpu or cuda")
    if finetune != "none":
        return forecast_training(
            known.shape, weight_bytes=known.weights, context=context, batch=batch, finetune=finetune, lora_rank=lora_rank,
            lora_targets=tuple(lora_target) if lora_target else ALL_LINEAR, optimizer=optimizer, checkpointing=checkpointing,
            dtype=known.dtype, device=device,
        )  # fmt: skip
    engine = engine or ("llamacpp" if known.file else "transformers")
    if known.file != (engine == "llamacpp"):
        raise InputError(
            f"{engine} does not run {'a GGUF file' if known.file else 'these files'}", mend="choose another --engine"
        )
    usual = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[known.dtype]
    return forecast_serving(
        known.shape, weight_bytes=known.weights, context=context, batch=batch, kv=kv or usual, engine=engine, dtype=known.dtype,
        device=device, all_logits=all_logits,
    )  # fmt: skip


def _show(found: MemoryForecast, limit: int | None) -> None:
    from bitwright.cli.tables import print_facts, print_table, size

    total = max(found.total_bytes, 1)
    rows = [
        (_LABELS.get(name, name), size(value), f"{100 * value / total:.1f} %") for name, value in found.parts if value
    ]
    print_table(("part", "bytes", "share"), [*rows, ("total", size(found.total_bytes), "")])
    if limit is not None:
        spare = limit - found.total_bytes
        print_facts(
            [("fits " + size(limit), f"yes, {size(spare)} to spare" if spare >= 0 else f"no, {size(-spare)} too much")]
        )
    for sentence in found.assumptions:
        name, _, rest = sentence.partition(": ")
        print_facts([(name, rest)] if rest and len(name) < 28 else [("note", sentence)])
