"""The bitsandbytes layout: NF4 and FP4, with or without double quantization, and LLM.int8.

4 bits, of a quantized linear ``NAME`` with ``n = out * in`` weights in ``B = ceil(n / blocksize)`` blocks:

================================================ ======== =====================================================================
``NAME.weight``                                  uint8    [ceil(n / 2), 1], flat row-major, **high nibble first**
``NAME.weight.absmax``                           float32  [B]; uint8 with double quantization
``NAME.weight.quant_map``                        float32  [16]
``NAME.weight.nested_absmax``                    float32  [ceil(B / 256)], double quantization alone
``NAME.weight.nested_quant_map``                 float32  [256], double quantization alone
``NAME.weight.quant_state.bitsandbytes__nf4``    uint8    a JSON object: quant_type, blocksize, dtype, shape, nested_blocksize,
(or ``__fp4``)                                            nested_dtype, nested_offset; no other keys are allowed
================================================ ======== =====================================================================

LLM.int8: ``NAME.weight`` int8 [out, in], ``NAME.SCB`` float32 [out] (row magnitudes), ``NAME.weight_format`` uint8 [] (0: by rows);
``W = q * SCB / 127``.

Sources: bitsandbytes 0.50.2 ``functional.py`` (QuantState) and ``nn/modules.py``; transformers 5.23 ``quantizers/quantizer_bnb_*.py``,
``integrations/bitsandbytes.py`` and ``utils/quantization_config.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES, Layout, Read, check_stored, majority
from bitwright.core.linalg import one_thread
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError
from bitwright.layouts._names import place, unique
from bitwright.schemes._books import FP4_ORDER, dynamic_map
from bitwright.schemes.absmax_int8 import AbsmaxInt8
from bitwright.schemes.codebook import NESTED, Codebook

__all__ = ["LAYOUT", "Bitsandbytes"]

_BOOKS = ("nf4", "fp4")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STATE = re.compile(r"(.*)\.weight\.quant_state\.bitsandbytes__(nf4|fp4)")
_EXPERT = re.compile(r".*\.experts\.\d+\.")
#: Architectures of transformers 5.23 whose linears subclass nn.Linear.
_OWN_LINEARS = frozenset({"falcon"})
#: Pairs of codes packed at a time: temporaries stay in the cache. 2^17 was fastest of 2^14 .. 2^18.
_PIECE = 1 << 17
#: Threshold that transformers writes into every file, also those of 4 bits.
_THRESHOLD = 6.0


@dataclass(frozen=True, kw_only=True)
class Bitsandbytes(Layout):
    """bitsandbytes files, as transformers saves and loads them."""

    name: ClassVar[str] = "bitsandbytes"
    quant_method: ClassVar[str] = "bitsandbytes"

    def limits(self, model_dtype: torch.dtype) -> Limits:
        # quant_state names the dtype that a loader decodes to.
        return Limits(scale_dtype=model_dtype if model_dtype in _FLOATS else torch.float32)

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not shape[0] or not shape[1]:
            return f"a weight of shape {shape} is empty"
        if isinstance(scheme, Codebook):
            return None if scheme.book in _BOOKS else f"its code books are nf4 and fp4, not {scheme.book}"
        if not isinstance(scheme, AbsmaxInt8):
            return f"it stores nf4, fp4 and int8 by rows (absmax-int8), not {scheme.describe()}"
        if scheme.inputs is None:
            return "its loaders quantize the inputs of int8 layers too; state inputs int8 per token, with a threshold (6.0)"
        if scheme.inputs != InputScheme(threshold=scheme.inputs.threshold):
            return f"inputs of its int8 layers are int8 per token, symmetric, dynamic, not {scheme.inputs.describe()}"
        return None

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        if isinstance(scheme, AbsmaxInt8):
            return (
                TensorSpec(f"{name}.weight", shape, torch.int8),
                TensorSpec(f"{name}.SCB", (rows,), torch.float32),
                TensorSpec(f"{name}.weight_format", (), torch.uint8),
            )
        book = _codebook(scheme)
        weight, blocks = f"{name}.weight", -(-rows * columns // book.block_size)
        nested = (
            TensorSpec(f"{weight}.nested_absmax", (-(-blocks // NESTED),), torch.float32),
            TensorSpec(f"{weight}.nested_quant_map", (256,), torch.float32),
        )
        return (
            TensorSpec(weight, (-(-rows * columns // 2), 1), torch.uint8),
            TensorSpec(f"{weight}.absmax", (blocks,), torch.uint8 if book.double_quant else torch.float32),
            TensorSpec(f"{weight}.quant_map", (16,), torch.float32),
            *(nested if book.double_quant else ()),
            TensorSpec(_state_name(name, book), (len(_state(book, shape, 0.0)),), torch.uint8),
        )

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        if isinstance(q.scheme, AbsmaxInt8):
            return {
                f"{name}.weight": (q.codes ^ 0x80).view(torch.int8),  # less 128: the sign bit flips
                f"{name}.SCB": q.params["absmax"].reshape(-1).clone(),
                f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
            }
        book, weight = _codebook(q.scheme), f"{name}.weight"
        stored = {
            weight: _pack(q.codes, book),
            f"{weight}.absmax": q.params["absmax"].reshape(-1).clone(),
            f"{weight}.quant_map": _quant_map(book),
        }
        if book.double_quant:
            stored[f"{weight}.nested_absmax"] = q.params["nested_absmax"].clone()
            stored[f"{weight}.nested_quant_map"] = dynamic_map().clone()
        offset = float(q.params["offset"]) if book.double_quant else 0.0
        stored[_state_name(name, book)] = torch.tensor(list(_state(book, q.shape, offset)), dtype=torch.uint8)
        return stored

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        specs = self.tensors(name, scheme, shape)
        if isinstance(scheme, AbsmaxInt8):
            weight, absmax, form = (check_stored(tensors, spec) for spec in specs)
            if int(form):
                raise InputError(
                    f"'{name}.weight_format' is {int(form)}: tiled weights of releases before 0.41 are not read here",
                    mend="load and save the model with an old bitsandbytes",
                )
            return QuantizedTensor(scheme, shape, weight.view(torch.uint8) ^ 0x80, {"absmax": absmax.view(-1, 1)})
        book = _codebook(scheme)
        packed, absmax, table, *nested = (check_stored(_bytes(tensors, name), spec) for spec in specs[:-1])
        _check_map(f"{name}.weight.quant_map", table, _quant_map(book))
        state = _read_state(_state_name(name, book), tensors.get(specs[-1].name))
        if _scheme_of(state, name) != (book, shape):
            raise InputError(
                f"'{specs[-1].name}' and the plan of '{name}' contradict each other", mend="fetch it again"
            )
        params = {"absmax": absmax.view(book.grid(shape)).clone()}
        if book.double_quant:
            _check_map(f"{name}.weight.nested_quant_map", nested[1], dynamic_map())
            offset = torch.tensor([float(state["nested_offset"])], dtype=torch.float32)
            params |= {"nested_absmax": nested[0].clone(), "offset": offset}
        return QuantizedTensor(book, shape, _unpack(packed, book, shape), params)

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        del meta
        base = majority(entries)
        eight = isinstance(base, AbsmaxInt8)
        book = Codebook() if isinstance(base, AbsmaxInt8) else _codebook(base)
        inputs = base.inputs if isinstance(base, AbsmaxInt8) else None
        return {
            "quant_method": self.quant_method,
            "_load_in_4bit": not eight,
            "_load_in_8bit": eight,
            "load_in_4bit": not eight,
            "load_in_8bit": eight,
            "bnb_4bit_quant_type": book.book,
            "bnb_4bit_use_double_quant": book.double_quant,
            "bnb_4bit_compute_dtype": book.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": float(inputs.threshold) if inputs is not None else _THRESHOLD,
            "llm_int8_skip_modules": _skipped(entries, kept),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        del model_dtype
        found: dict[str, tuple[Scheme, tuple[int, int]]] = {}
        for tensor in names:
            if match := _STATE.fullmatch(tensor):
                if read is None:
                    raise InputError(f"'{tensor}' must be read to know shapes", mend="give read_config a reader")
                found[match[1]] = _scheme_of(_read_state(tensor, read(tensor)), match[1])
            elif tensor.endswith(".SCB"):
                name = tensor.removesuffix(".SCB")
                weight = names.get(f"{name}.weight")
                if weight is None or weight.dtype != torch.int8 or len(weight.shape) != 2:
                    raise InputError(
                        f"'{name}' has no int8 matrix beside SCB", mend="the file is incomplete; fetch it again"
                    )
                threshold = config.get("llm_int8_threshold", _THRESHOLD)
                if not isinstance(threshold, int | float) or not threshold >= 0:
                    raise InputError(f"llm_int8_threshold {threshold!r} is no threshold", mend="mend config.json")
                scheme = AbsmaxInt8(inputs=InputScheme(threshold=float(threshold)))
                found[name] = scheme, (weight.shape[0], weight.shape[1])
        return found

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        if not isinstance(scheme, Codebook | AbsmaxInt8):
            return dict.fromkeys(ENGINES, "not a bitsandbytes scheme")
        own = "transformers replaces plain nn.Linear alone, and this architecture's linears are a class of their own"
        return {
            "vllm": "since 0.28 vLLM reads bitsandbytes files through vllm-bnb-plugin alone",
            "transformers": own if model_type in _OWN_LINEARS else None,
            "gptqmodel": "GPTQModel reads gptq and awq files, not bitsandbytes",
            "bitwright": None,
        }

    def loads_together(self, entries: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, str | None]:
        result: dict[str, str | None] = dict.fromkeys(ENGINES)
        skipped = [name for name in kept if name not in entries]
        for name in entries:
            if any(name.endswith(other) for other in skipped):
                result["transformers"] = f"transformers would take {name} for kept: it ends in a kept module's name"
            elif _EXPERT.match(name):
                result["transformers"] = (
                    "transformers 5 holds experts in one 3-D parameter, which bitsandbytes does not replace"
                )
        eight = [isinstance(scheme, AbsmaxInt8) for scheme in entries.values()]
        if any(eight) and not all(eight):
            result["transformers"] = "a bitsandbytes file is of 4 bits or of 8, not of both"
        elif all(eight) and len(set(entries.values())) > 1:
            result["transformers"] = "config.json has one llm_int8_threshold for all modules"
        return result

    def support(self) -> dict[str, str]:
        return {
            "vllm": "through vllm-bnb-plugin (vLLM 0.28 and later); earlier releases by themselves",
            "transformers": "5.23 with bitsandbytes >= 0.50 and accelerate; on the CPU in_features must be a multiple of block_size",
            "gptqmodel": "does not read it",
            "bitwright": "any version",
        }


def _skipped(entries: Mapping[str, Scheme], kept: Sequence[str]) -> list[str]:
    """Full names of all that was kept. With a list of its own a loader skips nothing by itself, the output head included, which
    transformers calls lm_head in memory even where the file says embed_out (GPT-NeoX).
    """
    head = [] if any(place(name).number is None for name in entries) else ["lm_head"]
    return unique(name for name in (*kept, *head) if name not in entries)


def _codebook(scheme: Scheme) -> Codebook:
    if not isinstance(scheme, Codebook) or scheme.book not in _BOOKS:
        raise InputError(
            f"bitsandbytes files hold nf4, fp4 or int8, not {scheme.describe()}", mend="use another layout"
        )
    return scheme


# --- codes ----------------------------------------------------------------------------------------------------------------


def _order(book: Codebook) -> torch.Tensor:
    """bitsandbytes' index of each code: ``(16,)`` uint8."""
    return torch.tensor(FP4_ORDER if book.book == "fp4" else range(16), dtype=torch.uint8)


