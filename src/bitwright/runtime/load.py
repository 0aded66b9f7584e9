"""``load``: a checkpoint folder becomes a transformers model whose linears hold packed weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.errors import InputError
from bitwright.io.heap import release_free_memory
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.model.blocks import BlockRunner
from bitwright.model.names import Place, map_names
from bitwright.model.skeleton import build_skeleton
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint
from bitwright.runtime.linear import QuantizedLinear

__all__ = ["load_model", "whole_linears"]


def load_model(path: Path, *, dtype: torch.dtype | None = None, kernel: str = "auto") -> Any:
    """A transformers causal language model in eval mode.

    dtype: dtype of what is not quantized, and of the activations (default: the checkpoint's). kernel: see ``QuantizedLinear``.
    Linears become ``QuantizedLinear``; experts that transformers holds as one 3-D parameter, and embeddings, are decoded. Raises
    InputError for folders that hold no model or a quantization that bitwright does not read.
    """
    if kernel not in ("auto", "reference"):
        raise InputError(f"kernel '{kernel}' is unknown", mend="use auto or reference")
    source = open_checkpoint(path)
    skeleton = build_skeleton(path, dtype=dtype)
    wanted = next((p.dtype for p in skeleton.model.parameters() if p.is_floating_point()), torch.float32)
    names = map_names(skeleton, source.tensors)
    model = skeleton.model
    if isinstance(source, DecodedSource):
        _insert(model, source, names.places, names.parameters, wanted, kernel)
    BlockRunner(skeleton, names, source, wanted).fill("", model)
    model.tie_weights()
    _generation_config(model, path)
    if isinstance(source, SafetensorsDir):
        source.close()
    else:
        source.stored.close()
    # Packing makes and drops arrays as large as the model; glibc would keep them.
    release_free_memory()
    return model.eval()


def _insert(
    model: nn.Module,
    source: DecodedSource,
    places: Mapping[str, Place],
    parameters: dict[str, tuple[str, ...]],
    dtype: torch.dtype,
    kernel: str,
) -> None:
    """Put a QuantizedLinear where a whole linear is quantized; everything else is decoded as it is filled."""
    biases = {name: source.read(name) for name in source.tensors if name.endswith(".bias")}
    for module, path in whole_linears(model, source, places).items():
        parent_path, _, child = path.rpartition(".")
        stored_bias = parameters.get(path + ".bias")
        bias = biases[stored_bias[0]].to(dtype) if stored_bias else None
        parent = model.get_submodule(parent_path) if parent_path else model
        setattr(parent, child, QuantizedLinear(source.quantized(module), bias, dtype=dtype, kernel=kernel))


def whole_linears(model: Any, source: DecodedSource, places: Mapping[str, Place]) -> dict[str, str]:
    """Quantized module on disk -> path of the linear in memory that it is the whole weight of."""
    found: dict[str, str] = {}
    for module in source.modules:
        place = places.get(module + ".weight")
        if place is None or place.expert is not None or place.rows is not None:
            continue
        path, _, leaf = place.parameter.rpartition(".")
        if leaf == "weight" and not isinstance(model.get_submodule(path), nn.Embedding):
            found[module] = path
    return found


def _generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generation_config = GenerationConfig.from_pretrained(str(path), local_files_only=True)
