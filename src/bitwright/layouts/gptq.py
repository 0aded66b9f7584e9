"""The GPTQ layout, as AutoGPTQ, GPTQModel, vLLM and transformers read it.

Tensors of a quantized linear ``NAME`` (which has no ``NAME.weight``), ``G`` groups along ``in``:

=========== ======= =================== ====================================================================
``qweight`` int32   [in*bits/32, out]   codes, packed along ``in`` (down the transposed weight)
``qzeros``  int32   [G, out*bits/32]    zero points, packed along ``out``; minus one in checkpoint format v1
``scales``  float16 [G, out]
``g_idx``   int32   [in]                group of each column; always ``i // group_size`` in files written here
=========== ======= =================== ====================================================================

``W[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])``, everything unsigned. Symmetric means ``zero =
2^(bits-1)``.

Sources: AutoGPTQ 0.7.1 ``qlinear_cuda_old.py`` (packing), GPTQModel ``nn_modules/qlinear`` and
``quantization/config.py`` (``dynamic``), vLLM ``auto_gptq.py`` and ``gptq_utils.py``, optimum ``gptq/quantizer.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch

from bitwright.core.bits import pack_words, unpack_words
from bitwright.core.layout import ENGINES, Layout, Read, check_stored, majority, transposed
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec, dtype_name
from bitwright.errors import InputError
from bitwright.layouts._names import experts, place, regexes, unique
from bitwright.schemes.affine import Affine
from bitwright.schemes.affine_indexed import AffineIndexed

__all__ = ["LAYOUT", "Gptq"]

BITS = (2, 3, 4, 8)
#: GPTQModel ``TorchLinear.SUPPORTS_GROUP_SIZE`` and vLLM ``MARLIN_SUPPORTED_GROUP_SIZES``; -1 is one group per channel.
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
VLLM_GROUPS = (-1, 32, 64, 128)
_FORMATS = ("gptq", "gptq_v2")
#: Bits -> 1 in every field of a word, where no field crosses one. GPTQModel 7.7, utils/model.py: v1 zero points are words less this
#: (modulo 2^32), and 3-bit fields each less 1 (modulo 8).
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, kw_only=True)
class Gptq(Layout):
    """GPTQ files. checkpoint_format: ``gptq`` (v1, stores ``zero - 1``; every reader knows it) or ``gptq_v2``.

    whole_words: for reading v1 alone; its writer took the 1 from whole words, as GPTQModel does, so that a zero point of 0 has
    borrowed from the fields above it.
    """

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str] = "gptq"

    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    whole_words: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint_format not in _FORMATS:
            raise InputError(f"checkpoint_format '{self.checkpoint_format}' is unknown", mend="use gptq or gptq_v2")
        if self.whole_words and not self.zero_shift:
            raise InputError("whole_words is about v1 files", mend="leave it out")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        super().from_config(config)
        found = _checkpoint_format(config)
        return cls(checkpoint_format=found, whole_words=found == "gptq" and _by_gptqmodel(config))  # type: ignore[arg-type]

    @property
    def zero_shift(self) -> int:
        """What v1 subtracts from a zero point before it stores it."""
        return int(self.checkpoint_format == "gptq")

    @property
    def _zero_min(self) -> int:
        """The smallest zero point that a file may hold."""
        return 0 if self.whole_words else self.zero_shift

    def limits(self, model_dtype: torch.dtype) -> Limits:
        del model_dtype
        # A zero point of 0 would be stored as -1, which borrows from its neighbours in the word.
        return Limits(scale_dtype=torch.float16, zero_min=self.zero_shift)

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if not isinstance(scheme, Affine):
            return f"it stores affine integers, not {scheme.describe()}"
        if scheme.inputs is not None:
            return "it is a weight-only layout; inputs stay in 16 bits"
        if scheme.bits not in BITS:
            return f"it stores 2, 3, 4 or 8 bits, not {scheme.bits}"
        if scheme.granularity == "tensor":
            return "it stores one scale per group or per channel, not per tensor"
        if scheme.symmetric and scheme.symmetric_range != "full":
            return "its symmetric range is 'full'"
        if scheme.scale_dtype != "float16":
            return f"its scales are float16, not {scheme.scale_dtype}"
        if not scheme.symmetric and scheme.zero_min < self.zero_shift:
            return "v1 cannot store a zero point of 0; fit with zero_min 1, or use checkpoint_format gptq_v2"
        if scheme.granularity == "group" and columns % scheme.group_size:
            return f"in_features {columns} is not a multiple of group_size {scheme.group_size}"
        for what, size in (("in_features", columns), ("out_features", rows)):
            if not size or size * scheme.bits % 32:
                return f"{what} {size} at {scheme.bits} bits does not fill whole 32-bit words"
        return None

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        bits = _bits(scheme)
        groups = scheme.grid(shape)[1]
        scale = next(p.dtype for p in scheme.param_spec(shape) if p.name == "scale")
        return (
            TensorSpec(f"{name}.qweight", (columns * bits // 32, rows), torch.int32),
            TensorSpec(f"{name}.qzeros", (groups, rows * bits // 32), torch.int32),
            TensorSpec(f"{name}.scales", (groups, rows), scale),
            TensorSpec(f"{name}.g_idx", (columns,), torch.int32),
        )

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        assert isinstance(q.scheme, Affine)
        rows, columns = q.shape
        bits, groups = q.scheme.bits, q.scheme.grid(q.shape)[1]
        if "zero" in q.params:
            zero = q.params["zero"].t().to(torch.int32)
        else:
            zero = torch.full((groups, rows), q.scheme.middle, dtype=torch.int32)
        return {
            # Transposing words moves a bits/32 part of what transposing codes would.
            f"{name}.qweight": transposed(pack_words(q.codes, bits)),
            f"{name}.qzeros": pack_words(zero - self.zero_shift, bits),
            f"{name}.scales": transposed(q.params["scale"]),
            f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // q.scheme.span(columns),
        }

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        rows, columns = shape
        bits = _bits(scheme)
        *required, index_spec = self.tensors(name, scheme, shape)
        qweight, qzeros, scales = (check_stored(tensors, spec) for spec in required)
        codes = unpack_words(qweight.t(), bits, columns)
        if self.whole_words and bits in _ONES:
            qzeros = qzeros + _ONES[bits]
        zero = transposed(unpack_words(qzeros, bits, rows))
        if self.whole_words and bits not in _ONES:
            zero = (zero + 1) & (2**bits - 1)
        elif self.zero_shift and not self.whole_words:
            if bits == 8 and bool((zero == 255).any()):
                raise InputError(
                    f"'{name}.qzeros' holds 255, which v1 cannot mean", mend="the file's zero points overflowed"
                )
            zero += 1
        scale = transposed(scales)
        group_size = scheme.group_size if isinstance(scheme, AffineIndexed) else scheme.span(columns)
        plain = torch.arange(columns, dtype=torch.int32) // group_size
        # AutoGPTQ files of the first months have no g_idx.
        index = check_stored(tensors, index_spec) if index_spec.name in tensors else plain
        if isinstance(scheme, AffineIndexed) or not torch.equal(index, plain):
            groups = scale.shape[1]
            if int(index.min()) < 0 or int(index.max()) >= groups:
                raise InputError(f"'{name}.g_idx' names groups outside 0 .. {groups - 1}", mend="fetch the file again")
            indexed = AffineIndexed(bits=bits, group_size=group_size, scale_dtype=_plain_name(scale.dtype))
            return QuantizedTensor(indexed, shape, codes, {"scale": scale, "zero": zero, "g_idx": index})
        assert isinstance(scheme, Affine)
        if scheme.symmetric and bool((zero == scheme.middle).all()):
            return QuantizedTensor(scheme, shape, codes, {"scale": scale})
        if scheme.symmetric:
            # "sym": true beside other zero points: what the tensors say counts.
            scheme = _affine(
                bits, False, group_size if scheme.granularity == "group" else -1, scale.dtype, self._zero_min
            )
        return QuantizedTensor(scheme, shape, codes, {"scale": scale, "zero": zero})

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        base = majority(entries)
        kept = unique(name for name in kept if name not in entries)
        dynamic: dict[str, dict[str, Any]] = {
            f"-:{pattern}": {} for pattern in regexes([*kept, *experts(kept, entries)])
        }
        for scheme in dict.fromkeys(entries.values()):
            if scheme != base:
                own = [name for name, other in entries.items() if other == scheme]
                rest = [*kept, *(name for name, other in entries.items() if other != scheme)]
                dynamic |= {f"+:{pattern}": _numbers(scheme) for pattern in regexes([*own, *experts(own, rest)])}
        damping = meta.get("damping")
        sure = isinstance(damping, float) and 0.0 < damping < 1.0  # transformers refuses anything else
        version = meta.get("version")
        return {
            "quant_method": self.quant_method,
            **_numbers(base),
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in entries),
            "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format,
            "pack_dtype": "int32",
            **({"damp_percent": damping} if sure else {}),
            "static_groups": False,
            "true_sequential": bool(meta.get("sequential", True)),
            "modules_in_block_to_quantize": _positive_list(list(entries), kept),
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [f"bitwright:{version}" if version else "bitwright"]},
        }

    def side_files(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """The sidecar that AutoGPTQ read and GPTQModel still reads."""
        return {"quantize_config.json": (json.dumps(dict(config), indent=2) + "\n").encode()}

    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        del model_dtype, read
        if _checkpoint_format(config) != self.checkpoint_format:
            raise InputError(
                f"the file's checkpoint format is {_checkpoint_format(config)}, not {self.checkpoint_format}",
                mend="take the layout from Gptq.from_config(config)",
            )
        if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise InputError(f"pack_dtype {config['pack_dtype']} is not read here", mend="repack it to int32")
        found = {}
        for tensor in names:
            if tensor.endswith(".qweight"):
                name = tensor.removesuffix(".qweight")
                found[name] = self._read_module(name, _override(config, name), names)
        return found

    def _read_module(
        self, name: str, config: Mapping[str, Any], names: Mapping[str, TensorSpec]
    ) -> tuple[Scheme, tuple[int, int]]:
        """Scheme and shape of one linear: what the shapes say, and of the config what they leave open."""
        qweight, scales, index = (names.get(f"{name}.{part}") for part in ("qweight", "scales", "g_idx"))
        if scales is None or qweight is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
            raise InputError(
                f"'{name}' has no matrices qweight and scales", mend="the file is incomplete; fetch it again"
            )
        words, rows = qweight.shape
        groups = scales.shape[0]
        bits = config.get("bits")
        if index is not None and index.shape and index.shape[0]:
            bits, odd = divmod(words * 32, index.shape[0])
            bits = 0 if odd else bits
        if bits not in BITS:
            raise InputError(f"'{name}' is stored in {bits} bits", mend="2, 3, 4 and 8 bits are read here")
        columns = index.shape[0] if index is not None else words * 32 // bits
        group_size = config.get("group_size", -1)
        if not isinstance(group_size, int) or group_size <= 0 or -(-columns // group_size) != groups:
            if groups == 0 or columns % groups:
                raise InputError(
                    f"'{name}': {groups} groups do not divide in_features {columns}", mend="check group_size"
                )
            group_size = columns // groups if groups > 1 else -1
        elif groups == 1 and group_size != columns:
            group_size = -1
        if group_size > 0 and columns % group_size:
            short = AffineIndexed(bits=bits, group_size=group_size, scale_dtype=_plain_name(scales.dtype))
            return short, (rows, columns)
        symmetric = bool(config.get("sym", True))
        return _affine(bits, symmetric, group_size, scales.dtype, self._zero_min), (rows, columns)

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        del model_type
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        if not isinstance(scheme, Affine):
            return dict.fromkeys(ENGINES, "not a GPTQ scheme")
        group = _group_size(scheme)
        if scheme.bits not in (4, 8) or not scheme.symmetric:
            kind = "symmetric" if scheme.symmetric else "asymmetric"
            result["vllm"] = f"vLLM loads GPTQ files of 4 or 8 bits, symmetric alone, not {scheme.bits} bits {kind}"
        elif group not in VLLM_GROUPS:
            result["vllm"] = f"vLLM loads GPTQ files of group size 32, 64, 128 or per channel, not {group}"
        if not scheme.symmetric and self.zero_shift:
            # GPTQModel 7.7, models/loader.py: old writers of v1 disagreed about asymmetric zero points.
            result["gptqmodel"] = "GPTQModel refuses other writers' asymmetric v1 files; use checkpoint_format gptq_v2"
        if group not in GPTQMODEL_GROUPS:
            why = f"GPTQModel's kernels know group sizes 16, 32, 64 .. 1024 or per channel, not {group}"
            result["gptqmodel"] = result["transformers"] = why
        return result

    def loads_together(self, entries: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, str | None]:
        del kept
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        if len(set(entries.values())) > 1:
            result["transformers"] = "optimum ignores 'dynamic', which holds the schemes that differ from the first"
        elif any(place(name).number is None for name in entries):
            result["transformers"] = "optimum replaces linears of the decoder blocks alone, no output head"
        return result

    def support(self) -> dict[str, str]:
        return {
            "vllm": "0.33: 4 or 8 bits, symmetric, group size 32, 64, 128 or per channel, model in float16 or bfloat16",
            "transformers": "5.23 with optimum and gptqmodel >= 1.4.3; one scheme per model, no output head",
            "gptqmodel": "7.7 (2, 3, 4, 8 bits; group size 16 .. 1024 or per channel; asymmetric as gptq_v2)",
            "bitwright": "any version",
        }


def _checkpoint_format(config: Mapping[str, Any]) -> str:
    """``checkpoint_format``, else GPTQModel's newer name ``format``, else v1."""
    found = config.get("checkpoint_format") or config.get("format") or "gptq"
    if found not in _FORMATS:
        raise InputError(f"GPTQ checkpoint format '{found}' is not read here", mend="convert it to gptq or gptq_v2")
    return str(found)


