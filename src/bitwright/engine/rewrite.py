"""A source whose tensors are rewritten as they are read: rows and columns multiplied by factors that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitwright.core.source import Source
from bitwright.core.tensor import TensorSpec

__all__ = ["Factors", "Overlaid", "RewrittenSource"]


@dataclass(frozen=True, eq=False)
class Factors:
    """What one stored tensor is multiplied by.

    rows: factor of every element along the first stored axis (and the only one of a vector), columns: along the second; None: all one.
    offset: a vector v becomes ``(v + offset) * rows - offset``.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    offset: float = 0.0

    def then(self, other: Factors) -> Factors:
        """Both, one after the other."""
        return Factors(
            _product(self.rows, other.rows), _product(self.columns, other.columns), other.offset or self.offset
        )

    def apply(self, value: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The rewritten rows ``start ...`` of a tensor, float32."""
        value = value.float()
        if self.rows is not None:
            rows = self.rows[start : start + len(value)]
            if value.dim() == 1:
                value = (value + self.offset) * rows - self.offset
            else:
                value = value * rows.view(-1, *[1] * (value.dim() - 1))
        if self.columns is not None:
            value = value * self.columns
        return value


class RewrittenSource:
    """``source`` with some tensors rewritten.

    exact: names of rewritten tensors that are given in float32 because they will be quantized; all others are rounded to the dtype
    that they are stored in.
    """

    def __init__(self, source: Source, factors: Mapping[str, Factors], exact: frozenset[str]) -> None:
        self._source = source
        self._factors = dict(factors)
        self._exact = exact

    def add(self, factors: Mapping[str, Factors]) -> None:
        """Further factors, after those that are there."""
        for name, new in factors.items():
            self._factors[name] = self._factors[name].then(new) if name in self._factors else new

    @property
    def path(self) -> Path:
        """The folder of the source."""
        return self._source.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json."""
        return self._source.config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """What is stored in the source."""
        return self._source.tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, rewritten where it has factors."""
        value = self._source.read(name, rows)
        factors = self._factors.get(name)
        if factors is None:
            return value
        changed = factors.apply(value, rows[0] if rows is not None else 0)
        return changed if name in self._exact else changed.to(value.dtype)

    def fingerprint(self) -> Mapping[str, str]:
        """That of the source."""
        return self._source.fingerprint()


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


class Overlaid:
    """``source`` with other values in some of its tensors."""

    def __init__(self, source: Source, values: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._values = dict(values)

    @property
    def path(self) -> Path:
        """The folder of the source."""
        return self._source.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json."""
        return self._source.config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """What is stored in the source."""
        return self._source.tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or what stands in its place."""
        value = self._values.get(name)
        if value is None:
            return self._source.read(name, rows)
        return value.clone() if rows is None else value[rows[0] : rows[1]].clone()

    def fingerprint(self) -> Mapping[str, str]:
        """That of the source."""
        return self._source.fingerprint()
