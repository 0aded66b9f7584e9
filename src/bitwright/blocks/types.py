"""Names, numbers and sizes of ggml's tensor types; the one place where a block's byte size is written.

Source: the GGUF specification and ggml's type table (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bitwright.errors import InputError, PlanError

__all__ = ["TYPES", "BlockType", "by_number", "named"]


@dataclass(frozen=True, slots=True)
class BlockType:
    """One ggml type. number: its id in files; values: how many weights one block holds; nbytes: bytes of one block.

    >>> TYPES["Q4_K"].row_bytes(512)
    288
    """

    name: str
    number: int
    values: int
    nbytes: int
    #: True where it cannot be quantized without importance weights
    wants_weights: bool = False
    #: True for plain integers, which hold no weights
    integer: bool = False

    @property
    def blocked(self) -> bool:
        """True for types that pack several weights into one block; False for plain numbers."""
        return self.values > 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.values

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of this many columns. PlanError where blocks do not divide it."""
        if columns % self.values:
            raise PlanError(
                f"{columns} columns are not a multiple of the {self.values} values of a {self.name} block",
                mend="use a type with smaller blocks for this tensor (Q8_0, Q4_0, IQ4_NL: 32), or F16",
            )
        return columns // self.values * self.nbytes


def _table() -> dict[str, BlockType]:
    rows = (
        # name, number, values, bytes
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1),
        ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18),
        ("Q2_0", 42, 64, 18),
    )  # fmt: skip
    wanting = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"}
    return {
        name: BlockType(name, number, values, size, name in wanting, name[0] == "I" and name[1:].isdigit())
        for name, number, values, size in rows
    }


#: Every type by name.
TYPES: Mapping[str, BlockType] = MappingProxyType(_table())
_BY_NUMBER = {block.number: block for block in TYPES.values()}


def by_number(number: int) -> BlockType:
    """The type with this id. InputError where there is none."""
    found = _BY_NUMBER.get(number)
    if found is None:
        raise InputError(f"tensor type {number} is unknown", mend="the file is damaged, or newer than this release")
    return found


def named(name: str) -> BlockType:
    """The type with this name, in any case. InputError, with the known ones, where there is none."""
    found = TYPES.get(name.upper())
    if found is None:
        raise InputError(f"tensor type '{name}' is unknown", mend=f"use one of: {', '.join(TYPES)}")
    return found
