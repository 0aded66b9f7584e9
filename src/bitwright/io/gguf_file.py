"""A GGUF model: one file or all parts of a split one. Heads are parsed at once, data by ``pread`` on demand, never mapped.

Parts are named ``PREFIX-00001-of-00003.gguf`` and say so in ``split.no``, ``split.count`` and ``split.tensors.count``. As in
llama.cpp, the first part holds the model's keys; those of the others are not used.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks.codec import decode
from bitwright.errors import InputError, ResourceError
from bitwright.io.files import Signature, open_regular, os_error, read_at, require_little_endian, signature
from bitwright.io.gguf_header import MAX_TENSORS, GgufHead, GgufTensor, Order, read_head
from bitwright.io.gguf_swap import swap_blocks
from bitwright.io.gguf_values import GgufValue, Strings, ValueType
from bitwright.io.text import printable, quoted

__all__ = ["SPLIT_COUNT", "SPLIT_NUMBER", "SPLIT_TENSORS", "GgufFile", "GgufTensor", "part_name"]

SPLIT_NUMBER = "split.no"
SPLIT_COUNT = "split.count"
SPLIT_TENSORS = "split.tensors.count"

_EDGE_BYTES = 2**20
_KEEP_STILL = "keep the files still during a run, then start again"
_ALL_PARTS = "download all parts into one folder and keep their names"
_PART = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_INTEGERS = {
    ValueType.U8,
    ValueType.I8,
    ValueType.U16,
    ValueType.I16,
    ValueType.U32,
    ValueType.I32,
    ValueType.U64,
    ValueType.I64,
}
_WORDS: Mapping[type, str] = MappingProxyType(
    {
        bool: "a bool",
        int: "an integer",
        float: "a float",
        str: "a string",
        Strings: "an array of strings",
        list: "an array of strings",
        np.ndarray: "an array of numbers",
    }
)

Kind = TypeVar("Kind")


class _Demanded:
    """The default of ``get`` that no caller can pass."""


_DEMANDED = _Demanded()


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    where: str
    signature: Signature
    data_start: int
    sha256: str


def part_name(prefix: str, number: int, count: int) -> str:
    """File name of part ``number`` (from 0 on) of ``count``.

    >>> part_name("model", 0, 3)
    'model-00001-of-00003.gguf'
    """
    return f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


class GgufFile:
    """An open GGUF model. Threads may share it; ``close`` must not run beside reads.

    Descriptors open with the first read of each part and close with ``close``, the end of a ``with`` block, or the object.
    """

    def __init__(self, path: Path, head: GgufHead, parts: tuple[_Part, ...], tensors: Mapping[str, GgufTensor]) -> None:
        self._path = path
        self._head = head
        self._parts = parts
        self._tensors = MappingProxyType(tensors)
        self._values = MappingProxyType(head.values)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closer = weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the heads of the file ``path``, and of all parts where it is one of a split model.

        Raises InputError naming file and field for everything that is not as it should be.
        """
        require_little_endian()
        path = Path(path)
        part, head = _read_part(path, 0)
        count = _split(head, SPLIT_COUNT, ValueType.U16, part.where)
        if count is None or count <= 1:
            return cls(path, head, (part,), head.tensors)
        return cls(path, *_open_split(path, part, head, count))

    @property
    def path(self) -> Path:
        """The path that was opened."""
        return self._path

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the model, in order."""
        return tuple(part.path for part in self._parts)

    @property
    def version(self) -> int:
        """2 or 3."""
        return self._head.version

    @property
    def byte_order(self) -> Order:
        """Of the file; what is read is in the order of this machine."""
        return self._head.byte_order

    @property
    def alignment(self) -> int:
        """Of tensor data in the first file, in bytes."""
        return self._head.alignment

    @property
    def values(self) -> Mapping[str, GgufValue]:
        """The keys of the (first) file, in their order."""
        return self._values

    @property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """Every tensor by name, in the order of the files and of the data in them."""
        return self._tensors

    @property
    def total_bytes(self) -> int:
        """Size of all tensor data."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @overload
    def get(self, key: str, kind: type[Kind]) -> Kind: ...
    @overload
    def get(self, key: str, kind: type[Kind], default: None) -> Kind | None: ...
    @overload
    def get(self, key: str, kind: type[Kind], default: Kind) -> Kind: ...
    def get(self, key: str, kind: type[Any], default: Any = _DEMANDED) -> Any:
        """The value of ``key``, which must be of this kind; ``default`` where there is none.

        kind: ``int`` (any integer type), ``float`` (f32 or f64), ``bool``, ``str``, ``Strings`` or ``list`` (array of strings),
        ``numpy.ndarray`` (array of numbers or bools). Raises InputError for another kind, and for a missing key without default.
        """
        found = self._values.get(key)
        where = f"{self._parts[0].where}, key {quoted(key)}"
        if found is None:
            if default is _DEMANDED:
                raise InputError(f"{where}: missing", mend="the file is not what this command wants, or damaged")
            return default
        if not _is(found, kind):
            raise InputError(f"{where}: it is {found.kind}, not {_WORDS[kind]}", mend="convert the model again")
        return found.value.tolist() if kind is list else found.value

    def raw(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Blocks ``(rows, row bytes)`` of tensor ``name``, or of rows ``start .. stop`` of its leading axes taken together.

        In little-endian order, whatever the file's. Raises InputError naming file and tensor if the file changed or ended early,
        and for blocks of a big-endian file that cannot be turned around; ResourceError without memory.
        """
        tensor = self._find(name)
        part = self._parts[tensor.part]
        where = f"{part.where}, tensor {quoted(name)}"
        start, stop = (0, tensor.rows) if rows is None else rows
        if not 0 <= start <= stop <= tensor.rows:
            raise InputError(
                f"{where}: rows {start}:{stop} of shape {tensor.shape} do not exist", mend="check the rows"
            )
        row_bytes = tensor.block.row_bytes(tensor.columns)
        try:
            data = np.empty((stop - start, row_bytes), np.uint8)
        except MemoryError as error:
            raise ResourceError(
                f"{where}: no memory for {(stop - start) * row_bytes} bytes", mend="free memory"
            ) from error
        self._fill(tensor.part, data.reshape(-1).data, tensor.offset + start * row_bytes, where)
        if self.byte_order == "big":
            swap_blocks(data, tensor.block, where)
        return data

    def read(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """What ``raw`` gives, decoded: ``(rows, columns)`` float32. InputError for integers and types without a decoder."""
        tensor = self._find(name)
        where = f"{self._parts[tensor.part].where}, tensor {quoted(name)}"
        if tensor.block.integer:
            raise InputError(f"{where}: {tensor.block.name} holds integers, not weights", mend="read its bytes instead")
        blocks = self.raw(name, rows)
        try:
            return decode(blocks, tensor.block.name, tensor.columns)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", mend=error.mend) from error

    def check_unchanged(self) -> None:
        """Raise InputError if a file changed since ``open``."""
        for part in self._parts:
            try:
                now = signature(part.path.stat())
            except OSError as error:
                raise os_error(error, part.where) from error
            if now != part.signature:
                raise InputError(f"{part.where}: source changed during the run", mend=_KEEP_STILL)

    def fingerprint(self) -> Mapping[str, str]:
        """File name -> SHA-256 of size, head, and the first and last MiB of the data; independent of clocks."""
        return {part.path.name: self._edges(number) for number, part in enumerate(self._parts)}

    def _edges(self, number: int) -> str:
        part = self._parts[number]
        size = part.signature[2]
        digest = hashlib.sha256(f"{size} {part.sha256}".encode())
        start = min(part.data_start, size)
        for begin in (start, max(start, size - _EDGE_BYTES)):
            edge = bytearray(min(_EDGE_BYTES, size - begin))
            self._fill(number, memoryview(edge), begin, part.where)
            digest.update(edge)
        return digest.hexdigest()

    def _fill(self, number: int, buffer: memoryview, offset: int, where: str) -> None:
        try:
            count = read_at(self._descriptor(number), buffer, offset)
        except OSError as error:
            raise os_error(error, where) from error
        if count != len(buffer):
            raise InputError(
                f"{where}: {count} of {len(buffer)} bytes could be read: source changed during the run",
                mend=_KEEP_STILL,
            )

    def _find(self, name: str) -> GgufTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{printable(str(self._path))}: no tensor {quoted(name)}", mend="check the name") from None

    def _descriptor(self, number: int) -> int:
        with self._lock:
            descriptor = self._descriptors.get(number)
            if descriptor is None:
                part = self._parts[number]
                descriptor = open_regular(part.path, part.where)
                if signature(os.fstat(descriptor)) != part.signature:
                    os.close(descriptor)
                    raise InputError(f"{part.where}: source changed during the run", mend=_KEEP_STILL)
                self._descriptors[number] = descriptor
            return descriptor

    def close(self) -> None:
        """Close the files. The object can be read again."""
        with self._lock:
            _close_all(self._descriptors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _is(value: GgufValue, kind: type[Any]) -> bool:
    if kind is int:
        return value.type in _INTEGERS
    if kind is float:
        return value.type in (ValueType.F32, ValueType.F64)
    if kind is bool:
        return value.type is ValueType.BOOL
    if kind is str:
        return value.type is ValueType.STRING
    if kind in (list, Strings):
        return value.element is ValueType.STRING
    return value.element is not None and value.element is not ValueType.STRING


def _read_part(path: Path, number: int) -> tuple[_Part, GgufHead]:
    where = printable(str(path))
    descriptor = open_regular(path, where)
    try:
        before = signature(os.fstat(descriptor))
        head = read_head(descriptor, before[2], where, part=number)
        return _Part(path, where, before, head.data_start, head.sha256), head
    finally:
        os.close(descriptor)


def _split(head: GgufHead, key: str, kind: ValueType, where: str) -> int | None:
    found = head.values.get(key)
    if found is None:
        return None
    if found.type is not kind:
        raise InputError(f"{where}, key '{key}': it is {found.kind}, {kind.name.lower()} is demanded", mend=_ALL_PARTS)
    return int(found.value)


def _open_split(
    path: Path, opened: _Part, head: GgufHead, count: int
) -> tuple[GgufHead, tuple[_Part, ...], dict[str, GgufTensor]]:
    """All parts of the split model that ``path``, which says that there are ``count``, belongs to."""
    name = _PART.fullmatch(path.name)
    number = _split(head, SPLIT_NUMBER, ValueType.U16, opened.where)
    if name is None or int(name["count"]) != count or number is None or int(name["number"]) != number + 1:
        raise InputError(
            f"{opened.where}, keys '{SPLIT_NUMBER}', '{SPLIT_COUNT}': part {number} (from 0) of {count} does not agree with the name",
            mend=_ALL_PARTS,
        )
    parts: list[_Part] = []
    tensors: dict[str, GgufTensor] = {}
    first: GgufHead | None = None
    total: int | None = None
    for place in range(count):
        file = path.with_name(part_name(name["prefix"], place, count))
        if not os.path.lexists(file):
            raise InputError(f"{printable(str(file))}: part {place + 1} of {count} is missing", mend=_ALL_PARTS)
        part, head = _read_part(file, place)
        _check_part(part.where, head, place, count)
        if first is None:
            first, total = head, _split(head, SPLIT_TENSORS, ValueType.I32, part.where)
        elif head.byte_order != first.byte_order:
            raise InputError(f"{part.where}: its byte order differs from that of the first part", mend=_ALL_PARTS)
        doubled = next((tensor for tensor in head.tensors if tensor in tensors), None)
        if doubled is not None:
            raise InputError(f"{part.where}, tensor {quoted(doubled)}: an earlier part has it too", mend=_ALL_PARTS)
        tensors |= head.tensors
        if len(tensors) > MAX_TENSORS:
            raise InputError(f"{part.where}: more than {MAX_TENSORS} tensors up to this part", mend=_ALL_PARTS)
        parts.append(part)
    assert first is not None  # count is at least 2
    if total is not None and total != len(tensors):
        raise InputError(
            f"{parts[0].where}, key '{SPLIT_TENSORS}': {total} tensors announced, the {count} parts hold {len(tensors)}",
            mend=_ALL_PARTS,
        )
    return first, tuple(parts), tensors


def _check_part(where: str, head: GgufHead, place: int, count: int) -> None:
    for key, wanted in ((SPLIT_NUMBER, place), (SPLIT_COUNT, count)):
        found = _split(head, key, ValueType.U16, where)
        # llama.cpp asks the later parts for their number only
        if found != wanted and not (found is None and key == SPLIT_COUNT and place):
            raise InputError(f"{where}, key '{key}': {found}, {wanted} is demanded", mend=_ALL_PARTS)
