"""The AWQ layout in its GEMM form, as AutoAWQ, GPTQModel, vLLM and transformers read it: 4 bits, a zero point for every group.

Tensors of a quantized linear ``NAME`` (which has no ``NAME.weight``), ``G`` groups along ``in``:

=========== ======= ============= ==========================================================
``qweight`` int32   [in, out/8]   codes, packed along ``out``, eight to a word
``qzeros``  int32   [G, out/8]    zero points as they are, packed likewise
``scales``  float16 [G, out]
=========== ======= ============= ==========================================================

``W[o, i] = scales[i // g, o] * (q[i, o] - zero[i // g, o])``. The eight columns of a word are interleaved: nibble ``k`` (bits 4k to
4k + 3) of word ``c`` holds column ``8c + (0, 2, 4, 6, 1, 3, 5, 7)[k]``. There is no group index. Symmetric weights are stored with a zero
point of 8 everywhere and ``zero_point: true``: readers of the GEMM form always look at ``qzeros``, and vLLM has no fast kernel for
``zero_point: false``. That they are symmetric is told in ``meta``, which loaders carry along or leave unread.

Sources: AutoAWQ (final commit) ``awq/modules/linear/gemm.py`` and ``utils/packing_utils.py``; GPTQModel 7.7 ``quantization/config.py`` and
``nn_modules/qlinear/torch_awq.py``; vLLM 0.32 and 0.33 ``auto_awq.py``; transformers 5.23 ``integrations/awq.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from bitwright.core.bits import pack_words, unpack_words
from bitwright.core.layout import ENGINES, Layout, Read, check_stored, majority, transposed
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec, dtype_name, parse_dtype
from bitwright.errors import InputError, PlanError
from bitwright.layouts._names import experts, place, regexes, unique
from bitwright.schemes.affine import Affine

__all__ = ["LAYOUT", "Awq"]

BITS = 4
#: nibble -> column of a word's eight, and column -> nibble
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
#: vLLM ``MARLIN_SUPPORTED_GROUP_SIZES`` and ``AWQ_TRITON_SUPPORTED_GROUP_SIZES``; GPTQModel ``AwqTorchLinear.SUPPORTS_GROUP_SIZE``.
VLLM_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128)
#: Architectures whose activation transformers wraps in one that expects scales of AutoAWQ's files (``AWQ_SCALES_MAPPINGS``).
_SCALED_ACTIVATIONS = ("starcoder2", "RefinedWebModel", "falcon", "mpt", "gptj", "gpt_neox", "gpt_bigcode", "bloom")


@dataclass(frozen=True, kw_only=True)
class Awq(Layout):
    """AWQ files of version ``gemm``. One group size per checkpoint: the config has place for one."""

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str] = "awq"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        layout = super().from_config(config)
        found = str(config.get("version") or config.get("format") or "gemm").lower()
        if found != "gemm" or str(config.get("backend", "")).lower() == "llm-awq":
            raise InputError(f"AWQ version '{found}' is not read here", mend="convert it to version gemm")
        return layout

    def limits(self, model_dtype: torch.dtype) -> Limits:
        del model_dtype
        return Limits(scale_dtype=torch.float16)

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if not isinstance(scheme, Affine):
            return f"it stores affine integers, not {scheme.describe()}"
        if scheme.inputs is not None:
            return "it is a weight-only layout; inputs stay in 16 bits"
        if scheme.bits != BITS:
            return f"it stores 4 bits, not {scheme.bits}"
        if scheme.granularity == "tensor":
            return "it stores one scale per group or per channel, not per tensor"
        if scheme.symmetric and scheme.symmetric_range != "full":
            return "its symmetric range is 'full'"
        if scheme.scale_dtype != "float16":
            return f"its scales are float16, not {scheme.scale_dtype}"
        if scheme.granularity == "group" and columns % scheme.group_size:
            return f"in_features {columns} is not a multiple of group_size {scheme.group_size}"
        if not rows or not columns or rows % len(ORDER):
            return f"out_features {rows} does not fill whole words of eight codes"
        return None

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        affine = _affine(scheme)
        groups = affine.grid(shape)[1]
        return (
            TensorSpec(f"{name}.qweight", (columns, rows // len(ORDER)), torch.int32),
            TensorSpec(f"{name}.qzeros", (groups, rows // len(ORDER)), torch.int32),
            TensorSpec(f"{name}.scales", (groups, rows), parse_dtype(affine.scale_dtype)),
        )

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        affine = _affine(q.scheme)
        if "zero" in q.params:
            zero = q.params["zero"].t()
        else:
            zero = torch.full((affine.grid(q.shape)[1], q.shape[0]), affine.middle, dtype=torch.uint8)
        return {
            f"{name}.qweight": _pack(q.codes.t()),
            f"{name}.qzeros": _pack(zero),
            f"{name}.scales": transposed(q.params["scale"]),
        }

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        affine = _affine(scheme)
        qweight, qzeros, scales = (check_stored(tensors, spec) for spec in self.tensors(name, affine, shape))
        codes, zero, scale = transposed(_unpack(qweight)), transposed(_unpack(qzeros)), transposed(scales)
        if affine.symmetric and bool((zero == affine.middle).all()):
            return QuantizedTensor(affine, shape, codes, {"scale": scale})
        if affine.symmetric:
            # The config says symmetric, the tensors hold other zero points: these count.
            affine = _scheme(False, affine.group_size if affine.granularity == "group" else -1, scale.dtype)
        return QuantizedTensor(affine, shape, codes, {"scale": scale, "zero": zero})

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {_group_size(_affine(scheme)): name for name, scheme in entries.items()}
        if len(sizes) > 1:
            listed = ", ".join(f"{size} ({name})" for size, name in sizes.items())
            raise PlanError(
                f"an awq checkpoint has one group size, these modules have several: {listed}",
                mend="use one group size (-1 is per channel) for all modules, or another layout",
            )
        kept = unique(name for name in kept if name not in entries)
        kept += experts(kept, entries)
        inside = [name for name in kept if place(name).number is not None]
        symmetric = [name for name, scheme in entries.items() if _affine(scheme).symmetric]
        version = meta.get("version")
        return {
            "quant_method": self.quant_method,
            "bits": BITS,
            "group_size": _group_size(_affine(majority(entries))),
            "zero_point": True,
            "version": "gemm",
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in entries),
            "modules_to_not_convert": kept,
            # GPTQModel alone reads it: it knows which modules of a block are linear, not which of them were kept.
            **({"dynamic": {f"-:{pattern}": {} for pattern in regexes(inside)}} if inside else {}),
            "meta": {
                "quantizer": [f"bitwright:{version}" if version else "bitwright"],
                "symmetric": symmetric if 0 < len(symmetric) < len(entries) else bool(symmetric),
            },
        }

    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        del model_dtype, read
        bits = config.get("bits", config.get("w_bit", BITS))
        if bits != BITS:
            raise InputError(f"AWQ files of {bits} bits are not read here", mend="4 bits are")
        found: dict[str, tuple[Scheme, tuple[int, int]]] = {}
        for tensor in names:
            if tensor.endswith(".qweight"):
                name = tensor.removesuffix(".qweight")
                found[name] = _read_module(name, config, names)
        return found

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        if not isinstance(scheme, Affine):
            return dict.fromkeys(ENGINES, "not an AWQ scheme")
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        group = _group_size(scheme)
        if group not in VLLM_GROUPS:
            result["vllm"] = f"vLLM's AWQ kernels take group size 32, 64, 128 or per channel, not {group}"
        if group not in GPTQMODEL_GROUPS:
            why = f"GPTQModel's AWQ kernels know group sizes 16, 32, 64, 128 or per channel, not {group}"
            result["gptqmodel"] = result["transformers"] = why
        elif group == -1:
            result["transformers"] = (
                "per channel the file loads, but gptqmodel's kernel for the CPU wants groups of 32, 64, 128"
            )
        if model_type == "gpt2":
            result["transformers"] = "its Conv1D layers are not nn.Linear, which transformers replaces"
        elif model_type in _SCALED_ACTIVATIONS:
            result["transformers"] = "for this architecture it expects scales of the activation, which are not written"
        return result

    def loads_together(self, entries: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, str | None]:
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        if any(place(name).number is None for name in entries):
            result["transformers"] = "transformers never takes the output head of an awq file"
        skipped = [name for name in kept if name not in entries]
        for name in entries:
            if any(other in name for other in skipped):
                # vLLM compares by substring: a kept "mlp.gate" also names "mlp.gate_proj".
                result["vllm"] = f"vLLM would take {name} for kept: the name of a kept module is part of it"
            if any(name.endswith(other) for other in skipped):
                result["transformers"] = f"transformers would take {name} for kept: it ends in a kept module's name"
        return result

    def support(self) -> dict[str, str]:
        return {
            "vllm": "0.33: group size 32, 64, 128 or per channel, model in float16 or bfloat16",
            "transformers": "5.23 with gptqmodel and accelerate; no output head, no Conv1D",
            "gptqmodel": "7.7 (group size 16, 32, 64, 128 or per channel)",
            "bitwright": "any version",
        }


def _pack(values: torch.Tensor) -> torch.Tensor:
    """``(n, out)`` uint8 to ``(n, out/8)`` int32 words, each word's columns interleaved.

    >>> hex(int(_pack(torch.arange(8, dtype=torch.uint8)[None])))
    '0x75316420'
    """
    n = values.shape[0]
    return pack_words(values.reshape(n, -1, len(ORDER))[:, :, ORDER].reshape(n, -1), BITS)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Inverse of ``_pack``."""
    n, count = words.shape[0], words.shape[1] * len(ORDER)
    return unpack_words(words, BITS, count).view(n, -1, len(ORDER))[:, :, INVERSE].reshape(n, count)


