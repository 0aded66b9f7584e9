"""What an architecture is to GGUF: a table of tensors and settings, read from left to right and from right to left.

``Rule`` pairs one GGUF tensor with the tensor of the checkpoint from which it comes; a ``Setting`` (``settings.py``) pairs keys of the GGUF
file with entries of ``config.json``. A ``Road`` is a rule applied to a checkpoint: which rows of which tensors, in which order, make up
one GGUF tensor. Since rows are only moved, never mixed, a road also serves tensors that are quantized already.

Source: the GGUF specification, and the tensor names of the ``gguf`` package (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bitwright.core.source import Source
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.gguf.settings import Model, Setting

__all__ = ["Architecture", "Change", "Floats", "Order", "Piece", "Road", "RowOrder", "Rule"]

Floats = NDArray[np.float32]
RowOrder = NDArray[np.int64]
#: ``(model, rows) -> RowOrder``: a permutation of ``rows`` rows that depends on head counts
Order = Callable[["Model", int], RowOrder]
Change = Literal["transpose", "add-one"]
#: how much of a transposed tensor is read at a time
_SLAB_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Rows of one tensor of the checkpoint.

    tensor: its name on disk. rows: how many GGUF rows it gives; of a tensor with one axis every element is a row, of one with more than
    two the leading axes count as one. order: GGUF row ``i`` of this piece is row ``order[i]`` of the tensor; None: row ``first + i``.
    """

    tensor: str
    rows: int
    order: RowOrder | None = None
    first: int = 0

    def source_rows(self, start: int = 0, stop: int | None = None) -> RowOrder:
        """Which rows of the tensor GGUF rows ``start .. stop`` of this piece are."""
        stop = self.rows if stop is None else stop
        if self.order is not None:
            return self.order[start:stop]
        return np.arange(self.first + start, self.first + stop, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Road:
    """One GGUF tensor and where it comes from.

    shape: as numpy counts, ``(rows, columns)``, ``(experts, rows, columns)`` or ``(n,)``. pieces: one after the other along the rows.
    role: "matrix" may be quantized; "plain" is always F32 (norms, biases, routers, positions). values: of a generated tensor, which has
    no pieces.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    role: Literal["matrix", "plain"]
    change: Change | None = None
    values: Floats | None = None

    @property
    def rows(self) -> int:
        """Rows over all leading axes; a tensor with one axis is one row."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    def parts(self, rows: tuple[int, int] | None = None) -> Iterator[tuple[Piece, int, int]]:
        """``(piece, start, stop)``: which GGUF rows of which pieces make up rows ``start .. stop`` of this tensor.

        Of a tensor with one axis these are elements, and always all of them.
        """
        start, stop = (0, sum(piece.rows for piece in self.pieces)) if rows is None or len(self.shape) == 1 else rows
        begin = 0
        for piece in self.pieces:
            low, high = max(start - begin, 0), min(stop - begin, piece.rows)
            if low < high:
                yield piece, low, high
            begin += piece.rows

    def read(self, source: Source, rows: tuple[int, int] | None = None) -> Floats:
        """Rows ``start .. stop`` (all by default) as float32 ``(rows, columns)``; only what is needed is read."""
        start, stop = rows or (0, self.rows)
        if not 0 <= start <= stop <= self.rows:
            raise InputError(f"{self.name}: rows {start}:{stop} of {self.rows} do not exist", mend="check the rows")
        if self.values is not None:
            return self.values.reshape(self.rows, self.columns)[start:stop].copy()
        if start == stop:
            return np.empty((0, self.columns), np.float32)
        take = _columns if self.change == "transpose" else _rows
        found = [take(source, piece, low, high) for piece, low, high in self.parts((start, stop))]
        values = (found[0] if len(found) == 1 else np.concatenate(found)).reshape(-1, self.columns)
        if self.change == "add-one":
            values = values + np.float32(1)
        return np.ascontiguousarray(values[: stop - start])


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``gguf`` comes from ``hf``: names without ``.weight`` or ``.bias``, with ``{block}`` and, where experts are stacked, ``{expert}``.

    order: how rows move. plain: F32 always, whatever the shape. optional: may be absent (biases always may). suffixes: what there can be.
    when: only in models of which this holds. single_row: a matrix of one row, which other writers store with one axis.
    """

    gguf: str
    hf: str
    order: Order | None = None
    change: Change | None = None
    plain: bool = False
    optional: bool = False
    suffixes: tuple[str, ...] = (".weight", ".bias")
    when: Callable[[Model], bool] | None = None
    single_row: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one family of models goes into GGUF and back.

    name: GGUF's. model_types: those of ``config.json``; the first is written on the way back. model_class: for the config's
    ``architectures``. aliases: where the config spells a common entry differently. spellings: other prefixes under which the same tensors
    are published, as (usual, found) pairs. ignored: patterns of tensors that GGUF has no place for -> the reason. tied: what the class
    does where the config says nothing of tied embeddings. head: the output matrix must be in the file, tied or not. experts: tells this
    table from another of the same GGUF name. adapt: brings a config to common terms first, where aliases do not suffice.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    settings: tuple[Setting, ...]
    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    spellings: tuple[Mapping[str, str], ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    head: bool = False
    experts: bool = False
    adapt: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None


def _rows(source: Source, piece: Piece, start: int, stop: int) -> Floats:
    """GGUF rows ``start .. stop`` of a piece, read in runs of neighbouring rows: ``(rows, columns)``, of one axis ``(rows,)``."""
    shape = source.tensors[piece.tensor].shape
    inner = math.prod(shape[1:-1])
    if piece.order is None:
        return _flat(source, piece.tensor, piece.first + start, piece.first + stop, inner)
    wanted = piece.order[start:stop]
    ascending = np.argsort(wanted, kind="stable")
    ordered = wanted[ascending]
    cuts = np.flatnonzero(np.diff(ordered) > 1) + 1
    runs = [_flat(source, piece.tensor, int(run[0]), int(run[-1]) + 1, inner) for run in np.split(ordered, cuts)]
    result = np.empty((len(wanted), *runs[0].shape[1:]), np.float32)
    result[ascending] = np.concatenate(runs)
    return result


def _flat(source: Source, name: str, start: int, stop: int, inner: int) -> Floats:
    """Rows ``start .. stop`` counted over all leading axes, ``inner`` of them to one of the first axis."""
    first, last = start // inner, -(-stop // inner)
    values = _floats(source.read(name, (first, last)))
    if inner == 1:
        return values
    return values.reshape(-1, values.shape[-1])[start - first * inner : stop - first * inner]


def _columns(source: Source, piece: Piece, start: int, stop: int) -> Floats:
    """The same of a tensor that is stored transposed: columns, cut out of one slab of rows after the other."""
    spec = source.tensors[piece.tensor]
    wanted = piece.source_rows(start, stop)
    step = max(1, _SLAB_BYTES // max(1, spec.nbytes // spec.shape[0]))
    result = np.empty((len(wanted), spec.shape[0]), np.float32)
    for row in range(0, spec.shape[0], step):
        last = min(row + step, spec.shape[0])
        result[:, row:last] = _floats(source.read(piece.tensor, (row, last)))[:, wanted].T
    return result


def _floats(tensor: torch.Tensor) -> Floats:
    return tensor.to(torch.float32).numpy()
