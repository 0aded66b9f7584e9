"""Options shared by ``plan`` and ``quantize``, and how flags become a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.engine.recipe import Recipe

__all__ = [
    "Activations",
    "AllowCode",
    "AllowPickle",
    "Bench",
    "Bits",
    "BitsPerWeight",
    "CalibrationFile",
    "Candidates",
    "ChatTemplate",
    "ConventionName",
    "Device",
    "EmbeddingType",
    "EvalBatch",
    "Field",
    "Fit",
    "FitBatch",
    "FitContext",
    "FitKv",
    "Gate",
    "GroupSize",
    "Imatrix",
    "Inputs",
    "Keep",
    "KvCache",
    "LayerErrors",
    "Layout",
    "LayoutOption",
    "Length",
    "MaxMemory",
    "Method",
    "MethodOption",
    "Model",
    "OutputType",
    "Packing",
    "Pre",
    "Pure",
    "RecipeFile",
    "Requantize",
    "Samples",
    "Scheme",
    "SchemeOption",
    "Seed",
    "SensitivityMode",
    "Split",
    "Stride",
    "Symmetric",
    "Target",
    "TaskLimit",
    "Tasks",
    "TensorType",
    "Texts",
    "Transform",
    "Type",
    "UseCache",
    "WindowLength",
    "Windows",
    "budget_of",
    "build_recipe",
    "gguf_choice",
    "pairs",
    "parse_bytes",
]  # fmt: skip


def listed(kind: str) -> str:
    """Names of plugins for a help text; lists a folder and imports nothing."""
    from bitwright import catalog

    return ", ".join(catalog.names(kind))


Model = Annotated[str, typer.Argument(help="Checkpoint folder, or org/name on the hub.", show_default=False)]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", help=f"YAML file, or one of: {listed('presets')}. Flags come on top of it."),
]
Method = Annotated[str | None, typer.Option("--method", help=f"{listed('methods')}.  [default: gptq]")]
MethodOption = Annotated[
    list[str] | None, typer.Option("--method-option", metavar="NAME=VALUE", help="Option of the method; repeatable.")
]
Scheme = Annotated[
    str | None, typer.Option("--scheme", help=f"Which numbers exist: {listed('schemes')}.  [default: affine]")
]
SchemeOption = Annotated[
    list[str] | None, typer.Option("--scheme-option", metavar="NAME=VALUE", help="Option of the scheme; repeatable.")
]
Transform = Annotated[
    list[str] | None,
    typer.Option(
        "--transform",
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"Rewrite that comes first: {listed('transforms')}; repeatable.",
    ),
]
Inputs = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        help="Quantize layer inputs: int8-token, int8-tensor-static, fp8-token, fp8-tensor-static ...  [default: they stay as they are]",
    ),
]
KvCache = Annotated[
    str | None, typer.Option("--kv-cache", help="Store scales of the KV cache: fp8 or int8.  [default: none]")
]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits of the codes; affine: 2 to 6 or 8.  [default: 4]")]
GroupSize = Annotated[
    str | None,
    typer.Option(
        "--group-size",
        help="Columns that share a scale: a number, channel (or -1), tensor, or block (float8).  [default: 128]",
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="Zero point in the middle, or fitted.  [default: symmetric]"),
]
Layout = Annotated[str | None, typer.Option("--layout", help=f"{listed('layouts')}.  [default: compressed-tensors]")]
LayoutOption = Annotated[
    list[str] | None, typer.Option("--layout-option", metavar="NAME=VALUE", help="Option of the layout; repeatable.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="PATTERN", help="Leave modules that match in high precision; repeatable."),
]
CalibrationFile = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text file, JSONL, dataset folder or dataset:NAME[:SPLIT].  [default: the model's own samples]",
    ),
]
Field = Annotated[
    str | None, typer.Option("--calibration-field", help="JSONL or dataset field that holds the text.  [default: text]")
]
Samples = Annotated[int | None, typer.Option("--samples", help="Calibration sequences.  [default: 128]")]
Length = Annotated[int | None, typer.Option("--length", help="Tokens a calibration sequence.  [default: 512]")]
Packing = Annotated[
    str | None,
    typer.Option("--packing", help="pack: windows of equal length; rows: one text a sample.  [default: pack]"),
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Apply the tokenizer's chat template to each text.  [default: no-chat-template]",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice.  [default: 0]")]
Target = Annotated[
    str | None, typer.Option("--for", help="Engine that must load the result: vllm, transformers or gptqmodel.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory", help="What activations and statistics may hold, for example 4GB; the rest goes to disk."
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Convert pickled weights in a child process, with weights_only.")
]
Type = Annotated[
    str | None,
    typer.Option(
        "--type", help="GGUF: a mixture such as Q4_K_M, Q5_K_S, IQ4_XS, Q8_0, or f16, bf16, f32.", show_default=False
    ),
]
Imatrix = Annotated[
    str | None,
    typer.Option("--imatrix", help="GGUF: importance weights, a file; or auto: collected from the calibration text."),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option("--tensor-type", metavar="PATTERN=TYPE", help="GGUF: an exception by tensor name; repeatable."),
]
EmbeddingType = Annotated[str | None, typer.Option("--embedding-type", help="GGUF: type of the token embeddings.")]
OutputType = Annotated[str | None, typer.Option("--output-type", help="GGUF: type of the output head.")]
Pure = Annotated[bool | None, typer.Option("--pure/--mixture", help="GGUF: one type everywhere.  [default: mixture]")]
Pre = Annotated[str | None, typer.Option("--pre", help="GGUF: name of the pre-tokenizer, where it is not recognised.")]
Split = Annotated[str | None, typer.Option("--split", help="GGUF: parts of at most this size, for example 4G.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="UTF-8 text file, NAME=FILE, or edge-cases (built in); repeatable.  [default: samples of the original]",
    ),
]
WindowLength = Annotated[int, typer.Option("--length", help="Tokens a window.")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Sliding windows that advance by this.  [default: non-overlapping]")
]
ConventionName = Annotated[
    str | None,
    typer.Option("--convention", help="non-overlapping, sliding, or llama.cpp.  [default: as --stride says]"),
]
Windows = Annotated[
    int | None, typer.Option("--windows", help="At most this many windows of each text.  [default: all]")
]
Activations = Annotated[
    str, typer.Option("--dtype", help="Dtype of the activations: float32, bfloat16, float16 or checkpoint.")
]
EvalBatch = Annotated[int, typer.Option("--batch-size", help="Windows that are run at once.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep the original's predictions for the next evaluation.")
]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", help="Tasks of lm-evaluation-harness, by name, file or folder; joined by commas."),
]
TaskLimit = Annotated[int | None, typer.Option("--task-limit", help="At most this many questions a task.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Tasks such as HumanEval may run what the model writes.")
]
LayerErrors = Annotated[bool, typer.Option("--layers", help="Measure the error of every layer too.")]
Bench = Annotated[bool, typer.Option("--bench", help="Measure time and memory too, in every engine that is here.")]
Gate = Annotated[
    str | None,
    typer.Option("--gate", help='Limits, such as "ppl_increase<0.5,kl_mean<0.02"; default: ppl_increase<=0.5.'),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        help="Choose bits layer by layer so that the weight files take at most this, for example 4.5GB.",
        show_default=False,
    ),
]
BitsPerWeight = Annotated[
    float | None,
    typer.Option(
        "--bits-per-weight",
        help="Choose bits layer by layer so that quantized layers take this many bits a weight, scales included.",
        show_default=False,
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        "--candidates",
        help="What a budget may choose from, joined by commas: 3g64, 4g128, nf4, int8, keep, or GGUF types.  [default: by layout]",
    ),
]
SensitivityMode = Annotated[
    str | None,
    typer.Option("--sensitivity", help="How losses are predicted: full, blocks or gram.  [default: full]"),
]
FitContext = Annotated[
    int | None,
    typer.Option("--context", help="With --fit: the KV cache of this many tokens must fit too."),
]
FitBatch = Annotated[int, typer.Option("--batch", help="With --context: sequences at a time.")]
FitKv = Annotated[str, typer.Option("--kv", help="With --context: KV cache in bf16, fp16, fp8, int8, q8_0 or q4_0.")]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="GGUF: quantize what is in blocks already anew, with the errors of both.")
]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """A size such as 4GB or 512MiB, in bytes.

    >>> parse_bytes("1.5GB"), parse_bytes("2GiB")
    (1500000000, 2147483648)
    """
    stripped = text.strip().upper()
    number = stripped.rstrip("KMGTIB ")
    unit = stripped[len(number) :].strip()
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise InputError(f"'{text}' is not a size", mend="write it like 4GB or 512MiB") from None
    if not 0 < value < 2**62:
        raise InputError(f"'{text}' is not a usable size", mend="write it like 4GB or 512MiB")
    return int(value)


def pairs(items: list[str] | None, flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` flags as a mapping; values are JSON, or text where they are none. InputError for anything else."""
    result: dict[str, Any] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InputError(f"{flag} '{item}' is not NAME=VALUE", mend=f"write {flag} damping=0.05")
        try:
            result[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            result[name.replace("-", "_")] = value
    return result


def _transform(text: str) -> dict[str, Any]:
    """``smoothquant:alpha=0.8`` as a recipe's choice."""
    name, _, rest = text.partition(":")
    return {"name": name, "options": pairs(rest.split(",") if rest else None, "--transform")}


def gguf_choice(
    type_: str | None, imatrix: str | None, tensor_type: list[str] | None, embedding_type: str | None, output_type: str | None,
    pure: bool | None, pre: str | None, split: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The recipe's ``gguf`` section from flags; empty where none was given."""
    found = {
        "type": type_, "imatrix": imatrix, "tensor_types": tensor_type or None, "embedding_type": embedding_type,
        "output_type": output_type, "pure": pure, "pre": pre, "max_part_bytes": parse_bytes(split) if split else None,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def budget_of(
    model: str, *, fit: str | None, bits_per_weight: float | None, candidates: str | None, sensitivity: str | None,
    context: int | None, batch: int, kv: str, gguf: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """The recipe's ``budget`` section from flags; None where there is none. InputError for flags that need one."""
    if fit is not None and bits_per_weight is not None:
        raise InputError("--fit and --bits-per-weight are two budgets", mend="give one of them")
    if fit is None and context is not None:
        raise InputError("--context says what --fit must leave room for", mend="give --fit too")
    if fit is None and bits_per_weight is None:
        if candidates or sensitivity:
            raise InputError(
                "--candidates and --sensitivity belong to a budget", mend="give --fit or --bits-per-weight"
            )
        return None
    found: dict[str, Any] = {}
    if bits_per_weight is not None:
        found["bits_per_weight"] = bits_per_weight
    if fit is not None:
        found["bytes"] = parse_bytes(fit)
        if context is not None:
            found["bytes"] -= _kv_cache(model, context, batch, kv, "llamacpp" if gguf else "transformers")
            if found["bytes"] <= 0:
                raise InputError(
                    f"the KV cache of {context} tokens takes more than {fit}",
                    mend="use a shorter --context, or --kv fp8",
                )
    if candidates:
        found["candidates"] = [name.strip() for name in candidates.split(",") if name.strip()]
    if sensitivity:
        found["sensitivity"] = sensitivity
    return found


def _kv_cache(model: str, context: int, batch: int, kv: str, engine: str) -> int:
    from bitwright.advise.kv_cache import kv_cache_bytes
    from bitwright.advise.shape import model_shape
    from bitwright.io.hub import resolve_model
    from bitwright.io.strict import load_json

    shape = model_shape(load_json(resolve_model(model) / "config.json"))
    return kv_cache_bytes(shape, context=context, batch=batch, kv=kv, engine=engine)


def build_recipe(
    recipe: str | Path | None, *, method: str | None = None, method_option: list[str] | None = None, bits: int | None = None,
    group_size: str | None = None, symmetric: bool | None = None, layout: str | None = None,
    layout_option: list[str] | None = None, keep: list[str] | None = None, head: bool | None = None,
    embeddings: bool | None = None, strict: bool | None = None, calibration: str | None = None, field: str | None = None,
    samples: int | None = None, length: int | None = None, packing: str | None = None, chat_template: bool | None = None,
    seed: int | None = None, scheme: str | None = None, scheme_option: list[str] | None = None, transform: list[str] | None = None,
    inputs: str | None = None, kv_cache: str | None = None, gguf: dict[str, Any] | None = None,
    budget: dict[str, Any] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe that a file or preset and flags describe together; flags that were not given change nothing."""
    from bitwright.engine.recipe import load_recipe, make_recipe

    changes: dict[str, Any] = {
        "method": method, "bits": bits, "group_size": group_size, "symmetric": symmetric, "layout": layout, "head": head,
        "embeddings": embeddings, "strict": strict, "seed": seed, "scheme": scheme, "inputs": inputs, "kv_cache": kv_cache,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    for name, items in (
        ("method_options", pairs(method_option, "--method-option")),
        ("layout_options", pairs(layout_option, "--layout-option")),
        ("scheme_options", pairs(scheme_option, "--scheme-option")),
    ):
        if items:
            changes[name] = items
    text = {
        "text": calibration,
        "field": field,
        "samples": samples,
        "length": length,
        "packing": packing,
        "chat_template": chat_template,
    }
    text = {name: value for name, value in text.items() if value is not None}
    if text:
        changes["calibration"] = text
    if gguf:
        changes["gguf"] = gguf
    if budget:
        changes["budget"] = budget
    if transform:
        changes["transforms"] = [_transform(item) for item in transform]
    if keep:
        changes["overrides"] = [{"pattern": pattern, "keep": True} for pattern in keep]
    return load_recipe(recipe, changes) if recipe is not None else make_recipe(changes)
