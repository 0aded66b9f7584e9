"""Values of a GGUF header: the thirteen types, their bytes, and string arrays that cost no Python object each.

A value keeps its stored type, so that a file can be written again with the same bytes. Source: the GGUF specification.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike

from bitwright.errors import InputError

__all__ = [
    "NUMBERS",
    "GgufValue",
    "Strings",
    "ValueType",
    "boolean",
    "booleans",
    "encode_text",
    "encode_value",
    "f32",
    "f32s",
    "f64",
    "f64s",
    "i8",
    "i8s",
    "i16",
    "i16s",
    "i32",
    "i32s",
    "i64",
    "i64s",
    "numbers",
    "string",
    "strings",
    "u8",
    "u8s",
    "u16",
    "u16s",
    "u32",
    "u32s",
    "u64",
    "u64s",
]


class ValueType(IntEnum):
    """Types of values, by their number in files."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


#: numpy's type of each number, little endian
NUMBERS: Mapping[ValueType, np.dtype[Any]] = MappingProxyType(
    {
        ValueType.U8: np.dtype("u1"),
        ValueType.I8: np.dtype("i1"),
        ValueType.U16: np.dtype("<u2"),
        ValueType.I16: np.dtype("<i2"),
        ValueType.U32: np.dtype("<u4"),
        ValueType.I32: np.dtype("<i4"),
        ValueType.F32: np.dtype("<f4"),
        ValueType.BOOL: np.dtype("?"),
        ValueType.U64: np.dtype("<u8"),
        ValueType.I64: np.dtype("<i8"),
        ValueType.F64: np.dtype("<f8"),
    }
)
_FLOATS = {ValueType.F32: "<f", ValueType.F64: "<d"}
_LENGTH = struct.Struct("<Q")
_LENGTH_BIG = struct.Struct(">Q")


