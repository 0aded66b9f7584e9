"""compressed-tensors' ``quantization_config``: ``QuantizationArgs`` to schemes and back, and which group a module belongs to.

Its records forbid unknown keys: one stray key makes a model unloadable. So the keys here are those that the releases pinned by the
serving engines know, and no more than a scheme needs.

Sources: compressed-tensors 0.17 .. 0.20 ``quantization/quant_args.py``, ``quantization/quant_scheme.py`` (the presets) and
``quantization/quant_config.py``; vLLM ``compressed_tensors/compressed_tensors.py`` (``_get_scheme_from_parts``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.layout import Read
from bitwright.core.scheme import Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError
from bitwright.layouts import _ct_pack
from bitwright.schemes.affine import Affine
from bitwright.schemes.float8 import Float8
from bitwright.schemes.microscaling import Microscaling

__all__ = [
    "FORMATS",
    "Quantized",
    "format_of",
    "group_of",
    "input_args",
    "kept_in_bytes",
    "must_name",
    "read_module",
    "weight_args",
]

#: The schemes that these files can hold.
Quantized = Affine | Float8 | Microscaling

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
_MICRO = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized", "nvfp4": "nvfp4-pack-quantized"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: What the presets of compressed-tensors name; without it inputs of MX schemes are not rounded to powers of two when emulated.
_SCALE_DTYPE = {"mxfp4": "torch.uint8", "mxfp8": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}


def format_of(scheme: Quantized, int8_bytes: bool = False) -> str:
    """The format that a scheme is stored in. int8_bytes: 8-bit integers are bytes also where they are weight-only."""
    match scheme:
        case Float8():
            return "float-quantized"
        case Microscaling():
            return _MICRO[scheme.element]
    whole = scheme.bits == 8 and scheme.granularity != "group"
    if whole and (int8_bytes or scheme.inputs is not None or scheme.granularity == "tensor"):
        return "int-quantized"
    return "pack-quantized"


def must_name(scheme: Quantized, chosen: str) -> bool:
    """Whether a group has to name its format, because compressed-tensors would infer another one from its numbers."""
    return isinstance(scheme, Affine) and (scheme.inputs is None) == (chosen == "int-quantized")


def weight_args(scheme: Quantized) -> dict[str, Any]:
    """``QuantizationArgs`` of the weights."""
    args: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    match scheme:
        case Affine():
            grouped = scheme.granularity == "group"
            args |= {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
            args |= {"strategy": scheme.granularity, "group_size": scheme.group_size if grouped else None}
        case Float8():
            args |= {"strategy": scheme.granularity, "group_size": None}
        case Microscaling():
            strategy = "tensor_group" if scheme.element == "nvfp4" else "group"
            args |= {"num_bits": scheme.code_bits, "strategy": strategy, "group_size": scheme.group}
    args["dynamic"] = False
    if isinstance(scheme, Float8) and scheme.granularity == "block":
        args["block_structure"] = list(scheme.block)
    if isinstance(scheme, Microscaling):
        args["scale_dtype"] = _SCALE_DTYPE[scheme.element]
    return args


def input_args(inputs: InputScheme | None) -> dict[str, Any] | None:
    """``QuantizationArgs`` of the inputs, or of a KV cache."""
    if inputs is None:
        return None
    args: dict[str, Any] = {
        "num_bits": inputs.bits,
        "type": inputs.number,
        "symmetric": inputs.symmetric,
        "strategy": inputs.strategy,
        "group_size": inputs.group_size,
        "dynamic": "local" if inputs.strategy == "tensor_group" else inputs.dynamic,
    }
    if inputs.strategy == "tensor_group":
        args["scale_dtype"] = _SCALE_DTYPE["nvfp4"]
    elif inputs.power_of_two:
        args["scale_dtype"] = _SCALE_DTYPE["mxfp8"]
    return args


def group_of(name: str, groups: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The config group of a module: exact names before regular expressions before class names, then the first group.

    Class names cannot be checked against tensors; a tensor that is there in packed form was targeted by some class.
    """
    best: tuple[int, Mapping[str, Any]] | None = None
    for group in groups.values():
        for target in group.get("targets") or ():
            if target == name:
                rank = 0
            elif target.startswith("re:"):
                if not re.match(target.removeprefix("re:"), name):
                    continue
                rank = 1
            elif "." in target:
                continue
            else:
                rank = 2
            if best is None or rank < best[0]:
                best = (rank, group)
    if best is None:
        raise InputError(f"no config group targets '{name}'", mend="config.json and the tensors are not from one model")
    return best[1]


