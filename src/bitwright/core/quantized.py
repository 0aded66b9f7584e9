"""A weight that has become codes and parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitwright.core.scheme import Params, Scheme
from bitwright.errors import InputError

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """A weight ``(rows, columns) = (out, in)`` as integer codes and parameters.

    codes: ``(rows, columns)`` uint8, unpacked (one code per element; for schemes with ``vector > 1`` one per vector).
    params: what the scheme fitted, checked against ``scheme.param_spec(shape)`` here.
    outliers: positions and values kept in high precision, added on top of the decoded codes, or None:
    ``(indices (n,) int64 into the flattened weight, values (n,))``.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    params: Params
    outliers: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        expected = (rows, columns // self.scheme.vector)
        if tuple(self.codes.shape) != expected:
            raise InputError(f"codes have shape {tuple(self.codes.shape)}, the scheme needs {expected}")
        specs = {spec.name: spec for spec in self.scheme.param_spec(self.shape)}
        if set(specs) != set(self.params):
            raise InputError(f"parameters {sorted(self.params)} given, the scheme needs {sorted(specs)}")
        for name, value in self.params.items():
            spec = specs[name]
            if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                raise InputError(
                    f"parameter '{name}' is {value.dtype} {tuple(value.shape)}, "
                    f"the scheme needs {spec.dtype} {spec.shape}"
                )

    def decode(self) -> torch.Tensor:
        """The weight that these codes stand for: ``(rows, columns)`` float32."""
        weight = self.scheme.decode(self.codes, self.params)
        if self.outliers is not None:
            indices, values = self.outliers
            weight.view(-1).index_add_(0, indices, values.to(weight.dtype))
        return weight

    def equals(self, other: QuantizedTensor) -> bool:
        """True where scheme, codes, every parameter and the outliers are the same bit for bit."""
        if (self.outliers is None) != (other.outliers is None):
            return False
        if self.outliers is not None and other.outliers is not None:
            pairs = zip(self.outliers, other.outliers, strict=True)
            if not all(torch.equal(mine, theirs) for mine, theirs in pairs):
                return False
        return (
            self.scheme == other.scheme
            and self.shape == other.shape
            and torch.equal(self.codes, other.codes)
            and self.params.keys() == other.params.keys()
            and all(torch.equal(value, other.params[name]) for name, value in self.params.items())
        )
