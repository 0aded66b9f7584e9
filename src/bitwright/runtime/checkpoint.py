"""A quantized checkpoint as a Source: its tensors under their original names, decoded when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitwright import catalog
from bitwright.core.layout import Layout
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.tensor import TensorSpec, parse_dtype
from bitwright.errors import InputError
from bitwright.io.model_files import already_quantized
from bitwright.io.safetensors_dir import SafetensorsDir

__all__ = ["DecodedSource", "find_layout", "open_checkpoint"]

#: names of the Conv1D modules in transformers' GPT-2 and GPT
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a model config, wherever it stands."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), Mapping):
                found: Mapping[str, Any] = part[key]
                return found
    return None


def find_layout(config: Mapping[str, Any], path: Path) -> tuple[Layout, Mapping[str, Any]]:
    """The layout that a config names. Raises InputError for methods that bitwright does not read."""
    quantization = quantization_config(config)
    if quantization is None:
        raise InputError(f"{path}: config.json has no quantization_config", mend="this is a dense checkpoint")
    method = str(quantization.get("quant_method", "")).lower()
    plugin = _layout_of(method)
    if plugin is None:
        known = sorted(catalog.load("layouts", name).quant_method for name in catalog.names("layouts"))
        raise InputError(f"{path}: quant_method '{method}' cannot be read", mend=f"readable: {', '.join(known)}")
    layout = plugin.from_config(quantization)
    assert isinstance(layout, Layout)
    return layout, quantization


def _layout_of(method: str) -> type[Layout] | None:
    """The layout class that states this ``quant_method``. Most are called like it; others are imported until one matches."""
    for name in sorted(catalog.names("layouts"), key=lambda name: name != method):
        plugin: type[Layout] = catalog.load("layouts", name)
        if plugin.quant_method == method:
            return plugin
    return None


class DecodedSource:
    """Source over a quantized checkpoint.

    modules: quantized module name -> (scheme, shape). dtype: the model's, as its config states it. transposed: modules whose weight is
    ``(in, out)`` in the model (Conv1D); they are stored in Linear orientation.
    """

    def __init__(
        self, stored: SafetensorsDir, layout: Layout, modules: Mapping[str, tuple[Scheme, tuple[int, int]]],
        dtype: torch.dtype, transposed: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.stored = stored
        self.layout = layout
        self.modules = modules
        self.dtype = dtype
        self.transposed = transposed
        self._parts: dict[str, tuple[str, ...]] = {}
        specs: dict[str, TensorSpec] = {}
        part_of: set[str] = set()
        for name, (scheme, (out, columns)) in modules.items():
            parts = tuple(spec.name for spec in layout.tensors(name, scheme, (out, columns)))
            missing = [part for part in parts if part not in stored.tensors]
            if missing:
                raise InputError(
                    f"{stored.path}: quantized layer {name} lacks {', '.join(missing[:5])}", mend="check the download"
                )
            self._parts[name] = parts
            part_of |= set(parts)
            shape = (columns, out) if name in transposed else (out, columns)
            specs[name + ".weight"] = TensorSpec(name + ".weight", shape, dtype)
        rest = {name: spec for name, spec in stored.tensors.items() if name not in part_of}
        self._tensors = {**rest, **specs}

    @property
    def path(self) -> Path:
        """The folder."""
        return self.stored.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json."""
        return self.stored.config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Original names and shapes; quantized ones in the model's dtype."""
        return self._tensors

    def stored_parts(self) -> list[tuple[str, str]]:
        """``(module, stored tensor)`` for every tensor that a quantized module consists of."""
        return [(module, name) for module, parts in self._parts.items() for name in parts]

    def quantized(self, module: str) -> QuantizedTensor:
        """Codes and parameters of one module."""
        scheme, shape = self.modules[module]
        parts = {name: self.stored.read(name) for name in self._parts[module]}
        return self.layout.unpack(module, scheme, shape, parts)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor under its original name; quantized ones are decoded to float32."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.modules:
            weight = self.quantized(module).decode()
            weight = weight.T.contiguous() if module in self.transposed else weight
            return weight if rows is None else weight[rows[0] : rows[1]].clone()
        return self.stored.read(name, rows)

    def fingerprint(self) -> Mapping[str, str]:
        """That of the files."""
        return self.stored.fingerprint()


def open_checkpoint(path: Path) -> SafetensorsDir | DecodedSource:
    """A dense or quantized checkpoint folder; quantized ones decode as they are read."""
    stored = SafetensorsDir.open(path)
    if already_quantized(stored.config) is None:
        return stored
    layout, quantization = find_layout(stored.config, path)
    dtype = _model_dtype(stored.config)
    modules = layout.read_config(quantization, dtype, stored.tensors, stored.read)
    if not modules:
        raise InputError(f"{path}: config.json says {quantization.get('quant_method')}, but no tensor is quantized")
    return DecodedSource(stored, layout, modules, dtype, conv1d_modules(stored.config, modules))


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str):
            return parse_dtype(name)
    return torch.bfloat16


def conv1d_modules(config: Mapping[str, Any], modules: Mapping[str, object]) -> frozenset[str]:
    """Modules that transformers holds as Conv1D, ``(in, out)``: those of GPT-2's blocks, not its embeddings and head."""
    if config.get("model_type") not in ("gpt2", "openai-gpt"):
        return frozenset()
    return frozenset(name for name in modules if name.rpartition(".")[2] in _CONV1D)