def _by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether GPTQModel says in ``meta`` that it wrote the file."""
    meta = config.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return any(str(w).startswith("gptqmodel:") for w in (writers if isinstance(writers, list) else [writers]))


def _override(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config with the first ``dynamic`` rule that matches ``name`` applied: start-anchored, first match wins."""
    for pattern, values in (config.get("dynamic") or {}).items():
        negative = pattern.startswith("-:")
        try:
            hit = re.match(pattern.removeprefix("-:" if negative else "+:"), name)
        except re.error as error:
            raise InputError(
                f"dynamic rule '{pattern}' is not a regular expression: {error}", mend="mend it"
            ) from error
        if hit:
            return {**config} if negative else {**config, **values}
    return {**config}


def _plain_name(dtype: torch.dtype) -> str:
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"scales are {dtype_name(dtype)}", mend="GPTQ scales are float16")
    return str(dtype).removeprefix("torch.")


def _affine(bits: int, symmetric: bool, group_size: int, scale: torch.dtype, zero_min: int) -> Affine:
    """An ``Affine`` scheme as this layout's limits leave it; group_size -1 means per channel."""
    common: dict[str, Any] = {
        "bits": bits,
        "symmetric": symmetric,
        "scale_dtype": _plain_name(scale),
        "zero_min": zero_min,
    }
    return Affine(granularity="channel", **common) if group_size < 0 else Affine(group_size=group_size, **common)


