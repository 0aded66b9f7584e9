"""What all block quantizers share: how they are compiled, rounding to float16, and moving blocks into lanes and back.

No ``fastmath``: ggml's x86-64 reference has no fused multiply-add and sums left to right, and one last bit more or less in a sum
may choose another code. Nothing here or in the modules that use it may be contracted or reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np

from bitwright.blocks._vector import (
    LANES,
    bits,
    number,
    offset_to,
    select,
    to_float,
    transpose,
    transpose_bytes,
)

__all__ = [
    "bring", "compiled", "from_half", "half_bits", "half_value", "over_tiles", "parallel", "put", "scratch", "starts_of",
    "to_half", "writable",
]  # fmt: skip


def compiled(function: Callable[..., Any]) -> Any:
    """Machine code for a part of a quantizer, cached on disk; it runs without Python's lock."""
    return _whole_cache(numba.njit(cache=True, nogil=True, error_model="numpy")(function))


def parallel(function: Callable[..., Any]) -> Any:
    """Machine code for a loop over tiles, ``numba.prange``, cached on disk. What a tile gives depends on no other tile."""
    return _whole_cache(numba.njit(parallel=True, cache=True, error_model="numpy")(function))


def _whole_cache(function: Any) -> Any:
    """Numba looks for changes in a function's own file. Quantizers contain parts of others, so that all files of the folder count."""
    file = getattr(getattr(function, "_cache", None), "_cache_file", None)
    if file is not None:
        file._source_stamp = (file._source_stamp, _SOURCES)
    return function


_SOURCES = tuple((f.name, f.stat().st_mtime, f.stat().st_size) for f in sorted(Path(__file__).parent.glob("*.py")))


def over_tiles(run: Callable[..., None], tiles: int, *arguments: Any) -> None:
    """``run(begin, end, *arguments)``, compiled, over pieces of ``range(tiles)``, on as many threads as numba may use.

    What a tile gives depends on no other tile. Plain threads, because ``prange`` costs about a second of compilation in every
    quantizer that has one.
    """
    pieces = min(numba.get_num_threads() * _PIECES, tiles)
    if pieces <= _PIECES:
        run(0, tiles, *arguments)
        return
    bounds = [tiles * i // pieces for i in range(pieces + 1)]
    with ThreadPoolExecutor(pieces // _PIECES) as pool:
        for done in [pool.submit(run, bounds[i], bounds[i + 1], *arguments) for i in range(pieces)]:
            done.result()


#: Pieces per thread, so that a thread that others disturb holds nobody up.
_PIECES = 8


def writable(x: Any) -> Any:
    """The array, or a copy of one that may not be written to: to numba that is another type, and another compilation."""
    return x if x.flags.writeable else x.copy()


# --- float16 ------------------------------------------------------------------------------------------------------------------

_HALF = np.int32(0x3F000000)  # 0.5, whose last bit is worth 2^-24, float16's smallest step


@compiled
def half_bits(v):  # type: ignore[no-untyped-def]
    """Vector of float32 -> vector of int32 with the bits of the nearest float16, ties to even; infinite where it overflows."""
    whole = bits(v)
    sign = (whole >> 16) & 0x8000
    size = whole & 0x7FFFFFFF
    normal = (
        size + (((size >> 13) & 1) - np.int32(0x37FFF001))
    ) >> 13  # exponent - 112, rounded up by the half step below
    subnormal = bits(number(size) + np.float32(0.5)) - _HALF
    found = select(size < np.int32(0x38800000), subnormal, normal)
    found = select(size >= np.int32(0x47800000), 0x7C00, found)
    return sign | select(size > np.int32(0x7F800000), 0x7E00, found)


@compiled
def half_value(h):  # type: ignore[no-untyped-def]
    """Vector of float16 bits -> the float32 values."""
    sign = (h & 0x8000) << 16
    size = h & 0x7FFF
    normal = (size << 13) + np.int32(112 << 23)
    found = select(size >= 0x7C00, normal + np.int32(112 << 23), normal)
    return number(sign | select(size < 0x0400, bits(to_float(size) * np.float32(2.0**-24)), found))


@compiled
def to_half(x):  # type: ignore[no-untyped-def]
    """Bits of the float16 nearest to a float32 number, ties to even; infinite where it overflows.

    >>> hex(to_half(np.float32(1.0))), hex(to_half(np.float32(65520.0))), hex(to_half(np.float32(-3e-8)))
    ('0x3c00', '0x7c00', '0x8001')
    """
    whole = np.int64(np.float32(x).view(np.uint32))
    sign = (whole >> 16) & 0x8000
    size = whole & 0x7FFFFFFF
    if size > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if size >= 0x47800000:
        return np.uint16(sign | 0x7C00)
    if size < 0x38800000:
        return np.uint16(sign | np.int64(np.rint(abs(np.float64(x)) * np.float64(2.0**24))))
    return np.uint16(sign | ((size + ((size >> 13) & 1) + 0xFFF - (112 << 23)) >> 13))


@compiled
def from_half(h):  # type: ignore[no-untyped-def]
    """The float32 value of float16 bits.

    >>> from_half(0x3C00), from_half(0x8001) * 2.0**24
    (1.0, -1.0)
    """
    whole = np.int64(h)
    size = whole & 0x7FFF
    if size < 0x0400:
        value = np.float32(np.float32(size) * np.float32(2.0**-24))
    else:
        more = (224 if size >= 0x7C00 else 112) << 23
        value = np.uint32((size << 13) + more).view(np.float32)
    return np.float32(-value) if whole & 0x8000 else value


# --- tiles: LANES blocks side by side -----------------------------------------------------------------------------------------


@compiled
def starts_of(first, count, size):  # type: ignore[no-untyped-def]
    """Where the blocks ``first .. first + LANES`` begin in a flat array; past the last block the last one again.

    Lanes that hold the same block compute the same and write the same bytes to the same place, so that no tile is a special case.
    """
    starts = np.empty(LANES, np.int64)
    for lane in range(LANES):
        starts[lane] = min(first + lane, count - 1) * size
    return starts


@compiled
def scratch(values):  # type: ignore[no-untyped-def]
    """A flat float32 array whose vectors do not straddle cache lines."""
    whole = np.empty(values + 16, np.float32)
    begin = offset_to(whole, 64)
    return whole[begin : begin + values]


@compiled
def bring(source, starts, values, target):  # type: ignore[no-untyped-def]
    """``values`` (a multiple of LANES) values of every block into lanes, ``target[i * LANES + lane]``."""
    for element in range(0, values, LANES):
        transpose(source, starts, element, target, element * LANES)


@compiled
def put(source, nbytes, target, starts):  # type: ignore[no-untyped-def]
    """Bytes in lanes, ``source[i * LANES + lane]``, into their blocks of ``nbytes`` >= LANES bytes; the last step overlaps."""
    for element in range(0, nbytes - LANES + 1, LANES):
        transpose_bytes(source, element * LANES, target, starts, element)
    last = nbytes - LANES
    transpose_bytes(source, last * LANES, target, starts, last)
