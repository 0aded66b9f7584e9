"""The head of a GGUF file, parsed strictly: every count and length is checked against the file before anything is allocated.

Layout (GGUF specification, versions 2 and 3): magic, version u32, number of tensors u64, number of keys u64, keys (text, type u32,
value), tensors (name, number of dimensions u32, dimensions u64 each, type u32, offset u64), zeros up to the alignment, data. What
llama.cpp's loader demands is demanded here: unique names, names below 64 bytes, offsets that are the running sum of padded sizes.

The bounds below are several times what the largest published models need, and keep a file made to do harm below 100 MB of memory.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks.types import BlockType, by_number
from bitwright.errors import InputError
from bitwright.io.files import os_error, read_at
from bitwright.io.gguf_values import NUMBERS, GgufValue, Strings, ValueType
from bitwright.io.text import quoted

__all__ = [
    "ALIGNMENT_KEY",
    "DEFAULT_ALIGNMENT",
    "MAX_ALIGNMENT",
    "MAX_DIMENSIONS",
    "MAX_HEAD_BYTES",
    "MAX_KEYS",
    "MAX_KEY_BYTES",
    "MAX_NAME_BYTES",
    "MAX_TENSORS",
    "MIN_ALIGNMENT",
    "GgufHead",
    "GgufTensor",
    "padded",
    "read_head",
]

#: of the whole head; the largest published ones (262,144 tokens with 515,000 merges) have about 16 MB
MAX_HEAD_BYTES = 32 * 2**20
MAX_KEYS = 2**14
MAX_TENSORS = 2**15
#: of all string arrays together; the largest published model has 777,000
MAX_STRINGS = 2**21
#: of all keys, tensor names and single strings together: Python may spend four bytes on one
MAX_TEXT_BYTES = 8 * 2**20
#: of the specification
MAX_KEY_BYTES = 2**16 - 1
#: of llama.cpp (GGML_MAX_NAME less the terminator)
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT = 8
MAX_ALIGNMENT = 2**16

_MAX_BYTES = 2**63 - 1
_WINDOW = 2**16
_MAX_WINDOW = 2**22
_MEND = "download or convert the file again"
_KEY_BYTES = 8 + 1 + 4 + 1
_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8
_KNOWN = {int(kind): kind for kind in ValueType}
_CODES = {
    ValueType.U8: "B",
    ValueType.I8: "b",
    ValueType.U16: "H",
    ValueType.I16: "h",
    ValueType.U32: "I",
    ValueType.I32: "i",
    ValueType.F32: "f",
    ValueType.U64: "Q",
    ValueType.I64: "q",
    ValueType.F64: "d",
}

Order = Literal["little", "big"]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. shape: in numpy's order, columns last; offset: of its data in its file; part: place of that file in a split model."""

    name: str
    shape: tuple[int, ...]
    block: BlockType
    offset: int
    nbytes: int
    part: int = 0

    @property
    def columns(self) -> int:
        """Values of one row; 1 for a single number."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows, all leading axes taken together."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows


@dataclass(frozen=True, slots=True)
class GgufHead:
    """What a file says about itself. data_start: where the data begins; sha256: of all bytes before the data's padding."""

    version: int
    byte_order: Order
    alignment: int
    values: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]
    data_start: int
    sha256: str


