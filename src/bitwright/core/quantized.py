"""A weight that has become codes and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bitwright.core.scheme import Params, ParamSpec, Scheme
from bitwright.errors import InputError

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """A weight ``(rows, columns) = (out, in)`` as integer codes and parameters.

    codes: ``(rows, columns)`` uint8, unpacked (one code per element; for schemes with ``vector > 1`` one per vector).
    params: what the scheme fitted, checked against ``scheme.param_spec(shape)`` here.
    outliers: positions and values kept in high precision, which take the place of the decoded codes, or None:
    ``(indices (n,) int64 into the flattened weight, ascending, values (n,))``.
    inputs: static parameters of ``scheme.inputs`` (``input_scale`` and the like); empty where inputs are dynamic or not quantized, and
    until the engine has measured them.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    params: Params
    outliers: tuple[torch.Tensor, torch.Tensor] | None = None
    inputs: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, columns = self.shape
        expected = (rows, columns // self.scheme.vector)
        if tuple(self.codes.shape) != expected:
            raise InputError(f"codes have shape {tuple(self.codes.shape)}, the scheme needs {expected}")
        _check(self.params, self.scheme.param_spec(self.shape))
        if self.inputs:
            _check(self.inputs, self.scheme.inputs.param_spec() if self.scheme.inputs is not None else ())

    def decode(self) -> torch.Tensor:
        """The weight that these codes stand for: ``(rows, columns)`` float32."""
        weight = self.scheme.decode(self.codes, self.params)
        if self.outliers is not None:
            indices, values = self.outliers
            weight.view(-1)[indices] = values.to(weight.dtype)
        return weight

    def equals(self, other: QuantizedTensor) -> bool:
        """True where scheme, codes, every parameter, the outliers and the inputs' parameters are the same bit for bit."""
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
            and self.inputs.keys() == other.inputs.keys()
            and all(torch.equal(value, other.inputs[name]) for name, value in self.inputs.items())
        )


def _check(params: Params, wanted: Sequence[ParamSpec]) -> None:
    """Raise InputError where parameters are not exactly those of the specification."""
    specs = {spec.name: spec for spec in wanted}
    if set(specs) != set(params):
        raise InputError(f"parameters {sorted(params)} given, the scheme needs {sorted(specs)}")
    for name, value in params.items():
        spec = specs[name]
        if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
            raise InputError(
                f"parameter '{name}' is {value.dtype} {tuple(value.shape)}, the scheme needs {spec.dtype} {spec.shape}"
            )
