"""What a GGUF file is made from: a plain checkpoint, a checkpoint that is quantized already, or another GGUF file, under one face.

Each gives header values and tensors by their GGUF names. A tensor is read as float32 rows, or, where it holds blocks already, as bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from bitwright.blocks.codec import Bytes, Floats
from bitwright.blocks.types import BlockType
from bitwright.core.source import Source
from bitwright.errors import InputError
from bitwright.gguf.architecture import Piece, Road
from bitwright.gguf.export import Export, describe
from bitwright.gguf.mixture import Facts
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import GgufValue

__all__ = ["FromBlocks", "FromCheckpoint", "FromFile", "GgufSource", "Place", "facts"]


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor to be written. stored: the type that it has now, where it holds a file's bytes; None for plain weights."""

    name: str
    shape: tuple[int, ...]
    stored: BlockType | None = None

    @property
    def columns(self) -> int:
        """Length of a row; 1 for a single number."""
        return self.shape[-1] if self.shape else 1

    @property
    def matrices(self) -> int:
        """How many matrices are stacked: the experts of a stack, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def rows(self) -> int:
        """Rows over all leading axes."""
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows


class GgufSource(Protocol):
    """What ``engine.gguf_write`` reads from."""

    values: Mapping[str, GgufValue]
    places: Mapping[str, Place]
    left_out: Mapping[str, str]
    #: what llama.cpp will compute otherwise than transformers
    notes: tuple[str, ...]
    #: tensor name -> the checkpoint's linears that it is made of; empty where that is not known
    modules: Mapping[str, tuple[str, ...]]

    def read(self, name: str, rows: tuple[int, int]) -> Floats:
        """``(rows, columns)`` float32."""

    def raw(self, name: str, rows: tuple[int, int]) -> Bytes:
        """The bytes of rows of a tensor whose place says what it is ``stored`` as."""

    def fingerprint(self) -> Mapping[str, str]:
        """File name -> a short string that changes when the file does."""

    def check_unchanged(self) -> None:
        """InputError where a file changed since it was opened."""


def _facts_number(values: Mapping[str, GgufValue], key: str, default: int) -> int:
    found = values.get(key)
    if found is None:
        return default
    value = found.value
    if isinstance(value, np.ndarray):
        value = value[0] if value.size else default
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{key} is {found.kind}, not a number", mend="the file is damaged; convert the model anew")
    return int(value)


def facts(values: Mapping[str, GgufValue]) -> Facts:
    """What mixtures ask about a model, from a file's header values. InputError where they contradict their types."""
    named = values.get("general.architecture")
    architecture = str(named.value) if named is not None else ""
    heads = _facts_number(values, f"{architecture}.attention.head_count", 0)
    return Facts(
        architecture=architecture,
        blocks=_facts_number(values, f"{architecture}.block_count", 0),
        heads=heads,
        kv_heads=_facts_number(values, f"{architecture}.attention.head_count_kv", heads),
        experts=_facts_number(values, f"{architecture}.expert_count", 0),
    )


class _Checkpoint:
    """What checkpoints have in common: an export that says which tensors of theirs make up which GGUF tensor."""

    def __init__(self, source: Source, export: Export) -> None:
        self._source = source
        self._roads = {road.name: road for road in export.roads}
        self.values: Mapping[str, GgufValue] = export.values
        self.left_out: Mapping[str, str] = export.left_out
        self.notes: tuple[str, ...] = export.notes
        self.modules: Mapping[str, tuple[str, ...]] = {
            road.name: tuple(dict.fromkeys(piece.tensor.removesuffix(".weight") for piece in road.pieces))
            for road in export.roads
            if road.role == "matrix"
        }

    def read(self, name: str, rows: tuple[int, int]) -> Floats:
        return self._roads[name].read(self._source, rows)

    def fingerprint(self) -> Mapping[str, str]:
        return self._source.fingerprint()


