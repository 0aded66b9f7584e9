"""Records for tensors: what one looks like on disk, and a weight that has become codes and parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.core.scheme import Params, Scheme

__all__ = ["DTYPES", "QuantizedTensor", "TensorSpec", "dtype_name", "parse_dtype"]

#: safetensors dtype name <-> torch dtype, one truth for reader, writer and plan.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    >>> dtype_name(torch.bfloat16)
    'BF16'
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise InputError(f"dtype {dtype} has no safetensors name", mend="cast the tensor first") from None


def parse_dtype(name: str) -> torch.dtype:
    """A torch dtype from its plain name, as configs write it.

    >>> parse_dtype("bfloat16")
    torch.bfloat16
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"'{name}' is not a torch dtype", mend="use float16, bfloat16 or float32")
    return dtype


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one stored tensor, without its data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Exact size of the data in bytes.

        >>> TensorSpec("w", (2, 3), torch.bfloat16).nbytes
        12
        """
        return math.prod(self.shape) * self.dtype.itemsize


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