def padded(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``, a power of two."""
    return (size + alignment - 1) & -alignment


def read_head(descriptor: int, size: int, where: str, *, part: int = 0) -> GgufHead:
    """Parse the head of an open file of ``size`` bytes; ``where`` names it in messages.

    Raises InputError, naming file and field, for everything that is not as the specification and llama.cpp demand.
    """
    try:
        return _Parser(descriptor, size, where, part).parse()
    except OSError as error:
        raise os_error(error, where) from error


class _Parser:
    """A cursor over the head, which is read in growing windows, each byte once, and held as one piece."""

    def __init__(self, descriptor: int, size: int, where: str, part: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._where = where
        self._part = part
        self._head = bytearray()
        self._at = 0
        self._texts = 0
        self._strings = 0
        self._field: tuple[str, str | int] = ("", "")
        self._values: dict[str, GgufValue] = {}
        #: arrays become views of the head when it is whole: key, element type, first byte, count or ends
        self._arrays: list[tuple[str, ValueType, int, int | array[int]]] = []

    def parse(self) -> GgufHead:
        self._field = ("the first 24 bytes", "")
        if self._size < 24:
            raise self._fault(f"{self._size} bytes are too few for a GGUF file")
        self._need(24)
        version, order = self._version()
        self._order: Order = order
        sign = "<" if order == "little" else ">"
        self._scalars = {kind: struct.Struct(sign + code) for kind, code in _CODES.items()}
        self._u32 = struct.Struct(sign + "I").unpack_from
        self._u64 = struct.Struct(sign + "Q").unpack_from
        (tensors,), (keys,) = self._u64(self._head, 8), self._u64(self._head, 16)
        self._at = 24
        self._count("tensor count", tensors, MAX_TENSORS, _TENSOR_BYTES)
        self._count("key count", keys, MAX_KEYS, _KEY_BYTES)
        for number in range(keys):
            self._key(number)
        alignment = self._alignment()
        infos = self._infos(tensors)
        data_start = padded(self._at, alignment) if tensors else self._at
        placed = self._place(infos, alignment, data_start)
        del self._head[self._at :]
        digest = hashlib.sha256(self._head).hexdigest()
        self._finish_arrays()
        return GgufHead(
            version=version,
            byte_order=order,
            alignment=alignment,
            values=self._values,
            tensors=placed,
            data_start=data_start,
            sha256=digest,
        )

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _fault(self, message: str, mend: str = _MEND) -> InputError:
        kind, which = self._field
        field = kind if which == "" else f"{kind} {which if isinstance(which, int) else quoted(which)}"
        return InputError(f"{self._where}, {field}: {message}", mend=mend)

    def _need(self, count: int) -> None:
        """Have the next ``count`` bytes in the head, or raise."""
        end = self._at + count
        if end > len(self._head):
            self._read_to(end)

    def _read_to(self, end: int) -> None:
        if end > self._size:
            raise self._fault(f"it ends at byte {end}, the file at byte {self._size}")
        if end > MAX_HEAD_BYTES:
            raise self._fault(
                f"the head goes beyond {MAX_HEAD_BYTES} bytes, the most that is read",
                "the file is damaged or holds more than a model's metadata",
            )
        while len(self._head) < end:
            have = len(self._head)
            window = bytearray(min(max(_WINDOW, min(have, _MAX_WINDOW)), self._size - have))
            count = read_at(self._descriptor, memoryview(window), have)
            if count < len(window):
                raise self._fault("the file shrank while it was read", "keep the files still during a run")
            self._head += window

    def _integer32(self) -> int:
        self._need(4)
        (value,) = self._u32(self._head, self._at)
        self._at += 4
        return int(value)

    def _integer64(self) -> int:
        self._need(8)
        (value,) = self._u64(self._head, self._at)
        self._at += 8
        return int(value)

    def _text(self, what: str, limit: int) -> str:
        length = self._integer64()
        if length > self._size - self._at:
            raise self._fault(f"{what} of {length} bytes, {self._size - self._at} are left in the file")
        if length > limit:
            raise self._fault(f"{what} of {length} bytes, at most {limit} are allowed")
        self._texts += length
        if self._texts > MAX_TEXT_BYTES:
            raise self._fault(f"keys, names and single strings have more than {MAX_TEXT_BYTES} bytes in all")
        self._need(length)
        begin, self._at = self._at, self._at + length
        try:
            return self._head[begin : self._at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(f"{what} is not UTF-8 at byte {error.start}") from error

    def _count(self, what: str, count: int, limit: int, least: int) -> None:
        self._field = (what, "")
        if count > (self._size - self._at) // least:
            raise self._fault(f"{count} do not fit into the {self._size - self._at} bytes that follow")
        if count > limit:
            raise self._fault(f"{count}, at most {limit} are read")

    def _version(self) -> tuple[int, Order]:
        if self._head[:4] != b"GGUF":
            self._field = ("the first 4 bytes", "")
            raise self._fault("not a GGUF file", "name a .gguf file; older formats (GGML, GGJT) are not read")
        self._field = ("version", "")
        raw = bytes(self._head[4:8])
        orders: tuple[Order, Order] = ("little", "big")
        for order in orders:
            version = int.from_bytes(raw, order)
            if version in (2, 3):
                return version, order
            if version == 1:
                raise self._fault("version 1 is not read", "convert the model again with a current converter")
        version = int.from_bytes(raw, "little")
        raise self._fault(
            f"{version} is unknown", "the file is damaged, or newer than this release, which reads 2 and 3"
        )

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _key(self, number: int) -> None:
        self._field = ("key number", number)
        key = self._text("a key", MAX_KEY_BYTES)
        if not key:
            raise self._fault("the key is empty")
        self._field = ("key", key)
        if key in self._values:
            raise self._fault("there are two keys of this name")
        kind = self._type()
        if kind is ValueType.ARRAY:
            self._array(key)
        elif kind is ValueType.STRING:
            self._values[key] = GgufValue(kind, self._text("a string", MAX_TEXT_BYTES))
        elif kind is ValueType.BOOL:
            self._need(1)
            byte = self._head[self._at]
            if byte > 1:
                raise self._fault(f"a bool is {byte}, not 0 or 1")
            self._at += 1
            self._values[key] = GgufValue(kind, bool(byte))
        else:
            scalar = self._scalars[kind]
            self._need(scalar.size)
            self._values[key] = GgufValue(kind, scalar.unpack_from(self._head, self._at)[0])
            self._at += scalar.size

    def _type(self) -> ValueType:
        number = self._integer32()
        kind = _KNOWN.get(number)
        if kind is None:
            raise self._fault(f"value type {number} is unknown", "the file is damaged, or newer than this release")
        return kind

    def _array(self, key: str) -> None:
        element = self._type()
        if element is ValueType.ARRAY:
            raise self._fault("an array of arrays, which no GGUF loader reads")
        count = self._integer64()
        least = 8 if element is ValueType.STRING else NUMBERS[element].itemsize
        if count > (self._size - self._at) // least:
            raise self._fault(f"{count} elements, only {self._size - self._at} bytes are left in the file")
        begin = self._at
        if element is ValueType.STRING:
            self._strings += count
            if self._strings > MAX_STRINGS:
                raise self._fault(f"{self._strings} strings up to this array, at most {MAX_STRINGS} are read")
            self._arrays.append((key, element, begin, self._string_ends(count)))
        else:
            self._need(count * least)
            self._at += count * least
            self._arrays.append((key, element, begin, count))
        self._values[key] = GgufValue(ValueType.ARRAY, None, element)  # holds the key's place until the head is whole

    def _string_ends(self, count: int) -> array[int]:
        ends = array("I")
        head, u64, begin, at = self._head, self._u64, self._at, self._at
        for index in range(count):
            if at + 8 > len(head):
                self._at = at
                self._need(8)
            (length,) = u64(head, at)
            at += 8
            if at + length > len(head):
                self._at = at
                if length > self._size - at:
                    raise self._fault(f"string {index} of {length} bytes, {self._size - at} are left in the file")
                self._need(length)
            at += length
            ends.append(at - begin)
        self._at = at
        return ends

    def _finish_arrays(self) -> None:
        """Make the arrays views of the head, which costs no second copy; the head itself is of no use afterwards."""
        held = memoryview(self._head)
        address = np.frombuffer(held, np.uint8).ctypes.data
        for key, element, begin, extent in self._arrays:
            if not isinstance(extent, int):
                end = begin + (extent[-1] if extent else 0)
                value: Any = Strings(held[begin:end].toreadonly(), extent, big=self._order == "big")
            else:
                value = self._numbers(key, element, held, begin, extent, address)
            self._values[key] = GgufValue(ValueType.ARRAY, value, element)

    def _numbers(
        self, key: str, element: ValueType, held: memoryview, begin: int, count: int, address: int
    ) -> NDArray[Any]:
        stored = NUMBERS[element]
        # aligned by moving the numbers over the last bytes of their count, which is 8 bytes and was read long ago
        start = begin - (address + begin) % stored.itemsize
        nbytes = count * stored.itemsize
        held[start : start + nbytes] = held[begin : begin + nbytes]
        raw = np.frombuffer(held, np.uint8, nbytes, start)
        if element is ValueType.BOOL and count and raw.max() > 1:
            self._field = ("key", key)
            wrong = int((raw > 1).argmax())
            raise self._fault(f"bool {wrong} of the array is {raw[wrong]}, not 0 or 1")
        if self._order == "big" and stored.itemsize > 1:
            raw.view(f"u{stored.itemsize}").byteswap(inplace=True)
        value = raw.view(stored)
        value.flags.writeable = False
        return value

    def _alignment(self) -> int:
        found = self._values.get(ALIGNMENT_KEY)
        if found is None:
            return DEFAULT_ALIGNMENT
        self._field = ("key", ALIGNMENT_KEY)
        if found.type is not ValueType.U32:
            raise self._fault(f"it is {found.kind}, u32 is demanded")
        alignment = int(found.value)
        if alignment & (alignment - 1) or not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT:
            raise self._fault(f"{alignment} is not a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}")
        return alignment

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _infos(self, count: int) -> list[tuple[str, tuple[int, ...], BlockType, int, int]]:
        infos = []
        for number in range(count):
            self._field = ("tensor number", number)
            name = self._text("a name", MAX_NAME_BYTES)
            if not name:
                raise self._fault("the name is empty")
            self._field = ("tensor", name)
            rank = self._integer32()
            if rank > MAX_DIMENSIONS:
                raise self._fault(f"{rank} dimensions, at most {MAX_DIMENSIONS} are allowed")
            dims = tuple(self._integer64() for _ in range(rank))
            kind = self._integer32()
            try:
                block = by_number(kind)
            except InputError as error:
                raise self._fault(error.message, error.mend) from error
            infos.append((name, dims[::-1], block, self._nbytes(dims, block), self._integer64()))
        return infos

    def _nbytes(self, dims: tuple[int, ...], block: BlockType) -> int:
        shown = f"dimensions {list(dims)}"
        values = 1
        for size in dims:
            if not 1 <= size <= _MAX_BYTES:
                raise self._fault(f"{shown}: each must be from 1 to {_MAX_BYTES}")
            values *= size
        if (dims[0] if dims else 1) % block.values:
            raise self._fault(
                f"{shown}: the first is not a multiple of the {block.values} values of a {block.name} block"
            )
        nbytes = values // block.values * block.nbytes
        if max(values, nbytes) > _MAX_BYTES:
            raise self._fault(f"{shown}: the size overflows")
        return nbytes

    def _place(
        self, infos: list[tuple[str, tuple[int, ...], BlockType, int, int]], alignment: int, data_start: int
    ) -> dict[str, GgufTensor]:
        placed: dict[str, GgufTensor] = {}
        cursor = 0
        for name, shape, block, nbytes, offset in infos:
            self._field = ("tensor", name)
            if name in placed:
                raise self._fault("there are two tensors of this name")
            if offset != cursor:
                fault = "overlaps the tensor before it" if offset < cursor else "leaves a hole before it"
                raise self._fault(f"its offset {offset} {fault}; {cursor} is demanded")
            if data_start + offset + nbytes > self._size:
                raise self._fault(
                    f"its data ends at byte {data_start + offset + nbytes}, the file at byte {self._size}",
                    "the download is not complete; download the file again",
                )
            placed[name] = GgufTensor(name, shape, block, data_start + offset, nbytes, self._part)
            cursor += padded(nbytes, alignment)
        return placed
