"""A source whose tensors are rotated as they are read: columns, rows, or both multiplied by an orthogonal matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitwright.core.linalg import one_thread
from bitwright.core.rotation import Rotation
from bitwright.core.source import Source
from bitwright.core.tensor import TensorSpec
from bitwright.errors import NumericError

__all__ = ["NormScale", "RotatedSource", "Turn"]

#: Rows rotated at a time. Always this many, counted from the tensor's first row, so that a piece has the same bits as the whole.
_SPAN = 64


@dataclass(frozen=True)
class NormScale:
    """Columns are multiplied by a stored norm's ``weight + offset``; inverse: divided by it."""

    weight: str
    offset: float
    inverse: bool = False


@dataclass(frozen=True, eq=False)
class Turn:
    """What becomes of one stored tensor W, seen as ``(out, in)``; a vector counts as one row.

    origin: the stored tensor that it is made of. scale, then columns: ``W diag(scale) Q``. rows: ``Qᵀ W``. column_index, row_index:
    ``(groups, width)`` int64, what is rotated together; None: everything. turned: it is stored as ``(in, out)``. constant: nothing of
    this, but every element has this value.
    """

    origin: str
    scale: NormScale | None = None
    columns: Rotation | None = None
    column_index: torch.Tensor | None = None
    rows: Rotation | None = None
    row_index: torch.Tensor | None = None
    turned: bool = False
    constant: float | None = None


class RotatedSource:
    """``source`` with some tensors rotated, computed in float64.

    turns: tensor name -> what becomes of it; a name that the source does not have is a new tensor. config: the rewritten one. exact: names
    that are given in float32 because they will be quantized, None for all; others are rounded to the dtype that they are stored in.
    """

    def __init__(
        self, source: Source, turns: Mapping[str, Turn], config: Mapping[str, Any], exact: frozenset[str] | None
    ) -> None:
        self._source, self._turns, self._config, self._exact = source, turns, config, exact
        self._tensors = dict(source.tensors)
        for name, turn in turns.items():
            if name not in self._tensors:
                origin = source.tensors[turn.origin]
                self._tensors[name] = TensorSpec(name, origin.shape, origin.dtype)
        self._scales: dict[NormScale, torch.Tensor] = {}
        self._whole: tuple[str, torch.Tensor] | None = None

    def with_exact(self, exact: frozenset[str] | None) -> RotatedSource:
        """The same, with other tensors given in float32."""
        return RotatedSource(self._source, self._turns, self._config, exact)

    @property
    def turned(self) -> frozenset[str]:
        """Names of the tensors that are rotated (norms that became constant are not)."""
        return frozenset(name for name, turn in self._turns.items() if turn.constant is None)

    @property
    def path(self) -> Path:
        """The folder of the source."""
        return self._source.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The rewritten config.json."""
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """What is stored in the source, and what the rotation adds."""
        return self._tensors

    def fingerprint(self) -> Mapping[str, str]:
        """That of the source."""
        return self._source.fingerprint()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, rotated where it has to be; its rows have the same bits however they are read."""
        turn = self._turns.get(name)
        if turn is None:
            return self._source.read(name, rows)
        spec = self._tensors[name]
        dtype = torch.float32 if self._exact is None or name in self._exact else spec.dtype
        if turn.constant is not None:
            shape = spec.shape if rows is None else (rows[1] - rows[0], *spec.shape[1:])
            return torch.full(shape, turn.constant, dtype=dtype)
        if rows is None:
            return self._make(turn, self._source.read(turn.origin), dtype)
        if len(spec.shape) == 3:
            return self._make(turn, self._source.read(turn.origin, rows), dtype)
        if len(spec.shape) == 2 and turn.rows is None and not turn.turned:
            first = rows[0] // _SPAN * _SPAN
            last = min(-(-rows[1] // _SPAN) * _SPAN, spec.shape[0])
            made = self._make(turn, self._source.read(turn.origin, (first, last)), dtype)
            return made[rows[0] - first : rows[1] - first].clone()
        # Every row depends on all of them; pieces of one tensor are asked for one after the other.
        if self._whole is None or self._whole[0] != name:
            self._whole = (name, self._make(turn, self._source.read(turn.origin), dtype))
        return self._whole[1][rows[0] : rows[1]].clone()

    def _make(self, turn: Turn, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # A product's bits can depend on how many threads share it.
        with one_thread():
            if value.dim() == 1:
                return self._matrix(turn, value.unsqueeze(0), dtype).squeeze(0)
            if value.dim() == 2:
                made = self._matrix(turn, value.T if turn.turned else value, dtype)
                return made.T.contiguous() if turn.turned else made
            parts = [self._matrix(turn, part.T if turn.turned else part, dtype) for part in value]
            return torch.stack([part.T.contiguous() if turn.turned else part for part in parts])

    def _matrix(self, turn: Turn, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if turn.columns is not None:
            scale = self._scale(turn.scale) if turn.scale is not None else None
            # Both sides: nothing is rounded between them.
            between = torch.float64 if turn.rows is not None else dtype
            value = _rotate(value, turn.columns, turn.column_index, scale, between)
        if turn.rows is not None:
            value = _rotate(value.T, turn.rows, turn.row_index, None, dtype).T.contiguous()
        return value

    def _scale(self, scale: NormScale) -> torch.Tensor:
        if scale not in self._scales:
            found = self._source.read(scale.weight).double() + scale.offset
            if scale.inverse:
                if bool((found == 0).any()):
                    raise NumericError(
                        f"{scale.weight}: the norm has weights of zero, its bias cannot be folded",
                        mend="leave the rotation out",
                    )
                found = 1.0 / found
            self._scales[scale] = found
        return self._scales[scale]


def _rotate(
    value: torch.Tensor, rotation: Rotation, index: torch.Tensor | None, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``value diag(scale) Q`` ``(rows, columns)``; index: the groups of columns that are rotated, others stay."""
    assert index is not None or value.shape[1] == rotation.width
    result = torch.empty(value.shape, dtype=dtype)
    block = torch.zeros(_SPAN, value.shape[1], dtype=torch.float64)
    for start in range(0, len(value), _SPAN):
        piece = value[start : start + _SPAN]
        block[: len(piece)] = piece
        x = block if scale is None else block * scale
        if index is None:
            x = rotation.apply(x)
        else:
            x = x.clone()
            x[:, index] = rotation.apply(x[:, index])
        result[start : start + len(piece)] = x[: len(piece)]
    return result