def kept_in_bytes(config: Mapping[str, Any]) -> bool:
    """Whether a file holds weight-only 8-bit integers per channel as bytes, which writers of ``int-quantized`` may do."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        args = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(args, Mapping) or (group.get("format") or config.get("format")) != "int-quantized":
            continue
        channel = args.get("num_bits") == 8 and args.get("strategy") == "channel"
        if args.get("type", "int") == "int" and channel and not group.get("input_activations"):
            return True
    return False


def read_module(
    spec: TensorSpec, group: Mapping[str, Any], names: Mapping[str, TensorSpec], read: Read | None
) -> tuple[Scheme, tuple[int, int]]:
    """Scheme and shape of one linear. spec: its ``weight_packed``, or ``weight`` of int8 or float8."""
    name = spec.name.rpartition(".")[0]
    scale = names.get(f"{name}.weight_scale")
    if scale is None or len(spec.shape) != 2:
        raise InputError(f"'{spec.name}' has no weight_scale or is no matrix", mend="the file is incomplete")
    args: Mapping[str, Any] = group.get("weights") or {}
    strategy = args.get("strategy") or ("group" if args.get("group_size") else "tensor")
    if f"{name}.weight_g_idx" in names:
        raise InputError(f"'{name}' has a group index, which current readers refuse too", mend="quantize it anew")
    what = f"'{name}': {args.get('type')} {strategy} weights"
    try:
        inputs = _read_inputs(group.get("input_activations"))
        if spec.dtype in (torch.int32, torch.int8):
            if args.get("type", "int") != "int" or strategy not in ("group", "channel", "tensor"):
                raise InputError(f"{what} are not read here", mend="use its own loader")
            return _read_affine(spec, scale, args, strategy, inputs, names, read)
        return _read_float(spec, scale, args, strategy, inputs, what)
    except PlanError as error:
        raise InputError(f"'{name}': {error.message}", mend="use its own loader") from error


def _read_affine(
    spec: TensorSpec,
    scale: TensorSpec,
    args: Mapping[str, Any],
    strategy: str,
    inputs: InputScheme | None,
    names: Mapping[str, TensorSpec],
    read: Read | None,
) -> tuple[Scheme, tuple[int, int]]:
    name, bits = spec.name.rpartition(".")[0], args.get("num_bits")
    if scale.dtype not in _FLOATS or bits not in _ct_pack.BITS:
        raise InputError(
            f"'{name}': {bits} bits with scales {scale.dtype} are not read here", mend="use its own loader"
        )
    rows, columns = spec.shape
    options: dict[str, Any] = {}
    if strategy == "group":
        options["group_size"] = int(args["group_size"])
    if spec.dtype == torch.int32:
        groups = (scale.shape[1], options["group_size"]) if strategy == "group" else None
        columns = _ct_pack.read_columns(spec, bits, groups, names, read)
    elif bits != 8:
        raise InputError(f"'{name}': {bits}-bit codes in bytes are not read here", mend="use its own loader")
    scheme = Affine(
        bits=bits,
        symmetric=bool(args.get("symmetric", True)),
        granularity=strategy,  # type: ignore[arg-type]
        scale_dtype=str(scale.dtype).removeprefix("torch."),
        inputs=inputs,
        **options,
    )
    return scheme, (rows, columns)


def _read_float(
    spec: TensorSpec,
    scale: TensorSpec,
    args: Mapping[str, Any],
    strategy: str,
    inputs: InputScheme | None,
    what: str,
) -> tuple[Scheme, tuple[int, int]]:
    rows, columns = spec.shape
    bits, group = args.get("num_bits"), args.get("group_size")
    if args.get("type") != "float" or not args.get("symmetric", True):
        raise InputError(f"{what} are not read here", mend="use its own loader")
    if spec.dtype == torch.uint8:
        if (bits, strategy, group) not in ((4, "tensor_group", 16), (4, "group", 32)):
            raise InputError(f"{what} of {bits} bits in groups of {group} are not read here", mend="use its own loader")
        return Microscaling(element="nvfp4" if group == 16 else "mxfp4", inputs=inputs), (rows, 2 * columns)
    if bits == 8 and strategy == "group" and group == 32 and scale.dtype == torch.uint8:
        return Microscaling(element="mxfp8", inputs=inputs), (rows, columns)
    if bits != 8 or strategy not in ("tensor", "channel", "block") or scale.dtype not in _FLOATS:
        raise InputError(f"{what} with scales {scale.dtype} are not read here", mend="use its own loader")
    block = args.get("block_structure")
    options = {"block": tuple(block)} if strategy == "block" and isinstance(block, list | tuple) else {}
    dtype = str(scale.dtype).removeprefix("torch.")
    return Float8(granularity=strategy, scale_dtype=dtype, inputs=inputs, **options), (rows, columns)  # type: ignore[arg-type]


def _read_inputs(args: Any) -> InputScheme | None:
    """Raises PlanError for inputs that ``InputScheme`` does not know."""
    if args is None:
        return None
    if not isinstance(args, Mapping):
        raise PlanError("input_activations is not an object")
    strategy: Any = args.get("strategy") or ("group" if args.get("group_size") else "tensor")
    dynamic = args.get("dynamic", False)
    grouped = strategy in ("group", "tensor_group")
    return InputScheme(
        bits=args.get("num_bits", 8),
        number=args.get("type", "int"),
        strategy=strategy,
        dynamic=dynamic is True,
        symmetric=bool(args.get("symmetric", True)),
        group_size=args.get("group_size") if grouped else None,
        power_of_two=strategy == "group" and args.get("scale_dtype") in ("torch.uint8", "uint8"),
    )
