"""Bytes of a checkpoint folder or a GGUF file as it is, and of what a recipe would make of it: counted from headers, no weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.advise.decoder import ModelShape
from bitwright.advise.shape import model_shape
from bitwright.advise.weights import DTYPES, REPACKED, WeightBytes, code_bits, is_decoded, split_codes

if TYPE_CHECKING:
    from bitwright.blocks.types import BlockType
    from bitwright.core.scheme import Scheme
    from bitwright.engine.recipe import Recipe

__all__ = ["Known", "is_quantized", "planned_weights", "stored_weights"]

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embed_positions"})
_HEADS = frozenset({"lm_head", "embed_out"})


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model that is at hand. dtype: of what is not quantized, and of the activations. file: it is a GGUF file."""

    shape: ModelShape
    weights: WeightBytes
    dtype: str
    file: bool = False


@dataclass
class _Sum:
    """Adds up tensors, part by part."""

    weights: int = 0
    scales: int = 0
    embeddings: int = 0
    head: int = 0
    largest: int = 0
    decoded: bool = False
    repacked: int = 0

    def add(self, place: str, stored: int, codes: int | None = None) -> None:
        """A tensor of ``stored`` bytes, of which ``codes`` are codes (None: all of it is plain)."""
        if place != "weights":
            setattr(self, place, getattr(self, place) + stored)
            return
        self.weights += stored if codes is None else codes
        self.scales += 0 if codes is None else stored - codes

    def add_matrix(self, place: str, stored: int, scheme: Scheme, elements: int) -> None:
        """A quantized matrix of a checkpoint."""
        self.add(place, stored, split_codes(stored, elements, scheme))
        self.largest = max(self.largest, elements)
        self.decoded = self.decoded or is_decoded(scheme)

    def add_block(self, name: str, stored: int, elements: int, block: BlockType) -> None:
        """A tensor of a GGUF file."""
        place = "weights"
        if name in ("output.weight", "token_embd.weight", "position_embd.weight"):
            place = "head" if name == "output.weight" else "embeddings"
        self.add(place, stored, min(stored, elements * code_bits(block) // 8))
        self.repacked += stored if place == "weights" and block.name in REPACKED else 0

    def made(self, recipe: str) -> WeightBytes:
        """The result."""
        return WeightBytes(
            weights=self.weights, scales=self.scales, embeddings=self.embeddings, head=self.head, largest=self.largest,
            decoded=self.decoded, repacked=self.repacked, recipe=recipe,
        )  # fmt: skip


def is_quantized(path: Path) -> bool:
    """True for a GGUF file and for a folder whose config names a quantization."""
    from bitwright.io.model_files import already_quantized
    from bitwright.io.safetensors_dir import SafetensorsDir

    if path.is_file():
        return True
    with SafetensorsDir.open(path) as source:
        return already_quantized(source.config) is not None


def stored_weights(path: Path) -> Known:
    """A checkpoint folder, quantized or not, or a GGUF file, as it is stored."""
    if path.is_file():
        return _gguf_file(path)
    from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

    opened = open_checkpoint(path)
    stored = opened.stored if isinstance(opened, DecodedSource) else opened
    try:
        shape = model_shape(stored.config, source=f"config.json of {path.name}")
        found = _Sum()
        for name, spec in opened.tensors.items():
            module, place = name.removesuffix(".weight"), _place(name, shape.tied)
            if place == "tied":
                continue
            if isinstance(opened, DecodedSource) and module in opened.modules and name.endswith(".weight"):
                scheme, size = opened.modules[module]
                nbytes = sum(part.nbytes for part in opened.layout.tensors(module, scheme, size))
                found.add_matrix(place, nbytes, scheme, math.prod(size))
            else:
                found.add(place, spec.nbytes)
        layout = opened.layout.name if isinstance(opened, DecodedSource) else "plain weights"
        return Known(shape=shape, weights=found.made(f"as stored, {layout}"), dtype=_dtype(stored.config))
    finally:
        stored.close()


def planned_weights(path: Path, recipe: Recipe) -> Known:
    """A checkpoint folder as this recipe would store it: from its plan, exact. PlanError where there is none."""
    if recipe.layout == "gguf":
        return _planned_gguf(path, recipe)
    from bitwright.engine.modelwide import plan_rewritten
    from bitwright.engine.run import open_source

    with open_source(path) as source:
        plan, _ = plan_rewritten(recipe, source)
        config = source.config
    shape = model_shape(config, source=f"config.json of {path.name}")
    found = _Sum()
    for entry in plan.entries:
        place = _place(entry.tensor, shape.tied)
        if place == "tied" or entry.action == "drop":
            continue
        nbytes = entry.stored_bytes
        if entry.scheme is None or entry.unit is None:
            found.add(place, nbytes)
        else:
            found.add_matrix(place, nbytes, entry.scheme, math.prod(entry.unit.shape))
    words = sorted({entry.scheme.describe_all() for entry in plan.quantized if entry.scheme is not None})
    return Known(
        shape=shape, weights=found.made(f"planned: {', '.join(words)} in {plan.layout.name}"), dtype=_dtype(config)
    )


def _planned_gguf(path: Path, recipe: Recipe) -> Known:
    from bitwright.engine.gguf_run import plan_gguf_file
    from bitwright.engine.run import open_source

    plan = plan_gguf_file(recipe, path, requantize=True)
    with open_source(path) as source:
        config = source.config
    found = _Sum()
    for target in plan.targets:
        found.add_block(target.place.name, target.nbytes, math.prod(target.place.shape), target.block)
    kind = recipe.gguf.type if recipe.gguf is not None else "Q4_K_M"
    shape = model_shape(config, source=f"config.json of {path.name}")
    return Known(shape=shape, weights=found.made(f"planned: {kind} in GGUF"), dtype="float16", file=True)


def _gguf_file(path: Path) -> Known:
    from bitwright.gguf.to_hf import HfView
    from bitwright.io.gguf_file import GgufFile

    found = _Sum()
    with GgufFile.open(path) as file:
        shape = model_shape(HfView(file).config, source=f"header of {path.name}")
        for name, tensor in file.tensors.items():
            found.add_block(name, tensor.nbytes, math.prod(tensor.shape), tensor.block)
    return Known(shape=shape, weights=found.made("as stored, GGUF"), dtype="float16", file=True)


def _place(name: str, tied: bool) -> str:
    """Which part a tensor of a checkpoint belongs to.

    >>> _place("model.embed_tokens.weight", False), _place("model.layers.0.mlp.up_proj.weight", False)
    ('embeddings', 'weights')
    """
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if leaf in _HEADS:
        return "tied" if tied else "head"
    return "embeddings" if leaf in _EMBEDDINGS else "weights"


def _dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str) and name in DTYPES:
            return name
    return "bfloat16"
