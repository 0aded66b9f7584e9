"""IQ3, IQ2 and IQ1 types: vectors of four or eight values are points of a lattice, under a scale for every 16 or 32 values.

    IQ3_XXS, IQ3_S, IQ2_XXS, IQ2_XS, IQ2_S    w = d (s + 1/2) c * point * sign      (IQ3_S: d (2 s + 1))
    IQ1_S, IQ1_M                              w = d (2 s + 1) (point ± 1/8)

The search is in ``_lattice_fit`` (IQ1: ``lattice_iq1``); here its numbers become ggml's bytes, and bytes values. Types with seven sign
bits for eight values have an even number of minus signs, the eighth follows from the others. Super-blocks of 256 values.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks import lattice_iq1
from bitwright.blocks._check import refuse_overflow
from bitwright.blocks._lattice_fit import AGAIN_ALL, AGAIN_ANY, AGAIN_OFF, fit_tiles
from bitwright.blocks._lattice_tables import lattice, level_tables
from bitwright.blocks._numba import over_tiles, writable
from bitwright.blocks._vector import LANES
from bitwright.blocks.codec import Bytes, Decode, Floats, Quantize
from bitwright.blocks.types import TYPES

__all__ = ["DECODE", "QUANTIZE"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """What ``_lattice_fit.fit_tiles`` needs to know of a type."""

    dims: int
    group: int
    #: of the mean square in importance weights; of that in weights without importance
    sigma: float
    flat: float = 0.0
    #: largest magnitude below which a group is zero
    least: float
    #: what d is multiplied by before it is stored
    fudge: float = 1.0
    #: numerators of the inverse scales tried are odd + k step, k = -reach .. reach
    step: float
    reach: int
    parity: bool
    start: bool = False
    again: int = AGAIN_OFF


_SEARCH = {
    "IQ3_XXS": _Search(dims=4, group=32, sigma=2, least=1e-8, fudge=1.0125, step=0.2, reach=15, parity=True),
    # Only exact zeros are dead: no float32 but 0 is below the smallest one.
    "IQ3_S": _Search(
        dims=4, group=32, sigma=2, least=1e-45, fudge=1.033, step=0.2, reach=9, parity=False, again=AGAIN_ANY
    ),
    "IQ2_XXS": _Search(
        dims=8, group=32, sigma=1, least=1e-15, step=0.1, reach=6, parity=True, start=True, again=AGAIN_ALL
    ),
    "IQ2_XS": _Search(dims=8, group=16, sigma=1, least=1e-15, step=0.1, reach=9, parity=True),
    "IQ2_S": _Search(dims=8, group=16, sigma=2, flat=0.25, least=1e-8, fudge=0.9875, step=0.1, reach=9, parity=False),
}


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Rows of super-blocks: signs (n, 32) uint8, index (n, 256 / dims) uint16, sizes and alive (n, groups), half (n,) uint16."""

    signs: Bytes
    index: NDArray[np.uint16]
    sizes: Bytes
    alive: NDArray[np.bool_]
    half: NDArray[np.uint16]