def _quant_map(book: Codebook) -> torch.Tensor:
    """The table in the order of bitsandbytes' indices: ``(16,)`` float32."""
    table = torch.empty(16)
    table[_order(book).long()] = torch.tensor(book.fixed_table)
    return table


def _pack(codes: torch.Tensor, book: Codebook) -> torch.Tensor:
    """``(rows, columns)`` uint8 to ``(ceil(n / 2), 1)`` uint8, high nibble first. An odd last weight is followed by the code of zero."""
    flat = codes.reshape(-1)
    if int(flat.max()) > 15:
        raise InputError(f"code {int(flat.max())} does not fit into 4 bits")
    if len(flat) % 2 or flat.storage_offset() % 2:
        flat = torch.cat([flat, flat.new_full((len(flat) % 2,), 7)])  # 7: the code of zero in both books
    pairs, order = flat.view(torch.int16), _order(book)  # little-endian: the first of a pair is the low byte
    packed = torch.empty(len(pairs), 1, dtype=torch.uint8)
    byte = torch.arange(256)
    table = order[byte >> 4] << 4 | order[byte & 15]
    # Many short operations: threads would wait for each other longer than they work.
    with one_thread():
        for start in range(0, len(pairs), _PIECE):
            piece = pairs[start : start + _PIECE]
            out = packed[start : start + _PIECE, 0]
            out.copy_((piece << 4).bitwise_or_(piece >> 8))
            if book.book != "nf4":
                out.copy_(table.index_select(0, out.int()))
    return packed


