"""The compressed-tensors layout, ``pack-quantized``: weight-only integers for vLLM and transformers.

Tensors of a quantized linear ``NAME`` (which has no ``NAME.weight``), ``G`` groups along ``in``:

===================== ============= =======================  ==================================================
``weight_packed``     int32         [out, ceil(in*bits/32)]  signed code + 2^(bits-1), packed along ``in``
``weight_scale``      model dtype   [out, G]
``weight_shape``      int64         [2]                      out, in
``weight_zero_point`` int32         [ceil(out*bits/32), G]   asymmetric alone; + 2^(bits-1), packed along ``out``
===================== ============= =======================  ==================================================

``W = (q - zp) * scale`` on the signed grid; adding 2^(bits-1) to both gives the unsigned codes and zero points kept
here. ``int-quantized`` files of other writers (``weight`` int8, no packing) are read too.

Sources: compressed-tensors 0.17 .. 0.20 ``compressors/pack_quantized`` and ``quantization/quant_config.py``; vLLM
``compressed_tensors/utils.py`` (which targets match).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.bits import pack_words, packed_words, unpack_words
from bitwright.core.layout import ENGINES, Layout, Read, check_stored, majority, transposed
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.layouts._names import unique
from bitwright.schemes.affine import Affine

__all__ = ["LAYOUT", "CompressedTensors"]

#: Widths whose packing is the same in every release. 3, 5 and 6 bits: releases before 0.18 put floor(32/bits) fields in
#: a word.
BITS = (2, 4, 8)
#: vLLM ``MARLIN_SUPPORTED_GROUP_SIZES``; -1 is one group per channel.
VLLM_GROUPS = (-1, 32, 64, 128)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_READ_FORMATS = ("pack-quantized", "int-quantized", "mixed-precision", None)


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Layout):
    """compressed-tensors files of format ``pack-quantized``."""

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str] = "compressed-tensors"

    def limits(self, model_dtype: torch.dtype) -> Limits:
        # Loaders cast scales to the model dtype, so codes are chosen with scales already rounded to it.
        return Limits(scale_dtype=model_dtype if model_dtype in _FLOATS else torch.float32)

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if not isinstance(scheme, Affine):
            return f"it stores affine integers, not {scheme.describe()}"
        if scheme.bits not in BITS:
            return (
                f"{scheme.bits}-bit words mean different things to its readers; 2, 4 and 8 bits are the same everywhere"
            )
        if scheme.granularity == "tensor":
            return "pack-quantized stores one scale per group or per channel, not per tensor"
        if scheme.symmetric and scheme.symmetric_range != "full":
            return "its symmetric range is 'full'"
        if scheme.granularity == "group" and columns % scheme.group_size:
            return f"in_features {columns} is not a multiple of group_size {scheme.group_size}"
        if not rows or not columns:
            return f"a weight of shape {shape} is empty"
        return None

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        affine = _affine(scheme)
        rows, columns = shape
        grid = affine.grid(shape)
        specs = [
            TensorSpec(f"{name}.weight_packed", (rows, packed_words(columns, affine.bits)), torch.int32),
            TensorSpec(f"{name}.weight_scale", grid, affine.param_spec(shape)[0].dtype),
            TensorSpec(f"{name}.weight_shape", (2,), torch.int64),
        ]
        if not affine.symmetric:
            # Readers cannot place zero points of a symmetric scheme, so they are there for asymmetric ones alone.
            zeros = (packed_words(rows, affine.bits), grid[1])
            specs.append(TensorSpec(f"{name}.weight_zero_point", zeros, torch.int32))
        return tuple(specs)

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        bits = _affine(q.scheme).bits
        stored = {
            f"{name}.weight_packed": pack_words(q.codes, bits),
            f"{name}.weight_scale": q.params["scale"].clone(memory_format=torch.contiguous_format),
            f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if "zero" in q.params:
            stored[f"{name}.weight_zero_point"] = transposed(pack_words(q.params["zero"].t(), bits))
        return stored

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        affine = _affine(scheme)
        if f"{name}.weight_packed" not in tensors and f"{name}.weight" in tensors:
            return _unpack_bytes(name, affine, shape, tensors)
        packed, scale, stored_shape, *zeros = (check_stored(tensors, s) for s in self.tensors(name, affine, shape))
        if tuple(stored_shape.tolist()) != shape:
            raise InputError(
                f"'{name}.weight_shape' says {stored_shape.tolist()}, expected {shape}", mend="read it anew"
            )
        params = {"scale": scale}
        if zeros:
            params["zero"] = transposed(unpack_words(zeros[0].t(), affine.bits, shape[0]))
        return QuantizedTensor(affine, shape, unpack_words(packed, affine.bits, shape[1]), params)

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        del meta  # its records forbid unknown keys
        base = majority(entries)
        groups: dict[str, Any] = {}
        # Exact names win over class names in whatever order. "Linear" comes first because transformers takes the first
        # group for fused experts, and because vLLM's fused experts know no other target.
        for scheme in sorted(dict.fromkeys(entries.values()), key=lambda s: s != base):
            targets = ["Linear"] if scheme == base else [name for name, own in entries.items() if own == scheme]
            groups[f"group_{len(groups)}"] = {
                "targets": targets,
                "weights": _numbers(scheme),
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": self.quant_method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": unique(name for name in kept if name not in entries),
            "config_groups": groups,
        }

    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        del model_dtype
        if config.get("format") not in _READ_FORMATS:
            raise InputError(
                f"compressed-tensors format '{config.get('format')}' is not read here", mend="use its own loader"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
            raise InputError("quantization_config lacks 'config_groups' in full", mend="fetch config.json again")
        found: dict[str, tuple[Scheme, tuple[int, int]]] = {}
        for tensor, spec in names.items():
            name, _, part = tensor.rpartition(".")
            if part == "weight_packed" or (part == "weight" and spec.dtype == torch.int8):
                scale = names.get(f"{name}.weight_scale")
                if scale is None or len(spec.shape) != 2:
                    raise InputError(f"'{tensor}' has no weight_scale or is no matrix", mend="the file is incomplete")
                args = _group_of(name, groups).get("weights") or {}
                found[name] = _read_module(spec, scale, args, names, read)
        return found

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        if not isinstance(scheme, Affine):
            return dict.fromkeys(ENGINES, "not a pack-quantized scheme")
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        group = scheme.group_size if scheme.granularity == "group" else -1
        if scheme.bits not in (4, 8):
            result["vllm"] = f"its pack-quantized kernels take 4 and 8 bits, not {scheme.bits}"
        elif group not in VLLM_GROUPS:
            result["vllm"] = f"vLLM's kernels take group size 32, 64, 128 or per channel, not {group}"
        if model_type == "gpt2":
            result["transformers"] = "its Conv1D layers are not nn.Linear, which compressed-tensors replaces"
        elif not scheme.symmetric:
            result["transformers"] = (
                "asymmetric files need CompressedTensorsConfig(dequantize=True) in transformers 5.23"
            )
        result["gptqmodel"] = "GPTQModel reads gptq files, not compressed-tensors"
        return result

    def loads_together(self, entries: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, str | None]:
        del kept
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        schemes = set(entries.values())
        if len(schemes) > 1 and not all(_affine(scheme).symmetric for scheme in schemes):
            # transformers 5.23, integrations/compressed_tensors.py, get_dense_scheme
            result["transformers"] = (
                "dequantize=True, which asymmetric files need, decodes all modules by the first group"
            )
        return result

    def support(self) -> dict[str, str]:
        return {
            "vllm": "0.33 (4 and 8 bits, symmetric or not; group size 32, 64, 128 or per channel)",
            "transformers": "5.23 with compressed-tensors >= 0.15; asymmetric files with dequantize=True",
            "gptqmodel": "does not read it",
            "bitwright": "any version",
        }


def _affine(scheme: Scheme) -> Affine:
    if not isinstance(scheme, Affine):
        raise InputError(
            f"pack-quantized files hold affine integers, not {scheme.describe()}", mend="use another layout"
        )
    return scheme


def _numbers(scheme: Scheme) -> dict[str, Any]:
    """``QuantizationArgs``: the keys that every release since 0.9 knows; one unknown key makes a model unloadable."""
    affine = _affine(scheme)
    grouped = affine.granularity == "group"
    return {
        "num_bits": affine.bits,
        "type": "int",
        "symmetric": affine.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": affine.group_size if grouped else None,
        "dynamic": False,
    }


def _group_of(name: str, groups: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
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


def _read_module(
    spec: TensorSpec, scale: TensorSpec, args: Mapping[str, Any], names: Mapping[str, TensorSpec], read: Read | None
) -> tuple[Scheme, tuple[int, int]]:
    """spec: ``weight_packed`` or int8 ``weight``; args: the group's ``QuantizationArgs`` of weights."""
    name = spec.name.rpartition(".")[0]
    bits, strategy = args.get("num_bits"), args.get("strategy") or ("group" if args.get("group_size") else "tensor")
    if args.get("type", "int") != "int" or strategy not in ("group", "channel", "tensor"):
        raise InputError(
            f"'{name}': {args.get('type')} {strategy} weights are not read here", mend="use its own loader"
        )
    if f"{name}.weight_g_idx" in names:
        raise InputError(f"'{name}' has a group index, which current readers refuse too", mend="quantize it anew")
    if scale.dtype not in _FLOATS or bits not in BITS:
        raise InputError(
            f"'{name}': {bits} bits with scales {scale.dtype} are not read here", mend="use its own loader"
        )
    rows, words = spec.shape
    columns = words
    if spec.dtype == torch.int32:
        columns = words * 32 // bits
        shape_name = f"{name}.weight_shape"
        if strategy == "group":
            columns = scale.shape[1] * int(args["group_size"])
        elif read is not None and shape_name in names:
            columns = int(read(shape_name)[1])
        if packed_words(columns, bits) != words:
            raise InputError(
                f"'{name}': {words} words are not {columns} columns of {bits} bits", mend="check group_size"
            )
    elif bits != 8:
        raise InputError(f"'{name}': {bits}-bit codes in bytes are not read here", mend="use its own loader")
    options: dict[str, Any] = {
        "bits": bits,
        "symmetric": bool(args.get("symmetric", True)),
        "granularity": strategy,
        "scale_dtype": str(scale.dtype).removeprefix("torch."),
    }
    if strategy == "group":
        options["group_size"] = int(args["group_size"])
    return Affine(**options), (rows, columns)


def _unpack_bytes(
    name: str, scheme: Affine, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
) -> QuantizedTensor:
    """``int-quantized``: one signed byte per code, scale ``[out, G]``, ``[out, 1]`` or ``[1]``."""
    weight = check_stored(tensors, TensorSpec(f"{name}.weight", shape, torch.int8))
    params = {}
    for part, spec in zip(("weight_scale", "weight_zero_point"), scheme.param_spec(shape), strict=False):
        found = tensors.get(f"{name}.{part}")
        if found is None or found.numel() != spec.shape[0] * spec.shape[1]:
            raise InputError(
                f"tensor '{name}.{part}' is missing or has another shape than {spec.shape}", mend="fetch it again"
            )
        value = found.reshape(spec.shape)
        params[spec.name] = value.to(spec.dtype) if spec.name == "scale" else _unsigned(value)
    return QuantizedTensor(scheme, shape, _unsigned(weight), params)


def _unsigned(value: torch.Tensor) -> torch.Tensor:
    """int8 to uint8, plus 128: the sign bit flips."""
    return value.to(torch.int8).view(torch.uint8) ^ 0x80


LAYOUT = CompressedTensors
