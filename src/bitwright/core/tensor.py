"""What a tensor looks like on disk: name, shape and dtype, and the names of dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bitwright.errors import InputError

__all__ = ["DTYPES", "TensorSpec", "dtype_name", "parse_dtype"]

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
