"""The header of a safetensors file, parsed strictly: every byte is accounted for, or the file is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.core.tensor import DTYPES, TensorSpec
from bitwright.errors import InputError
from bitwright.io.files import os_error, read_at
from bitwright.io.strict import parse_json, quoted

__all__ = ["MAX_HEADER_BYTES", "Header", "parse_header", "read_header"]

#: the bound of the safetensors specification
MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 64
_MAX_BYTES = 2**63 - 1
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MEND = "download or convert the file again"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself.

    data_start: offset of the data in the file; specs: in the order of the data; offsets: name -> (begin, end) in bytes
    from ``data_start``; sha256: of the header's bytes with the length before them.
    """

    data_start: int
    specs: tuple[TensorSpec, ...]
    offsets: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]
    sha256: str


def read_header(descriptor: int, size: int, where: str) -> Header:
    """The header of an open file of ``size`` bytes; ``where`` names it in messages. Raises InputError."""
    prefix = bytearray(8)
    try:
        count = read_at(descriptor, memoryview(prefix), 0)
        if count < 8:
            raise InputError(f"{where}: {count} bytes are too few for a safetensors file", mend=_MEND)
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(
                f"{where}: a header of {length} bytes does not fit (file {size} bytes, bound {MAX_HEADER_BYTES})",
                mend=_MEND,
            )
        data = bytearray(length)
        count = read_at(descriptor, memoryview(data), 8)
    except OSError as error:
        raise os_error(error, where) from error
    if count < length:
        raise InputError(f"{where}: the file ends inside its header", mend=_MEND)
    return parse_header(bytes(data), size - 8 - length, where)


def parse_header(data: bytes, buffer_bytes: int, where: str) -> Header:
    """Parse the JSON of a header whose file holds ``buffer_bytes`` bytes of tensor data after it.

    Raises InputError unless dtypes are known, shapes are sound, sizes follow from them, and the tensors cover the
    whole buffer without overlaps and holes, as the specification demands.
    """
    if data[:1] != b"{":
        raise InputError(f"{where}: the header does not begin with '{{'", mend=_MEND)
    entries = parse_json(data, f"{where}, header", max_bytes=MAX_HEADER_BYTES, max_depth=4)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{where}: {_METADATA} is not a map of strings", mend=_MEND)
    placed: list[tuple[int, int, TensorSpec]] = []
    for name, entry in entries.items():
        spec = _spec(name, entry, where)
        begin, end = _offsets(entry["data_offsets"], f"{where}, tensor {quoted(name)}")
        if end - begin != spec.nbytes:
            raise InputError(
                f"{where}, tensor {quoted(name)}: {end - begin} bytes stored, its shape needs {spec.nbytes}", mend=_MEND
            )
        if end > buffer_bytes:
            raise InputError(
                f"{where}, tensor {quoted(name)}: ends at byte {end} of {buffer_bytes}: the file is cut short",
                mend=_MEND,
            )
        placed.append((begin, end, spec))
    placed.sort(key=lambda place: place[:2])
    cursor = 0
    for begin, end, spec in placed:
        if begin != cursor:
            fault = "overlaps the tensor before it" if begin < cursor else "leaves a hole before it"
            raise InputError(f"{where}, tensor {quoted(spec.name)}: {fault}", mend=_MEND)
        cursor = end
    if cursor != buffer_bytes:
        raise InputError(f"{where}: {buffer_bytes - cursor} bytes after the last tensor", mend=_MEND)
    digest = hashlib.sha256(len(data).to_bytes(8, "little") + data).hexdigest()
    return Header(
        data_start=8 + len(data),
        specs=tuple(spec for _, _, spec in placed),
        offsets={spec.name: (begin, end) for begin, end, spec in placed},
        metadata=metadata,
        sha256=digest,
    )


def _spec(name: str, entry: Any, where: str) -> TensorSpec:
    where = f"{where}, tensor {quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise InputError(f"{where}: the entry does not have exactly dtype, shape and data_offsets", mend=_MEND)
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise InputError(f"{where}: unknown dtype {quoted(str(entry['dtype']))}", mend=f"known: {', '.join(DTYPES)}")
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(size) for size in shape):
        raise InputError(f"{where}: the shape is not a list of sizes", mend=_MEND)
    extent = dtype.itemsize
    for size in shape:
        extent *= max(size, 1)  # zeros count as one: strides of an empty tensor must not overflow either
        if extent > _MAX_BYTES:
            raise InputError(f"{where}: the shape overflows", mend=_MEND)
    return TensorSpec(name, tuple(shape), dtype)


def _offsets(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(_is_size(offset) for offset in value):
        raise InputError(f"{where}: data_offsets is not a pair of offsets", mend=_MEND)
    begin, end = value
    if begin > end:
        raise InputError(f"{where}: data_offsets end before they begin", mend=_MEND)
    return begin, end


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES
