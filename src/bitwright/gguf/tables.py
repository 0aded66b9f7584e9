"""Finds the table of an architecture, and applies its rules: which GGUF tensor comes from which tensors of the checkpoint."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitwright.errors import InputError, PlanError
from bitwright.gguf.architecture import Architecture, Piece, Road, Rule
from bitwright.gguf.settings import Model
from bitwright.io.text import quoted

__all__ = [
    "by_model_type",
    "by_name",
    "common_config",
    "llamacpp_order",
    "make_road",
    "names",
    "respell",
    "text_config",
]

_BLOCK = re.compile(r"blk\.(\d+)\.")


@cache
def _all() -> Mapping[str, Architecture]:
    """Every table by file name."""
    stems = sorted(file.stem for file in (Path(__file__).parent / "architectures").glob("*.py"))
    found = {
        stem: importlib.import_module(f"bitwright.gguf.architectures.{stem}").ARCHITECTURE
        for stem in stems
        if not stem.startswith("_")
    }
    return MappingProxyType(found)


def by_model_type(config: Mapping[str, Any], where: str) -> Architecture:
    """The table for a config. PlanError, with the known model types, where there is none."""
    wanted = text_config(config).get("model_type")
    for found in _all().values():
        if wanted in found.model_types:
            return found
    known = sorted(name for found in _all().values() for name in found.model_types)
    raise PlanError(
        f"{where}: model type {quoted(str(wanted))} cannot be written as GGUF yet",
        mend=f"use another layout; GGUF is known for: {', '.join(known)}",
    )


def by_name(name: str, *, experts: bool, where: str) -> Architecture:
    """The table for a GGUF file. InputError, with the known names, where there is none."""
    named = [found for found in _all().values() if found.name == name]
    fitting = named if len(named) == 1 else [found for found in named if found.experts == experts]
    if not fitting:
        known = ", ".join(sorted({found.name for found in _all().values()}))
        raise InputError(f"{where}: architecture {quoted(name)} is unknown", mend=f"known are: {known}")
    return fitting[0]


def common_config(architecture: Architecture, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``text_config`` in common terms."""
    flat = text_config(config)
    return flat if architecture.adapt is None else architecture.adapt(flat)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model: a multimodal model's ``text_config`` laid over the rest."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else dict(config)


def respell(architecture: Architecture, names: Collection[str]) -> Mapping[str, str]:
    """Usual prefix -> the one under which this checkpoint has it."""
    anchor = next(rule.hf for rule in architecture.rules if rule.gguf == "token_embd") + ".weight"
    for spelling in ({}, *architecture.spellings):
        if _spelled(anchor, spelling) in names:
            return spelling
    return {}


def _spelled(name: str, spelling: Mapping[str, str]) -> str:
    for usual, found in spelling.items():
        if name.startswith(usual):
            return found + name.removeprefix(usual)
    return name


def names(
    architecture: Architecture, model: Model, spelling: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
    """``(rule, GGUF name, names of the checkpoint)`` for everything that the rules can name in a model of this size."""
    for rule in architecture.rules:
        if rule.when is not None and not rule.when(model):
            continue
        blocks = range(model.blocks) if "{block}" in rule.gguf else range(1)
        stacked = range(model.experts) if "{expert}" in rule.hf else range(1)
        for block in blocks:
            for suffix in rule.suffixes:
                hf = [_spelled(rule.hf, spelling).format(block=block, expert=expert) + suffix for expert in stacked]
                yield rule, rule.gguf.format(block=block) + suffix, tuple(hf)


def make_road(rule: Rule, name: str, tensors: tuple[str, ...], shape: tuple[int, ...], model: Model) -> Road:
    """The road of a rule.

    shape: of each of the checkpoint's tensors, which must be alike. Raises InputError where head counts do not divide the rows.
    """
    if rule.change == "transpose" and len(shape) == 2:
        shape = (shape[1], shape[0])
    rows = shape[0] if len(shape) == 1 else _product(shape[:-1])
    order = rule.order(model, rows) if rule.order is not None else None
    whole = (len(tensors), *shape) if "{expert}" in rule.hf else shape
    plain = rule.plain or len(whole) == 1 or name.endswith("_norm.weight") or not name.endswith(".weight")
    return Road(
        name=name,
        shape=whole,
        pieces=tuple(Piece(tensor=tensor, rows=rows, order=order) for tensor in tensors),
        role="plain" if plain else "matrix",
        change=rule.change if rule.change != "transpose" or len(shape) == 2 else None,
    )


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def llamacpp_order(name: str) -> tuple[int, str]:
    """Sorting by this gives the order in which llama.cpp's quantizer writes tensors: those of no block first, then by block and name."""
    found = _BLOCK.match(name)
    return (int(found[1]) if found else -1), name