def _bits(scheme: Scheme) -> int:
    if not isinstance(scheme, Affine | AffineIndexed):
        raise InputError(f"GPTQ files hold affine integers, not {scheme.describe()}", mend="use another layout")
    return scheme.bits


def _group_size(scheme: Affine) -> int:
    return scheme.group_size if scheme.granularity == "group" else -1


def _numbers(scheme: Scheme) -> dict[str, Any]:
    """The keys that a ``dynamic`` rule may override."""
    if not isinstance(scheme, Affine):
        raise InputError(f"GPTQ files hold affine integers, not {scheme.describe()}", mend="use another layout")
    return {"bits": scheme.bits, "group_size": _group_size(scheme), "desc_act": False, "sym": scheme.symmetric}


def _positive_list(names: Sequence[str], kept: Sequence[str]) -> list[list[str]]:
    """``modules_in_block_to_quantize``: one list per parent module.

    optimum takes modules whose name ends in an entry, vLLM those whose name contains one. The place inside the block is
    enough where every block is treated alike; where it would also hit a kept module the full names are listed.
    """
    lists: dict[str, list[str]] = {}
    for name in names:
        inside = place(name).inside
        entry = name if any(inside in other for other in kept) else inside
        chosen = lists.setdefault(entry.rpartition(".")[0], [])
        if entry not in chosen:
            chosen.append(entry)
    return list(lists.values())


LAYOUT = Gptq