def _unpack(packed: torch.Tensor, book: Codebook, shape: tuple[int, int]) -> torch.Tensor:
    """Inverse of ``_pack``."""
    codes = torch.empty(len(packed), 2, dtype=torch.uint8)
    flat, back = packed.reshape(-1), _order(book).argsort().to(torch.uint8)
    with one_thread():
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE]
            for half, nibbles in enumerate((piece >> 4, piece & 15)):
                codes[start : start + _PIECE, half] = (
                    nibbles if book.book == "nf4" else back.index_select(0, nibbles.int())
                )
    return codes.view(-1)[: shape[0] * shape[1]].view(shape)


# --- quant_state ------------------------------------------------------------------------------------------------------------


def _state_name(name: str, book: Codebook) -> str:
    return f"{name}.weight.quant_state.bitsandbytes__{book.book}"


def _state(book: Codebook, shape: tuple[int, int], offset: float) -> bytes:
    """The JSON of ``quant_state``; its length depends on the scheme and the shape alone.

    >>> _state(Codebook(), (4, 64), 0.0).decode()
    '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}'
    """
    head = {"quant_type": book.book, "blocksize": book.block_size, "dtype": book.dtype, "shape": list(shape)}
    if not book.double_quant:
        return json.dumps(head).encode()
    text = json.dumps({**head, "nested_blocksize": NESTED, "nested_dtype": "float32"})
    # As many decimals as bitsandbytes' own number has at most; the mean of magnitudes is not negative.
    return f'{text[:-1]}, "nested_offset": {abs(offset):.16e}}}'.encode()