class Strings(Sequence[str]):
    """A read-only array of texts, kept as the bytes of the file and decoded on access: about 12 bytes more than each text.

    Bytes that are not UTF-8 come out as lone surrogates (``surrogateescape``) and go back as they were: byte-level vocabularies
    of other converters hold cut characters. Equal to any list or tuple of the same texts.

    >>> words = Strings.of(["a", "bc"])
    >>> words[1], len(words), words == ["a", "bc"], words[::-1]
    ('bc', 2, True, ['bc', 'a'])
    """

    __slots__ = ("_big", "_data", "_ends")

    def __init__(self, data: memoryview | bytes, ends: array[int], *, big: bool = False) -> None:
        """data: every text with its length (u64) before it; ends: where each text ends in ``data``; big: lengths are big endian."""
        self._data = memoryview(data)
        self._ends = ends
        self._big = big

    @classmethod
    def of(cls, texts: Sequence[str]) -> Strings:
        """The array of these texts."""
        data = bytearray()
        ends = array("I")
        for text in texts:
            data += encode_text(text)
            ends.append(len(data))
        return cls(bytes(data), ends)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._text(place) for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        return self._text(place)

    def __iter__(self) -> Iterator[str]:
        data, begin = self._data, 0
        for end in self._ends:
            yield str(data[begin + 8 : end], "utf-8", "surrogateescape")
            begin = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Strings, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(text) for text in self[:3])
        return f"Strings([{shown}{', …' if len(self) > 3 else ''}], {len(self)} texts)"

    def tolist(self) -> list[str]:
        """All texts."""
        return list(self)

    def tobytes(self) -> bytes:
        """The texts as a little-endian file stores them, each with its length before it."""
        if not self._big:
            return bytes(self._data)
        data = bytearray(self._data)
        begin = 0
        for end in self._ends:
            _LENGTH.pack_into(data, begin, *_LENGTH_BIG.unpack_from(data, begin))
            begin = end
        return bytes(data)

    def _text(self, place: int) -> str:
        begin = self._ends[place - 1] if place else 0
        return str(self._data[begin + 8 : self._ends[place]], "utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True, eq=False)
class GgufValue:
    """One value. Scalars: ``int``, ``float``, ``bool`` or ``str``. Arrays: ``numpy.ndarray`` of numbers or bools, or ``Strings``.

    element: the type of an array's elements, None for scalars. Two values are equal if they have the same types and bytes.
    """

    type: ValueType
    value: Any
    element: ValueType | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GgufValue):
            return NotImplemented
        return (self.type, self.element) == (other.type, other.element) and encode_value(self) == encode_value(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def kind(self) -> str:
        """The type in words, as messages name it.

        >>> u32s([1, 2]).kind, string("x").kind
        ('array of u32', 'string')
        """
        return self.type.name.lower() if self.element is None else f"array of {self.element.name.lower()}"


def encode_text(text: str) -> bytes:
    """A length (u64) and UTF-8. Lone surrogates of ``surrogateescape`` become their bytes; InputError for others."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InputError(f"a text holds the lone surrogate {text[error.start]!r}", mend="mend the text") from error
    return _LENGTH.pack(len(data)) + data


def encode_value(value: GgufValue) -> bytes:
    """The bytes of a value in a little-endian file, its type (u32) first.

    Raises InputError where the value is not of its type.
    """
    head = struct.pack("<I", value.type)
    if value.type is ValueType.STRING:
        if not isinstance(value.value, str):
            raise InputError(f"{type(value.value).__name__} given, a string wanted", mend="pass the right type")
        return head + encode_text(value.value)
    if value.type is not ValueType.ARRAY:
        return head + _scalar_bytes(value.type, value.value)
    if value.element is None or value.element is ValueType.ARRAY:
        raise InputError("an array needs an element type, and not that of arrays", mend="give the type of its elements")
    if value.element is ValueType.STRING:
        texts = value.value if isinstance(value.value, Strings) else Strings.of(value.value)
        count, data = len(texts), texts.tobytes()
    else:
        held = _number_array(value.element, value.value)
        count, data = held.size, held.tobytes()
    return head + struct.pack("<IQ", value.element, count) + data


def _scalar_bytes(kind: ValueType, value: Any) -> bytes:
    if kind in _FLOATS:
        return struct.pack(_FLOATS[kind], _float(kind, value))
    return _integer(kind, value).to_bytes(NUMBERS[kind].itemsize, "little", signed=NUMBERS[kind].kind == "i")


def _float(kind: ValueType, value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise InputError(f"{value!r} is not a number", mend="pass a number")
    wide = float(value)
    if kind is ValueType.F64:
        return wide
    with np.errstate(over="ignore"):
        narrow = float(np.float32(wide))
    if math.isinf(narrow) and not math.isinf(wide):
        raise InputError(f"{wide} does not fit into f32", mend="pass a number of its range")
    return narrow


def _integer(kind: ValueType, value: Any) -> int:
    if kind is ValueType.BOOL:
        if not isinstance(value, (bool, np.bool_)):
            raise InputError(f"{value!r} is not a bool", mend="pass True or False")
        return int(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{value!r} is not an integer", mend="pass an integer")
    bounds = np.iinfo(NUMBERS[kind])
    if not bounds.min <= value <= bounds.max:
        raise InputError(f"{value} does not fit into {kind.name.lower()}", mend="pass a number of its range")
    return int(value)


def _number_array(kind: ValueType, values: ArrayLike) -> np.ndarray[Any, np.dtype[Any]]:
    wanted = NUMBERS[kind]
    held = np.asarray(values)
    if held.dtype == wanted and held.ndim == 1:
        return held
    if held.ndim != 1:
        raise InputError(f"an array of {held.ndim} dimensions, one wanted", mend="pass a flat list")
    if not held.size:
        return held.astype(wanted)
    if wanted.kind == "f":
        if held.dtype.kind not in "iuf":
            raise InputError(f"{held.dtype} values, numbers wanted", mend="pass numbers")
        with np.errstate(over="ignore"):
            cast = held.astype(wanted)
        fits = bool((np.isfinite(cast) == np.isfinite(held)).all())
    elif wanted.kind == "b":
        fits, cast = held.dtype.kind == "b", held.astype(wanted)
    else:
        bounds = np.iinfo(wanted)
        fits = held.dtype.kind in "iu" and int(held.min()) >= bounds.min and int(held.max()) <= bounds.max
        cast = held.astype(wanted) if fits else held
    if not fits:
        raise InputError(f"values do not fit into an array of {kind.name.lower()}", mend="pass values of its range")
    return cast


def numbers(kind: ValueType, values: ArrayLike) -> GgufValue:
    """An array of numbers or bools of this type. InputError where one does not fit."""
    held = _number_array(kind, values).copy()
    held.flags.writeable = False
    return GgufValue(ValueType.ARRAY, held, kind)


def _scalar(kind: ValueType, value: Any) -> GgufValue:
    number = _float(kind, value) if kind in _FLOATS else _integer(kind, value)
    return GgufValue(kind, bool(number) if kind is ValueType.BOOL else number)


def string(value: str) -> GgufValue:
    """A text."""
    encode_text(value)
    return GgufValue(ValueType.STRING, value)


def strings(values: Sequence[str]) -> GgufValue:
    """An array of texts."""
    return GgufValue(ValueType.ARRAY, Strings.of(values), ValueType.STRING)


def boolean(value: bool) -> GgufValue:
    """A bool."""
    return _scalar(ValueType.BOOL, value)


def booleans(values: ArrayLike) -> GgufValue:
    """An array of bools."""
    return numbers(ValueType.BOOL, values)


def u8(value: int) -> GgufValue:
    """An 8-bit unsigned integer. InputError where it does not fit."""
    return _scalar(ValueType.U8, value)


def u8s(values: ArrayLike) -> GgufValue:
    """An array of 8-bit unsigned integers."""
    return numbers(ValueType.U8, values)


def i8(value: int) -> GgufValue:
    """An 8-bit integer. InputError where it does not fit."""
    return _scalar(ValueType.I8, value)


def i8s(values: ArrayLike) -> GgufValue:
    """An array of 8-bit integers."""
    return numbers(ValueType.I8, values)


def u16(value: int) -> GgufValue:
    """A 16-bit unsigned integer. InputError where it does not fit."""
    return _scalar(ValueType.U16, value)


def u16s(values: ArrayLike) -> GgufValue:
    """An array of 16-bit unsigned integers."""
    return numbers(ValueType.U16, values)


def i16(value: int) -> GgufValue:
    """A 16-bit integer. InputError where it does not fit."""
    return _scalar(ValueType.I16, value)


def i16s(values: ArrayLike) -> GgufValue:
    """An array of 16-bit integers."""
    return numbers(ValueType.I16, values)


def u32(value: int) -> GgufValue:
    """A 32-bit unsigned integer. InputError where it does not fit."""
    return _scalar(ValueType.U32, value)


def u32s(values: ArrayLike) -> GgufValue:
    """An array of 32-bit unsigned integers."""
    return numbers(ValueType.U32, values)


def i32(value: int) -> GgufValue:
    """A 32-bit integer. InputError where it does not fit."""
    return _scalar(ValueType.I32, value)


def i32s(values: ArrayLike) -> GgufValue:
    """An array of 32-bit integers."""
    return numbers(ValueType.I32, values)


def u64(value: int) -> GgufValue:
    """A 64-bit unsigned integer. InputError where it does not fit."""
    return _scalar(ValueType.U64, value)


def u64s(values: ArrayLike) -> GgufValue:
    """An array of 64-bit unsigned integers."""
    return numbers(ValueType.U64, values)


def i64(value: int) -> GgufValue:
    """A 64-bit integer. InputError where it does not fit."""
    return _scalar(ValueType.I64, value)


def i64s(values: ArrayLike) -> GgufValue:
    """An array of 64-bit integers."""
    return numbers(ValueType.I64, values)


def f32(value: float) -> GgufValue:
    """A float32; the value is rounded to it."""
    return _scalar(ValueType.F32, value)


def f32s(values: ArrayLike) -> GgufValue:
    """An array of float32."""
    return numbers(ValueType.F32, values)


def f64(value: float) -> GgufValue:
    """A float64."""
    return _scalar(ValueType.F64, value)


def f64s(values: ArrayLike) -> GgufValue:
    """An array of float64."""
    return numbers(ValueType.F64, values)