class FromCheckpoint(_Checkpoint):
    """A plain checkpoint folder. plain: tensors that are F32 in every file."""

    def __init__(self, source: Source, *, pre: str | None = None) -> None:
        export = describe(source, pre=pre)
        super().__init__(source, export)
        self.plain = frozenset(road.name for road in export.roads if road.role == "plain")
        self.places: Mapping[str, Place] = {road.name: Place(road.name, road.shape) for road in export.roads}

    def raw(self, name: str, rows: tuple[int, int]) -> Bytes:
        raise InputError(f"{name} holds no blocks", mend="report this")

    def check_unchanged(self) -> None:
        check = getattr(self._source, "check_unchanged", None)
        if check is not None:
            check()


class Blocks(Protocol):
    """Rows of a checkpoint's linear as block bytes, in the checkpoint's own row order."""

    def block_type(self, module: str) -> BlockType | None:
        """The type of this linear's blocks; None where it is not quantized."""

    def rows(self, module: str, start: int, stop: int) -> Bytes:
        """``(rows, row bytes)``."""


class FromBlocks(_Checkpoint):
    """A checkpoint whose linears are blocks already (or can be said to be, integer for integer); rows are moved, nothing is rounded."""

    def __init__(self, source: Source, blocks: Blocks, *, pre: str | None = None) -> None:
        export = describe(source, pre=pre)
        super().__init__(source, export)
        self._blocks = blocks
        self.plain = frozenset(road.name for road in export.roads if road.role == "plain")
        self.places: Mapping[str, Place] = {
            road.name: Place(road.name, road.shape, self._type(road)) for road in export.roads
        }

    def exact_type(self, name: str) -> str:
        """The plain type that holds this tensor's values as they are."""
        road = self._roads[name]
        dtypes = {self._source.tensors[piece.tensor].dtype for piece in road.pieces}
        return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtypes.pop(), "F32") if len(dtypes) == 1 else "F32"

    def _type(self, road: Road) -> BlockType | None:
        """The type that all pieces share. InputError where only some are quantized, or a change touches the numbers."""
        if not road.pieces:
            return None
        types = {self._blocks.block_type(piece.tensor.removesuffix(".weight")) for piece in road.pieces}
        if types == {None}:
            return None
        if len(types) > 1 or road.change == "add-one":
            raise InputError(f"{road.name} would mix several types", mend="quantize its parts alike")
        return types.pop()

    def raw(self, name: str, rows: tuple[int, int]) -> Bytes:
        parts = [self._piece(piece, low, high) for piece, low, high in self._roads[name].parts(rows)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _piece(self, piece: Piece, low: int, high: int) -> Bytes:
        wanted = piece.source_rows(low, high)
        first, last = int(wanted.min()), int(wanted.max()) + 1
        found = self._blocks.rows(piece.tensor.removesuffix(".weight"), first, last)
        return np.ascontiguousarray(found[wanted - first])

    def check_unchanged(self) -> None:
        check = getattr(self._source, "check_unchanged", None)
        if check is not None:
            check()


@dataclass
class FromFile:
    """A GGUF file, of any architecture: names, shapes and header values stay as they are."""

    file: GgufFile
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values: Mapping[str, GgufValue] = {
            key: value
            for key, value in self.file.values.items()
            if not re.match(r"split\.(no|count|tensors\.count)$", key)
        }
        self.places: Mapping[str, Place] = {
            name: Place(name, tensor.shape, tensor.block) for name, tensor in self.file.tensors.items()
        }
        self.plain: frozenset[str] = frozenset()

    def read(self, name: str, rows: tuple[int, int]) -> Floats:
        return self.file.read(name, rows)

    def raw(self, name: str, rows: tuple[int, int]) -> Bytes:
        return self.file.raw(name, rows)

    def fingerprint(self) -> Mapping[str, str]:
        return self.file.fingerprint()

    def check_unchanged(self) -> None:
        self.file.check_unchanged()