def _read_state(tensor: str, value: torch.Tensor | None) -> dict[str, Any]:
    """The JSON object of a ``quant_state`` tensor."""
    if value is None:
        raise InputError(f"tensor '{tensor}' is missing", mend="the file is damaged or incomplete; fetch it again")
    try:
        state = json.loads(bytes(value.to(torch.uint8).reshape(-1).tolist()))
    except ValueError as error:
        raise InputError(f"'{tensor}' holds no JSON: {error}", mend="the file is damaged; fetch it again") from error
    if not isinstance(state, dict):
        raise InputError(f"'{tensor}' holds no JSON object", mend="the file is damaged; fetch it again")
    return state


def _scheme_of(state: Mapping[str, Any], name: str) -> tuple[Codebook, tuple[int, int]]:
    """Scheme and shape that a ``quant_state`` states. InputError for what bitwright cannot represent."""
    shape, nested = state.get("shape"), "nested_offset" in state
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"'{name}': quant_state states the shape {shape!r}", mend="only matrices are read here")
    if nested and (state.get("nested_blocksize"), state.get("nested_dtype")) != (NESTED, "float32"):
        raise InputError(
            f"'{name}': nested blocks other than 256 in float32 are not read here", mend="quantize it anew"
        )
    if nested and not isinstance(state["nested_offset"], int | float):
        raise InputError(f"'{name}': nested_offset is no number", mend="the file is damaged; fetch it again")
    try:
        scheme = Codebook(
            book=state.get("quant_type"),  # type: ignore[arg-type]
            block_size=int(state.get("blocksize", 0)),
            double_quant=nested,
            dtype=state.get("dtype"),  # type: ignore[arg-type]
        )
    except (PlanError, TypeError, ValueError) as error:
        raise InputError(f"'{name}': quant_state is not usable: {error}", mend="quantize it anew") from error
    if scheme.book not in _BOOKS:
        raise InputError(f"'{name}': quant_type '{scheme.book}' is not read here", mend="quantize it anew")
    return scheme, (shape[0], shape[1])


def _bytes(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors with the packed weight as bytes: ``bnb_4bit_quant_storage`` may have stored it under another dtype."""
    found, weight = dict(tensors), tensors.get(f"{name}.weight")
    if weight is not None and weight.dtype != torch.uint8 and weight.dim() == 2 and weight.is_contiguous():
        found[f"{name}.weight"] = weight.view(torch.uint8).view(-1, 1)
    return found


def _check_map(tensor: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.allclose(found, wanted, rtol=0, atol=1e-6):
        raise InputError(f"'{tensor}' is not bitsandbytes' own table", mend="quantize it anew")


LAYOUT = Bitsandbytes
