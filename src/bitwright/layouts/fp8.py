"""The fine-grained FP8 layout (``quant_method`` "fp8"): float8 e4m3 in blocks of 128 x 128, as DeepSeek-V3 published it.

==================== ============== ==================== =================
``weight``           float8_e4m3fn  [out, in]
``weight_scale_inv`` float32        [out/128, in/128]    *multiplies*
==================== ============== ==================== =================

``W[o, i] = fp8(weight[o, i]) * weight_scale_inv[o // 128, i // 128]``. Inputs are quantized as the layer runs, per token in groups of
128 columns; loaders do so whatever the file says, so every scheme stored here has those inputs.

Files of other writers may hold one scale per tensor, under names on which vLLM (``weight_scale``, ``input_scale``) and transformers
(``weight_scale_inv``, ``activation_scale``) differ. They are read, and none is written: a file could not serve both.

Sources: arXiv:2412.19437, section 3.3; transformers 5.23 ``integrations/finegrained_fp8.py`` and ``FineGrainedFP8Config``; vLLM
``quantization/fp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES, Layout, Read, check_stored, majority
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.layouts._names import unique
from bitwright.schemes.float8 import Float8

__all__ = ["LAYOUT", "Fp8"]

BLOCK = (128, 128)
#: Dtypes of scales that are float32 numbers without loss; e8m0 is ``scale_fmt: ue8m0``.
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True, kw_only=True)
class Fp8(Layout):
    """Fine-grained FP8 files. scalars: whose names a file with one scale per tensor uses, for reading alone."""

    name: ClassVar[str] = "fp8"
    quant_method: ClassVar[str] = "fp8"

    scalars: Literal["vllm", "transformers"] = "vllm"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        super().from_config(config)
        # transformers writes the key with every file and takes 128 x 128 where it is absent; vLLM's writers leave it out.
        explicit = "weight_block_size" in config and config["weight_block_size"] is None
        return cls(scalars="transformers" if explicit else "vllm")

    def limits(self, model_dtype: torch.dtype) -> Limits:
        del model_dtype
        return Limits(scale_dtype=torch.float32)

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Float8) or scheme.element != "e4m3":
            return f"it stores float8 e4m3, not {scheme.describe()}"
        if scheme.granularity != "block" or scheme.block != BLOCK:
            return f"it stores blocks of 128x128, not {scheme.describe()}; compressed-tensors stores the others"
        if scheme.scale_dtype != "float32":
            return f"its scales are float32, not {scheme.scale_dtype}"
        if scheme.inputs != _inputs(BLOCK[1]):
            return f"its loaders round inputs to {_inputs(BLOCK[1]).describe()}; give the scheme these inputs"
        for what, size in (("out_features", shape[0]), ("in_features", shape[1])):
            if not size or size % 128:
                # transformers derives the block from the shapes: 300 rows under 3 scales would be blocks of 100.
                return f"{what} {size} is not a multiple of 128; keep this layer in high precision"
        return None

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        known = _float8(scheme)
        weight = TensorSpec(f"{name}.weight", shape, torch.float8_e4m3fn)
        if known.granularity == "block":
            return (weight, TensorSpec(f"{name}.weight_scale_inv", known.grid(shape), torch.float32))
        scale, inputs = _SCALAR_NAMES[self.scalars]
        stored = (weight, TensorSpec(f"{name}.{scale}", (1,), torch.float32))
        if known.inputs is None or known.inputs.dynamic:
            return stored
        return (*stored, TensorSpec(f"{name}.{inputs}", (1,), torch.float32))

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        return {
            f"{name}.weight": q.codes.clone(memory_format=torch.contiguous_format).view(torch.float8_e4m3fn),
            f"{name}.weight_scale_inv": q.params["scale"].clone(memory_format=torch.contiguous_format),
        }

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        known = _float8(scheme)
        weight, scale, *inputs = self.tensors(name, known, shape)
        codes = check_stored(tensors, weight).contiguous().view(torch.uint8)
        params = {"scale": _scale(tensors, TensorSpec(scale.name, known.grid(shape), torch.float32))}
        static = [_scale(tensors, spec) for spec in inputs]
        return QuantizedTensor(known, shape, codes, params, inputs={"input_scale": static[0]} if static else {})

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        del meta
        majority(entries)  # raises where nothing is quantized
        return {
            "quant_method": self.quant_method,
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(BLOCK),
            # Full names: vLLM compares whole names, transformers also prefixes up to a dot and suffixes.
            "modules_to_not_convert": unique(name for name in kept if name not in entries),
        }

    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        del model_dtype, read
        blocks = any(t.endswith(".weight_scale_inv") and len(spec.shape) == 2 for t, spec in names.items())
        scheme = _read_scheme(config, blocks)
        found: dict[str, tuple[Scheme, tuple[int, int]]] = {}
        for tensor, spec in names.items():
            name, _, part = tensor.rpartition(".")
            if part != "weight" or spec.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
                continue
            if spec.dtype != torch.float8_e4m3fn or len(spec.shape) != 2:
                raise InputError(f"'{tensor}' is no matrix of float8 e4m3", mend="use its own loader")
            missing = [part.name for part in self.tensors(name, scheme, spec.shape) if part.name not in names]
            if missing:
                raise InputError(
                    f"'{tensor}' is float8, but {', '.join(missing)} is not there", mend="the file is incomplete"
                )
            found[name] = (scheme, spec.shape)
        return found

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        if not isinstance(scheme, Float8):
            return dict.fromkeys(ENGINES, "not a float8 scheme")
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        if scheme.granularity != "block":
            other = "transformers" if self.scalars == "vllm" else "vllm"
            result[other] = f"the names of a scale per tensor are those of {self.scalars}"
        elif scheme.block != BLOCK:
            result["vllm"] = f"vLLM's kernels take blocks of 128x128, not {scheme.describe()}"
        if model_type == "gpt2":
            result["transformers"] = "its Conv1D layers are not nn.Linear, which transformers replaces"
        result["gptqmodel"] = "GPTQModel does not read fp8 files"
        return result

    def loads_together(self, entries: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, str | None]:
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        if any(name.rpartition(".")[2] == "lm_head" for name in entries):
            result["vllm"] = "vLLM keeps the output head of fp8 files in 16 bits"
            if all(name in entries for name in kept):
                result["transformers"] = "without a list of kept modules transformers keeps the output head"
        return result

    def support(self) -> dict[str, str]:
        return {
            "vllm": "0.33: GPUs of compute capability 7.5 and above; below 8.9 weight-only",
            "transformers": "5.23 with accelerate; GPUs of compute capability 8.9 and above, elsewhere decoded to 16 bits",
            "gptqmodel": "does not read it",
            "bitwright": "any version",
        }


#: whose names -> the scale of the weight and of static inputs
_SCALAR_NAMES = {"vllm": ("weight_scale", "input_scale"), "transformers": ("weight_scale_inv", "activation_scale")}


def _inputs(group_size: int) -> InputScheme:
    """What loaders round inputs to beside blocks of this width."""
    return InputScheme(number="float", strategy="group", group_size=group_size)


def _float8(scheme: Scheme) -> Float8:
    if not isinstance(scheme, Float8):
        raise InputError(f"fp8 files hold float8, not {scheme.describe()}", mend="use another layout")
    return scheme


def _scale(tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
    """A stored scale in float32 and in the shape of ``spec``; one alone may be a scalar. InputError where it is another's."""
    found = tensors.get(spec.name)
    single = found is not None and found.numel() == 1 and spec.shape in ((1,), (1, 1))
    if found is not None and found.dtype in _SCALES and (single or tuple(found.shape) == spec.shape):
        return found.reshape(spec.shape).float().contiguous()
    return check_stored(tensors, spec)


def _read_scheme(config: Mapping[str, Any], blocks: bool) -> Float8:
    """The one scheme of a file. blocks: whether it holds matrices of scales, whose blocks are 128 x 128 if the config is silent."""
    fmt, experts = str(config.get("fmt", "e4m3")), str(config.get("expert_dtype", "fp8"))
    if fmt not in ("e4m3", "float8_e4m3fn") or experts != "fp8":
        raise InputError(f"fp8 files of {fmt} with experts in {experts} are not read here", mend="use its own loader")
    activation = str(config.get("activation_scheme", "dynamic")).lower()
    if activation not in ("dynamic", "static"):
        raise InputError(f"activation_scheme '{activation}' is unknown", mend="fetch config.json again")
    block = config.get("weight_block_size") or (BLOCK if blocks else None)
    if block is None:
        static = InputScheme(number="float", strategy="tensor", dynamic=False)
        return Float8(granularity="tensor", inputs=static if activation == "static" else InputScheme(number="float"))
    pair = isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if not pair or activation == "static":
        raise InputError(f"blocks {block!r} with {activation} inputs are not read here", mend="fetch config.json again")
    return Float8(granularity="block", block=(block[0], block[1]), inputs=_inputs(block[1]))


LAYOUT = Fp8
