"""Blocks as their fields, and back: what schemes and methods work on.

``split`` gives the float16 factors, the integer scales and the codes that a block stores, one array each; ``join`` is its exact inverse on
everything that ``split`` gives. No arithmetic happens here.

| types | fields |
|---|---|
| Q4_0, Q5_0, Q8_0, IQ4_NL | ``d`` float16 per block of 32 |
| Q4_1, Q5_1 | ``d``, ``m`` float16 per block of 32 |
| Q2_K, Q4_K, Q5_K | ``d``, ``dmin`` float16 per 256; ``scales``, ``mins`` uint8 per group |
| Q3_K, IQ4_XS | ``d`` float16 per 256; ``scales`` uint8 per group, 32 more than the factor that they stand for |
| Q6_K | ``d`` float16 per 256; ``scales`` int8 per group |

Codes are uint8, from 0 up: those of Q8_0 are the stored number plus 128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks._fields_kernels import KERNELS
from bitwright.blocks._numba import over_tiles, writable
from bitwright.blocks.codec import Bytes
from bitwright.blocks.types import named
from bitwright.errors import InputError

__all__ = ["KINDS", "Kind", "join", "shapes", "split"]

Fields = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a type stores.

    group: columns per scale, the inner one where there are two; levels: how many codes; middle: what is taken off a code; halves: names
    of the float16 fields, one per block; small: names of the integer fields, one per group; above: what is taken off a scale.
    """

    group: int
    levels: int
    middle: int
    halves: tuple[str, ...]
    small: tuple[str, ...] = ()
    above: int = 0


KINDS: Mapping[str, Kind] = {
    "Q4_0": Kind(32, 16, 8, ("d",)),
    "Q4_1": Kind(32, 16, 0, ("d", "m")),
    "Q5_0": Kind(32, 32, 16, ("d",)),
    "Q5_1": Kind(32, 32, 0, ("d", "m")),
    "Q8_0": Kind(32, 256, 128, ("d",)),
    "IQ4_NL": Kind(32, 16, 0, ("d",)),
    "Q2_K": Kind(16, 4, 0, ("d", "dmin"), ("scales", "mins")),
    "Q3_K": Kind(16, 8, 4, ("d",), ("scales",), above=32),
    "Q4_K": Kind(32, 16, 0, ("d", "dmin"), ("scales", "mins")),
    "Q5_K": Kind(32, 32, 0, ("d", "dmin"), ("scales", "mins")),
    "Q6_K": Kind(16, 64, 32, ("d",), ("scales",)),
    "IQ4_XS": Kind(32, 16, 0, ("d",), ("scales",), above=32),
}


def _arrays(name: str, fields: Fields, codes: Bytes) -> tuple[Any, ...]:
    """Flat arrays in the order in which the kernels take them; fields that a type has not are empty."""
    kind = KINDS[name]
    none = np.empty(0, np.uint8)
    halves = [fields[part].view(np.uint16) for part in kind.halves] + [np.empty(0, np.uint16)] * (2 - len(kind.halves))
    small = [fields[part].view(np.uint8) for part in kind.small] + [none] * (2 - len(kind.small))
    arrays: tuple[NDArray[Any], ...] = (*halves, *small, codes)
    return tuple(a.reshape(-1) for a in arrays)


def shapes(name: str, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], type]]:
    """Shape and dtype of every field. PlanError where blocks do not divide the columns."""
    kind, block = KINDS[name], named(name)
    block.row_bytes(columns)
    found: dict[str, tuple[tuple[int, int], type]] = dict.fromkeys(
        kind.halves, ((rows, columns // block.values), np.float16)
    )
    for part in kind.small:
        found[part] = ((rows, columns // kind.group), np.int8 if name == "Q6_K" else np.uint8)
    return found


def split(blocks: Bytes, name: str, columns: int) -> tuple[Fields, Bytes]:
    """Fields and codes ``(rows, columns)`` of ``blocks`` ``(rows, row bytes)``."""
    rows, kernels = len(blocks), KERNELS[name]
    fields: Fields = {part: np.empty(shape, dtype) for part, (shape, dtype) in shapes(name, rows, columns).items()}
    codes = np.empty((rows, columns), np.uint8)
    block = named(name)
    source = writable(np.ascontiguousarray(blocks))
    _run(kernels[0], codes.size // block.values, source, block.nbytes, _arrays(name, fields, codes))
    return fields, codes


def join(fields: Mapping[str, NDArray[Any]], codes: Bytes, name: str) -> Bytes:
    """The blocks ``(rows, row bytes)`` that hold these fields and codes ``(rows, columns)``."""
    rows, columns = codes.shape
    own: Fields = {}
    for part, (shape, dtype) in shapes(name, rows, columns).items():
        given = fields[part]
        if given.shape != shape or given.dtype != dtype:
            raise InputError(f"field '{part}' of {name} is {given.dtype} {given.shape}, not {np.dtype(dtype)} {shape}")
        own[part] = writable(np.ascontiguousarray(fields[part]))
    block = named(name)
    out = np.empty((rows, block.row_bytes(columns)), np.uint8)
    arrays = _arrays(name, own, writable(np.ascontiguousarray(codes)))
    _run(KERNELS[name][1], codes.size // block.values, out, block.nbytes, arrays)
    return out


def _run(kernel: Callable[..., None], count: int, blocks: Bytes, nbytes: int, arrays: tuple[Any, ...]) -> None:
    over_tiles(kernel, count, blocks.reshape(-1), nbytes, *arrays)
