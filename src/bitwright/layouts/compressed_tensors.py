"""The compressed-tensors layout: what vLLM loads of integers and small floats, weight-only or with quantized inputs.

======================== ============================ =================================== ==============================
format                   weights                      inputs                              tensors
======================== ============================ =================================== ==============================
``pack-quantized``       int 2, 4, 8                  as they are; int8 or fp8 per token  ``_ct_pack``
``int-quantized``        int8 per channel or tensor   as they are; int8 token or tensor   ``_ct_int``
``float-quantized``      fp8 tensor, channel, block   as they are; fp8 token, tensor;     ``_ct_float``
                                                      groups beside blocks
``nvfp4-pack-quantized`` NVFP4                        as they are; NVFP4                  ``_ct_float``
``mxfp4-pack-quantized`` MXFP4                        as they are; MXFP4, fp8             ``_ct_float``
``mxfp8-quantized``      MXFP8                        as they are; MXFP8                  ``_ct_float``
``mixed-precision``      groups that name their own format
======================== ============================ =================================== ==============================

Beside the tensors of the weight: ``input_scale`` float32 [1] and ``input_zero_point`` int8 [1] for static inputs per tensor,
``input_global_scale`` float32 [1], a divisor, for NVFP4 inputs; ``k_scale`` and ``v_scale`` of attention modules for a float8 KV cache.

Sources: compressed-tensors 0.17 .. 0.20 ``compressors`` and ``quantization``; vLLM ``compressed_tensors/utils.py`` (which targets match).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES, Layout, Read, check_stored, majority
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.layouts import _ct_float, _ct_int, _ct_pack
from bitwright.layouts._ct_config import (
    FORMATS,
    Quantized,
    format_of,
    group_of,
    input_args,
    kept_in_bytes,
    must_name,
    read_module,
    weight_args,
)
from bitwright.layouts._names import unique
from bitwright.schemes.affine import Affine
from bitwright.schemes.float8 import Float8
from bitwright.schemes.microscaling import Microscaling

__all__ = ["LAYOUT", "CompressedTensors"]

#: vLLM ``MARLIN_SUPPORTED_GROUP_SIZES``; -1 is one group per channel.
VLLM_GROUPS = (-1, 32, 64, 128)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_KV_CACHE = InputScheme(number="float", strategy="tensor", dynamic=False)


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Layout):
    """compressed-tensors files.

    int8_bytes: weight-only 8-bit integers per channel are stored as ``int-quantized`` (a byte per code, which vLLM does not load)
    rather than packed; it is there to read the files of writers that do so.
    """

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str] = "compressed-tensors"

    int8_bytes: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        super().from_config(config)
        return cls(int8_bytes=kept_in_bytes(config))

    def limits(self, model_dtype: torch.dtype) -> Limits:
        # Loaders cast scales to the model dtype, so codes are chosen with scales already rounded to it.
        return Limits(scale_dtype=model_dtype if model_dtype in _FLOATS else torch.float32)

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if isinstance(scheme, Affine):
            packed = format_of(scheme, self.int8_bytes) == "pack-quantized"
            return _ct_pack.refusal(scheme, shape) if packed else _ct_int.refusal(scheme, shape)
        if isinstance(scheme, Float8 | Microscaling):
            return _ct_float.refusal(scheme, shape)
        return f"it stores affine integers, float8 and microscaling formats, not {scheme.describe()}"

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        known = _known(scheme)
        if not isinstance(known, Affine):
            weight = _ct_float.tensors(name, known, shape)
        elif format_of(known, self.int8_bytes) == "pack-quantized":
            weight = _ct_pack.tensors(name, known, shape)
        else:
            weight = _ct_int.tensors(name, known, shape)
        return (*weight, *_input_tensors(name, known.inputs))

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        scheme = _known(q.scheme)
        if not isinstance(scheme, Affine):
            stored = _ct_float.pack(name, scheme, q)
        elif format_of(scheme, self.int8_bytes) == "pack-quantized":
            stored = _ct_pack.pack(name, scheme, q)
        else:
            stored = _ct_int.pack(name, scheme, q)
        return stored | _pack_inputs(name, q)

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        known = _known(scheme)
        in_bytes = f"{name}.weight_packed" not in tensors and f"{name}.weight" in tensors
        if not isinstance(known, Affine):
            codes, params = _ct_float.unpack(name, known, shape, tensors)
        elif format_of(known, self.int8_bytes) == "pack-quantized" and not in_bytes:
            codes, params = _ct_pack.unpack(name, known, shape, tensors)
        else:
            codes, params = _ct_int.unpack(name, known, shape, tensors)
        return QuantizedTensor(known, shape, codes, params, inputs=_unpack_inputs(name, known.inputs, tensors))

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        base = majority(entries)
        formats = {scheme: format_of(_known(scheme), self.int8_bytes) for scheme in dict.fromkeys(entries.values())}
        mixed = len(set(formats.values())) > 1
        groups: dict[str, Any] = {}
        # Exact names win over class names in whatever order. "Linear" comes first because transformers takes the first
        # group for fused experts, and because vLLM's fused experts know no other target.
        for scheme in sorted(formats, key=lambda s: s != base):
            targets = ["Linear"] if scheme == base else [name for name, own in entries.items() if own == scheme]
            group: dict[str, Any] = {
                "targets": targets,
                "weights": weight_args(_known(scheme)),
                "input_activations": input_args(scheme.inputs),
                "output_activations": None,
            }
            if mixed or must_name(_known(scheme), formats[scheme]):
                group["format"] = formats[scheme]
            groups[f"group_{len(groups)}"] = group
        return {
            "quant_method": self.quant_method,
            "format": "mixed-precision" if mixed else formats[base],
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": input_args(meta.get("kv_cache")),
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
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
            raise InputError("quantization_config lacks 'config_groups' in full", mend="fetch config.json again")
        for found in (config.get("format"), *(group.get("format") for group in groups.values())):
            if found not in (*FORMATS, "mixed-precision", None):
                raise InputError(f"compressed-tensors format '{found}' is not read here", mend="use its own loader")
        modules: dict[str, tuple[Scheme, tuple[int, int]]] = {}
        for tensor, spec in names.items():
            name, _, part = tensor.rpartition(".")
            if part == "weight_packed" or (part == "weight" and spec.dtype in (torch.int8, torch.float8_e4m3fn)):
                modules[name] = read_module(spec, group_of(name, groups), names, read)
        return modules

    def accepts_kv_cache(self, scheme: InputScheme) -> str | None:
        if scheme == _KV_CACHE:
            return None
        # vLLM, CompressedTensorsKVCacheMethod.validate_kv_cache_scheme
        return f"its readers know a KV cache of static float8 per tensor alone, and raise on {scheme.describe()}"

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        if not isinstance(scheme, Affine | Float8 | Microscaling):
            return dict.fromkeys(ENGINES, "not a scheme of compressed-tensors")
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        result["vllm"] = _refused_by_vllm(scheme, format_of(scheme, self.int8_bytes))
        if model_type == "gpt2":
            result["transformers"] = "its Conv1D layers are not nn.Linear, which compressed-tensors replaces"
        elif _packs_zeros(scheme, self.int8_bytes):
            result["transformers"] = (
                "asymmetric files need CompressedTensorsConfig(dequantize=True) in transformers 5.23"
            )
        result["gptqmodel"] = "GPTQModel reads gptq files, not compressed-tensors"
        return result

    def loads_together(self, entries: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, str | None]:
        del kept
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        schemes = set(entries.values())
        if len(schemes) > 1 and any(_packs_zeros(scheme, self.int8_bytes) for scheme in schemes):
            # transformers 5.23, integrations/compressed_tensors.py, get_dense_scheme
            result["transformers"] = (
                "dequantize=True, which asymmetric files need, decodes all modules by the first group"
            )
        return result

    def support(self) -> dict[str, str]:
        return {
            "vllm": "0.33: int 4 and 8 bits (group size 32, 64, 128 or per channel), int8 with int8 inputs, float8, NVFP4, MXFP4, MXFP8",
            "transformers": "5.23 with compressed-tensors >= 0.15; asymmetric packed files with dequantize=True; FP4 in bfloat16",
            "gptqmodel": "does not read it",
            "bitwright": "any version",
        }


def _known(scheme: Scheme) -> Quantized:
    if not isinstance(scheme, Affine | Float8 | Microscaling):
        raise InputError(
            f"compressed-tensors files hold affine integers and small floats, not {scheme.describe()}",
            mend="use another layout",
        )
    return scheme


def _packs_zeros(scheme: Scheme, int8_bytes: bool) -> bool:
    """Whether zero points are packed into words."""
    return isinstance(scheme, Affine) and not scheme.symmetric and format_of(scheme, int8_bytes) == "pack-quantized"


def _refused_by_vllm(scheme: Quantized, stored_as: str) -> str | None:
    """vLLM 0.33, ``_get_scheme_from_parts`` and the kernels behind it."""
    if isinstance(scheme, Float8):
        odd = scheme.granularity == "block" and scheme.block != (128, 128)
        return f"vLLM's kernels take blocks of 128x128, not {scheme.describe()}" if odd else None
    if isinstance(scheme, Microscaling):
        return None
    if stored_as == "int-quantized":
        if scheme.inputs is None:
            return "vLLM takes int-quantized files with quantized inputs alone"
        return None if scheme.symmetric else "vLLM multiplies symmetric int8 weights alone"
    group = scheme.group_size if scheme.granularity == "group" else -1
    if scheme.bits not in (4, 8):
        return f"its pack-quantized kernels take 4 and 8 bits, not {scheme.bits}"
    if group not in VLLM_GROUPS:
        return f"vLLM's kernels take group size 32, 64, 128 or per channel, not {group}"
    if scheme.inputs is not None and scheme.inputs.number == "float":
        return "4-bit weights with float8 inputs run on GPUs of compute capability 9.0 alone"
    return None


def _input_tensors(name: str, inputs: InputScheme | None) -> tuple[TensorSpec, ...]:
    """The stored static parameters of the inputs."""
    if inputs is None or inputs.dynamic:
        return ()
    if inputs.strategy == "tensor_group":
        return (TensorSpec(f"{name}.input_global_scale", (1,), torch.float32),)
    scale = TensorSpec(f"{name}.input_scale", (1,), torch.float32)
    return (scale,) if inputs.symmetric else (scale, TensorSpec(f"{name}.input_zero_point", (1,), torch.int8))


def _pack_inputs(name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    specs = _input_tensors(name, q.scheme.inputs)
    if not specs:
        return {}
    if specs[0].name.endswith("input_global_scale"):
        return {specs[0].name: 1.0 / q.inputs["input_scale"]}
    return {spec.name: q.inputs[part].clone() for spec, part in zip(specs, ("input_scale", "input_zero"), strict=False)}


def _unpack_inputs(
    name: str, inputs: InputScheme | None, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    params = {}
    for spec, part in zip(_input_tensors(name, inputs), ("input_scale", "input_zero"), strict=False):
        found = tensors.get(spec.name)
        if found is not None and found.numel() == 1 and found.is_floating_point():
            found = found.reshape(1).float()  # other writers store the model's dtype
        value = check_stored({spec.name: found} if found is not None else {}, spec)
        params[part] = 1.0 / value if spec.name.endswith("input_global_scale") else value
    return params


LAYOUT = CompressedTensors
