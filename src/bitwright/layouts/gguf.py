"""Layout gguf: ggml's block bytes, one tensor per linear, rows in the checkpoint's order.

This is what goes into a GGUF file, row for row, before ``engine.gguf_run`` moves it there: names, row orders and the header are the
matter of the architecture (``bitwright.gguf``), not of the bytes. As a folder it is a halfway house that bitwright alone reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.layout import ENGINES, Layout, Read, check_stored
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError
from bitwright.schemes.ggml import Ggml

__all__ = ["LAYOUT", "Gguf"]

_BLOCKS = ".weight"


@dataclass(frozen=True, kw_only=True)
class Gguf(Layout):
    """Rows of blocks: ``NAME.weight`` uint8 ``(rows, row bytes)``."""

    name: ClassVar[str] = "gguf"
    quant_method: ClassVar[str] = "gguf"
    stores_embeddings: ClassVar[bool] = True
    codes_apart: ClassVar[bool] = False
    fuses: ClassVar[bool] = False

    def limits(self, model_dtype: torch.dtype) -> Limits:
        del model_dtype
        return Limits()

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Ggml):
            return "GGUF files hold ggml's block types; use --type"
        try:
            scheme.block.row_bytes(shape[1])
        except PlanError as error:
            return error.message
        return None

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        assert isinstance(scheme, Ggml)
        return (TensorSpec(name + _BLOCKS, (shape[0], scheme.block.row_bytes(shape[1])), torch.uint8),)

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        assert isinstance(q.scheme, Ggml)
        return {name + _BLOCKS: q.scheme.join(q.params, q.codes, q.shape)}

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        if not isinstance(scheme, Ggml):
            raise InputError(f"'{name}' is not in a ggml type", mend="fetch config.json again")
        (spec,) = self.tensors(name, scheme, shape)
        params, codes = scheme.split(check_stored(tensors, spec), shape)
        return QuantizedTensor(scheme, shape, codes, params)

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        del meta
        types = {name: scheme.type for name, scheme in entries.items() if isinstance(scheme, Ggml)}
        return {"quant_method": self.quant_method, "modules": types, "kept": list(dict.fromkeys(kept))}

    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        del model_dtype, read
        modules = config.get("modules")
        if not isinstance(modules, Mapping):
            raise InputError("quantization_config lacks 'modules'", mend="fetch config.json again")
        found: dict[str, tuple[Scheme, tuple[int, int]]] = {}
        for name, kind in modules.items():
            stored = names.get(f"{name}{_BLOCKS}")
            if stored is None:
                raise InputError(f"tensor '{name}{_BLOCKS}' is missing", mend="the file is incomplete; fetch it again")
            scheme = Ggml(type=str(kind))
            if len(stored.shape) != 2 or stored.dtype != torch.uint8 or stored.shape[1] % scheme.block.nbytes:
                raise InputError(f"'{name}{_BLOCKS}' is not rows of {kind} blocks", mend="fetch it again")
            found[name] = (scheme, (stored.shape[0], stored.shape[1] // scheme.block.nbytes * scheme.block.values))
        return found

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        del scheme, model_type
        other = "it reads GGUF files in engines of their own; give -o NAME.gguf to llama.cpp"
        return {engine: None if engine == "bitwright" else other for engine in ENGINES}

    def support(self) -> dict[str, str]:
        return {engine: "any version" if engine == "bitwright" else "see llama.cpp" for engine in ENGINES}


LAYOUT = Gguf