def _affine(scheme: Scheme) -> Affine:
    if not isinstance(scheme, Affine):
        raise InputError(f"AWQ files hold affine integers, not {scheme.describe()}", mend="use another layout")
    return scheme


def _group_size(scheme: Affine) -> int:
    return scheme.group_size if scheme.granularity == "group" else -1


def _scheme(symmetric: bool, group_size: int, scale: torch.dtype) -> Affine:
    if scale not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"scales are {dtype_name(scale)}", mend="AWQ scales are float16")
    common: dict[str, Any] = {
        "bits": BITS,
        "symmetric": symmetric,
        "scale_dtype": str(scale).removeprefix("torch."),
    }
    return Affine(granularity="channel", **common) if group_size < 0 else Affine(group_size=group_size, **common)


def _read_module(
    name: str, config: Mapping[str, Any], names: Mapping[str, TensorSpec]
) -> tuple[Scheme, tuple[int, int]]:
    """Scheme and shape of one linear: what the shapes say, and of the config what they leave open."""
    qweight, scales = names[f"{name}.qweight"], names.get(f"{name}.scales")
    if scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        raise InputError(f"'{name}' has no matrices qweight and scales", mend="the file is incomplete; fetch it again")
    columns, words = qweight.shape
    groups, rows = scales.shape
    if words * len(ORDER) != rows:
        raise InputError(
            f"'{name}.qweight' is {qweight.shape} for {rows} outputs: not eight codes to a word along them",
            mend="the file is not of AWQ's GEMM form",
        )
    if groups == 0 or columns % groups:
        raise InputError(f"'{name}': {groups} groups do not divide in_features {columns}", mend="check group_size")
    group_size = config.get("group_size", config.get("q_group_size", -1))
    if not isinstance(group_size, int) or group_size * groups != columns:
        group_size = columns // groups if groups > 1 else -1
    meta = config.get("meta")
    said = meta.get("symmetric", False) if isinstance(meta, Mapping) else False
    symmetric = name in said if isinstance(said, list) else bool(said) or config.get("zero_point") is False
    return _scheme(symmetric, group_size, scales.dtype), (rows, columns)


LAYOUT = Awq
