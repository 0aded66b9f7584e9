"""Everything that goes into a GGUF file from a Hugging Face folder: keys, tokenizer, and the road of every tensor. Reads headers alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from bitwright.core.source import Source
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.gguf.architecture import Architecture, Road
from bitwright.gguf.settings import Model, join
from bitwright.gguf.tables import by_model_type, common_config, llamacpp_order, make_road, names, respell
from bitwright.gguf.tokenizer import tokenizer_values
from bitwright.io.gguf_values import GgufValue, string, u32
from bitwright.io.text import printable, quoted

__all__ = ["Export", "describe"]

#: buffers of old checkpoints that every loader recomputes
_BUFFERS = dict.fromkeys(
    ("*rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.attention.masked_bias"),
    "a buffer that is recomputed when the model is loaded",
)
_PHI3 = re.compile(r"(phi)-?3", re.IGNORECASE)
_PHI3_TOKENS = {"<s>", "</s>", "<unk>", "<|endoftext|>"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """What a GGUF file holds.

    values: all keys but ``general.file_type`` and ``general.quantization_version``, ``general.architecture`` first. roads: one for each
    tensor, in llama.cpp's order. left_out: tensors of the checkpoint that GGUF has no place for -> the reason.
    notes: what llama.cpp computes otherwise than transformers, in sentences.
    """

    architecture: str
    values: Mapping[str, GgufValue]
    roads: tuple[Road, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()


def describe(source: Source, *, pre: str | None = None) -> Export:
    """What a GGUF file of this checkpoint holds.

    pre: name of the pre-tokenizer (``tokenizer.ggml.pre``) where it cannot be told from the tokenizer's rules. Raises PlanError for
    architectures that cannot be expressed, InputError where config, tokenizer and tensors do not fit each other.
    """
    where = printable(str(source.path))
    architecture = by_model_type(source.config, where)
    config = common_config(architecture, source.config)
    spelling = respell(architecture, source.tensors)
    model = Model(where=where, config=config, aliases=architecture.aliases, folder=source.path)
    roads, left_out = _roads(architecture, model, source.tensors, spelling)
    rows = next(road.shape[0] for road in roads if road.name == "token_embd.weight")
    prefix = architecture.name
    values = {"general.architecture": string(prefix), "general.type": string("model"), "general.name": string("")}
    values |= {f"{prefix}.{name}": value for name, value in join(architecture.settings, model).items()}
    values[f"{prefix}.vocab_size"] = u32(rows)
    tokenizer = tokenizer_values(source.path, config, rows=rows, pre=pre)
    values |= tokenizer
    values["general.name"] = string(_name(source.path.resolve().name, tokenizer["tokenizer.ggml.tokens"].value))
    return Export(
        architecture=prefix,
        values=MappingProxyType(values),
        roads=roads,
        left_out=MappingProxyType(left_out),
        notes=tuple(note for setting in architecture.settings for note in setting.notes(model)),
    )


def _roads(
    architecture: Architecture, model: Model, tensors: Mapping[str, TensorSpec], spelling: Mapping[str, str]
) -> tuple[tuple[Road, ...], dict[str, str]]:
    roads: list[Road] = []
    used: set[str] = set()
    left_out: dict[str, str] = {}
    for rule, name, wanted in names(architecture, model, spelling):
        if not wanted:
            raise InputError(f"{model.where}: no experts", mend="the config is damaged; download it again")
        there = [tensor for tensor in wanted if tensor in tensors]
        if name == "output.weight" and model.get("tie_word_embeddings", architecture.tied):
            left_out |= dict.fromkeys(there, "tied to the embedding, from which it is taken")
            if architecture.head:
                same = next(road for road in roads if road.name == "token_embd.weight")
                roads.append(replace(same, name=name))
            continue
        if len(there) < len(wanted):
            if there or (name.endswith(".weight") and not rule.optional):
                missing = next(tensor for tensor in wanted if tensor not in tensors)
                raise InputError(f"{model.where}: no tensor {quoted(missing)}", mend="download the model again")
            continue
        shapes = {tensors[tensor].shape for tensor in wanted}
        if len(shapes) > 1:
            raise InputError(
                f"{model.where}: {quoted(wanted[0])} and its fellows differ in shape", mend="check the model"
            )
        used |= set(wanted)
        roads.append(make_road(rule, name, wanted, shapes.pop(), model))
    for setting in architecture.settings:
        for name, values in setting.generate(model).items():
            roads.append(Road(name=name, shape=values.shape, pieces=(), role="plain", values=values))
    for tensor in tensors:
        if tensor not in used and tensor not in left_out:
            left_out[tensor] = _reason(tensor, {**_BUFFERS, **architecture.ignored}, model, architecture)
    return tuple(sorted(roads, key=lambda road: llamacpp_order(road.name))), left_out


def _name(folder: str, tokens: Collection[str]) -> str:
    """The folder's name. llama.cpp looks into it: where it reads Phi-3, it demands that tokenizer's tokens."""
    if _PHI3.search(folder) and not set(tokens) >= _PHI3_TOKENS:
        return _PHI3.sub(r"\1 3", folder)
    return folder


def _reason(tensor: str, ignored: Mapping[str, str], model: Model, architecture: Architecture) -> str:
    for pattern, reason in ignored.items():
        if fnmatchcase(tensor, pattern):
            return reason
    raise InputError(
        f"{model.where}: tensor {quoted(tensor)} has no place in GGUF's architecture '{architecture.name}'",
        mend="this variant of the architecture is not supported; use another layout",
    )