def _fit(name: str, x: Floats, weights: Floats | None) -> _Fitted:
    search, table = _SEARCH[name], lattice(name)
    width, odd = (3, 15) if search.dims == 4 else (2, 5)
    trials = np.float32(odd) + np.arange(-search.reach, search.reach + 1).astype(np.float32) * np.float32(search.step)
    levels = level_tables(np.arange(1, 2 << width, 2, dtype=np.float32))
    count, groups = x.size // 256, 256 // search.group
    out = _Fitted(
        np.empty((count, 32), np.uint8),
        np.empty((count, 256 // search.dims), np.uint16),
        np.empty((count, groups), np.uint8),
        np.empty((count, groups), np.bool_),
        np.empty(count, np.uint16),
    )
    given = np.empty(0, np.float32) if weights is None else writable(weights)
    factors = tuple(np.float32(f) for f in (search.sigma, search.flat, search.least, search.fudge))
    into = (out.signs.reshape(-1), out.index.reshape(-1), out.sizes.reshape(-1), out.alive.reshape(-1), out.half)
    over_tiles(
        fit_tiles, -(-count // LANES), writable(x).reshape(-1), given, x.shape[1] // 256, (search.group, search.dims, width), factors,
        trials, (search.parity, search.start, search.again), (levels, table.place, table.lists, table.number), into,
    )  # fmt: skip
    refuse_overflow(name, x, out.half[:, None])
    return out


# --- numbers to bytes ---------------------------------------------------------------------------------------------------------


def _sevens(signs: Bytes, sizes: Bytes) -> Bytes:
    """Four times seven sign bits and a scale of four bits in 32 bits, little endian."""
    four = signs.reshape(len(signs), -1, 4).astype(np.uint32)
    word = four[..., 0] | four[..., 1] << 7 | four[..., 2] << 14 | four[..., 3] << 21 | sizes.astype(np.uint32) << 28
    return word.view(np.uint8)


def _nibbles(sizes: Bytes) -> Bytes:
    return sizes[:, ::2] | sizes[:, 1::2] << np.uint8(4)


def _pack_iq3_xxs(fitted: _Fitted) -> Bytes:
    return np.concatenate((fitted.index.astype(np.uint8), _sevens(fitted.signs, fitted.sizes)), axis=1)


def _pack_iq3_s(fitted: _Fitted) -> Bytes:
    index, signs = fitted.index, fitted.signs
    high = np.packbits((index >> 8).astype(np.uint8).reshape(len(index), -1, 8), axis=2, bitorder="little")[..., 0]
    low = index.astype(np.uint8)
    if not fitted.alive.all():
        # ggml does not leave room for groups of zeros: those that follow move up in indices and signs, not in the high bits.
        order = np.argsort(~fitted.alive, axis=1, kind="stable")[..., None]
        low = np.take_along_axis(low.reshape(len(low), 8, 8), order, 1).reshape(len(low), 64)
        signs = np.take_along_axis(signs.reshape(len(low), 8, 4), order, 1).reshape(len(low), 32)
    return np.concatenate((low, high, signs, _nibbles(fitted.sizes)), axis=1)


def _pack_iq2_xxs(fitted: _Fitted) -> Bytes:
    count = len(fitted.index)
    index = fitted.index.astype(np.uint8).reshape(count, 8, 4)
    return np.concatenate((index, _sevens(fitted.signs, fitted.sizes).reshape(count, 8, 4)), axis=2).reshape(count, 64)


def _pack_iq2_xs(fitted: _Fitted) -> Bytes:
    words = fitted.index | fitted.signs.astype(np.uint16) << 9
    return np.concatenate((words.view(np.uint8), _nibbles(fitted.sizes)), axis=1)


def _pack_iq2_s(fitted: _Fitted) -> Bytes:
    four = (fitted.index >> 8).astype(np.uint8).reshape(-1, 8, 4)
    high = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
    return np.concatenate((fitted.index.astype(np.uint8), fitted.signs, high, _nibbles(fitted.sizes)), axis=1)


_PACK = {
    "IQ3_XXS": _pack_iq3_xxs,
    "IQ3_S": _pack_iq3_s,
    "IQ2_XXS": _pack_iq2_xxs,
    "IQ2_XS": _pack_iq2_xs,
    "IQ2_S": _pack_iq2_s,
}


def _quantizer(name: str) -> Quantize:
    def run(x: Floats, weights: Floats | None) -> Bytes:
        fitted = _fit(name, x, weights)
        blocks = np.concatenate((fitted.half[:, None].view(np.uint8), _PACK[name](fitted)), axis=1)
        return blocks.reshape(x.shape[0], TYPES[name].row_bytes(x.shape[1]))

    return run


# --- bytes to values ----------------------------------------------------------------------------------------------------------


@functools.cache
def _sign_table(even: bool) -> Floats:
    """(256 or 128, 8): 1 or -1 for the bits of a byte; with ``even`` the eighth makes the number of minus signs even."""
    bits = np.arange(128 if even else 256)[:, None] >> np.arange(8) & 1
    if even:
        bits[:, 7] = bits[:, :7].sum(1) & 1
    return (1 - 2 * bits).astype(np.float32)


def _half(blocks: Bytes) -> Floats:
    return blocks[:, :2].copy().view(np.float16).astype(np.float32)


def _words(part: Bytes, kind: type[np.generic]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(part).view(kind).astype(np.uint32)


def _both(nibbles: Bytes) -> Floats:
    return np.stack((nibbles & 15, nibbles >> 4), axis=2).reshape(len(nibbles), -1).astype(np.float32)


@np.errstate(over="ignore", invalid="ignore")
def _values(
    name: str, scale: Floats, index: NDArray[np.integer[Any]], signs: NDArray[np.integer[Any]], columns: int
) -> Floats:
    """scale: (n, groups); index: (n, vectors); signs: (n, 32) bytes or seven-bit numbers."""
    points = lattice(name).points
    groups = scale.shape[1]
    signed = points[index].reshape(-1, groups, 256 // groups // 8, 8)
    out: Floats = (scale[:, :, None, None] * signed) * _sign_table(_SEARCH[name].parity)[signs].reshape(signed.shape)
    return out.reshape(-1, columns)


_HALF, _QUARTER = np.float32(0.5), np.float32(0.25)
_SEVENS = np.arange(0, 28, 7, dtype=np.uint32)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq3_xxs(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 98)
    words = _words(b[:, 66:], np.uint32)
    signs = (words[..., None] >> _SEVENS & 127).reshape(-1, 32)
    scale = _half(b) * (_HALF + (words >> 28).astype(np.float32)) * _HALF
    return _values("IQ3_XXS", scale, b[:, 2:66], signs, columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq3_s(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 110)
    index = b[:, 2:66].astype(np.uint16) | np.unpackbits(b[:, 66:74], axis=1, bitorder="little").astype(np.uint16) << 8
    scale = _half(b) * (1 + 2 * _both(b[:, 106:]))
    return _values("IQ3_S", scale, index, b[:, 74:106], columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq2_xxs(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 66)
    parts = b[:, 2:].reshape(-1, 8, 8)
    words = _words(parts[..., 4:], np.uint32).reshape(-1, 8)
    signs = (words[..., None] >> _SEVENS & 127).reshape(-1, 32)
    scale = _half(b) * (_HALF + (words >> 28).astype(np.float32)) * _QUARTER
    return _values("IQ2_XXS", scale, parts[..., :4].reshape(-1, 32), signs, columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq2_xs(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 74)
    words = _words(b[:, 2:66], np.uint16)
    scale = _half(b) * (_HALF + _both(b[:, 66:])) * _QUARTER
    return _values("IQ2_XS", scale, words & 511, words >> 9, columns)


@np.errstate(over="ignore", invalid="ignore")
def _from_iq2_s(blocks: Bytes, columns: int) -> Floats:
    b = blocks.reshape(-1, 82)
    high = (b[:, 66:74, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(-1, 32).astype(np.uint16)
    scale = _half(b) * (_HALF + _both(b[:, 74:])) * _QUARTER
    return _values("IQ2_S", scale, b[:, 2:34] | high << 8, b[:, 34:66], columns)


QUANTIZE: Mapping[str, Quantize] = {**{name: _quantizer(name) for name in _SEARCH}, **lattice_iq1.QUANTIZE}
DECODE: Mapping[str, Decode] = {
    "IQ3_XXS": _from_iq3_xxs,
    "IQ3_S": _from_iq3_s,
    "IQ2_XXS": _from_iq2_xxs,
    "IQ2_XS": _from_iq2_xs,
    "IQ2_S": _from_iq2_s,
    **lattice_iq1.DECODE,
}
