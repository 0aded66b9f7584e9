"""Code-book quantization in one pass over the weight, parallel over blocks, vectorised inside a block.

A block is read once for its magnitude and, while it is in the first cache, once more for its codes. With up to 16 entries the borders stay
in vector registers and four rounds of compare and select find the entry: no gathers, no branches. In larger tables the borders
below a value are counted.
Magnitudes are compared as integers, which orders floats of one sign and lets the maximum be vectorised without relaxed arithmetic:
nothing is reordered, so that codes equal those of ``Codebook`` bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from bitwright.core.scheme import Params, Scheme
from bitwright.schemes._books import middles
from bitwright.schemes.codebook import TINY, Codebook

__all__ = ["KERNEL", "encode"]

#: Blocks that a thread takes at a time.
_GROUP = 64
_TINY = np.float32(TINY)
_F0, _F1, _F2, _F4, _F8 = (np.float32(n) for n in (0, 1, 2, 4, 8))
_MAGNITUDE = np.int32(0x7FFFFFFF)


def _compile(function: Callable[..., None]) -> Any:
    return numba.njit(parallel=True, cache=True, error_model="numpy")(function)


@_compile
def _absmax(blocks, out):  # type: ignore[no-untyped-def]
    """The largest magnitude of every block, as the bits of a float32."""
    count, size = blocks.shape
    for group in numba.prange((count + _GROUP - 1) // _GROUP):
        start = group * _GROUP
        for i in range(min(_GROUP, count - start)):
            at = np.uint64(start + i)
            bits = blocks[at].view(np.int32)
            most = np.int32(0)
            for j in range(size):
                most = max(most, np.int32(bits[j] & _MAGNITUDE))
            out[at] = most


@_compile
def _sixteen(blocks, fit, divisor, borders, codes):  # type: ignore[no-untyped-def]
    """Codes of tables of 16; borders: (15,). With ``fit`` the magnitudes are found and stored in ``divisor``, else read from it."""
    count, size = blocks.shape
    for group in numba.prange((count + _GROUP - 1) // _GROUP):
        start = group * _GROUP
        found = np.empty(size, np.float32)
        most = np.empty(1, np.int32)
        b0, b1, b2, b3, b4 = borders[0], borders[1], borders[2], borders[3], borders[4]
        b5, b6, b7, b8, b9 = borders[5], borders[6], borders[7], borders[8], borders[9]
        b10, b11, b12, b13, b14 = borders[10], borders[11], borders[12], borders[13], borders[14]
        for i in range(min(_GROUP, count - start)):
            at = np.uint64(start + i)
            block = blocks[at]
            if fit:
                bits = block.view(np.int32)
                largest = np.int32(0)
                for j in range(size):
                    largest = max(largest, np.int32(bits[j] & _MAGNITUDE))
                most[0] = largest
                divisor[at] = most.view(np.float32)[0]
                inverse = _F1 / max(divisor[at], _TINY)
            else:
                inverse = _F1 / divisor[at]
            for j in range(size):
                x = block[j] * inverse
                # After each comparison the borders of the half that is left: 8 + 4 + 2 + 1.
                eight = x > b7
                c0 = b8 if eight else b0
                c1 = b9 if eight else b1
                c2 = b10 if eight else b2
                c3 = b11 if eight else b3
                c4 = b12 if eight else b4
                c5 = b13 if eight else b5
                c6 = b14 if eight else b6
                four = x > c3
                d0 = c4 if four else c0
                d1 = c5 if four else c1
                d2 = c6 if four else c2
                two = x > d1
                last = d2 if two else d0
                found[j] = (
                    (_F8 if eight else _F0)
                    + (_F4 if four else _F0)
                    + (_F2 if two else _F0)
                    + (_F1 if x > last else _F0)
                )
            out = codes[at]
            for j in range(size):
                out[j] = np.uint8(np.int32(found[j]))


@_compile
def _many(blocks, divisor, borders, codes):  # type: ignore[no-untyped-def]
    """Codes of tables of any size: how many borders lie below. At 255 borders three times as fast as a search in memory."""
    count, size = blocks.shape
    quads = len(borders) // 4
    for group in numba.prange((count + _GROUP - 1) // _GROUP):
        start = group * _GROUP
        x = np.empty(size, np.float32)
        below = np.empty(size, np.float32)
        for i in range(min(_GROUP, count - start)):
            at = np.uint64(start + i)
            block, out = blocks[at], codes[at]
            inverse = _F1 / divisor[at]
            for j in range(size):
                x[j] = block[j] * inverse
                below[j] = _F0
            for k in range(quads):
                b0, b1, b2, b3 = borders[4 * k], borders[4 * k + 1], borders[4 * k + 2], borders[4 * k + 3]
                for j in range(size):
                    below[j] += (
                        np.float32(x[j] > b0) + np.float32(x[j] > b1) + np.float32(x[j] > b2) + np.float32(x[j] > b3)
                    )
            for k in range(4 * quads, len(borders)):
                for j in range(size):
                    below[j] += np.float32(x[j] > borders[k])
            for j in range(size):
                out[j] = np.uint8(np.int32(below[j]))


def encode(w: torch.Tensor, scheme: Scheme, params: Params | None, prepared: Any) -> tuple[Params, torch.Tensor] | None:
    """Same contract as ``core.method.EncodeKernel``; knows code books whose blocks are all full."""
    if not isinstance(scheme, Codebook) or w.numel() % scheme.block_size:
        return None
    shape = (w.shape[0], w.shape[1])
    blocks = w.contiguous().view(-1, scheme.block_size).numpy()
    codes = torch.empty(shape, dtype=torch.uint8)
    out = codes.view(blocks.shape).numpy()
    table = scheme.table_for(w, prepared) if params is None else scheme.table_of(params)
    small = len(table) <= 16
    borders = np.full(15 if small else len(table) - 1, np.inf, np.float32)
    borders[: len(table) - 1] = middles(table).numpy()
    if params is not None:
        divisor = scheme.divisor(params).reshape(-1).numpy()
    else:
        scale = torch.empty(scheme.grid(shape))
        divisor = scale.view(-1).numpy()
        if not small:
            _absmax(blocks, divisor.view(np.int32))
    if small:
        _sixteen(blocks, params is None, divisor, borders, out)
    if params is None:
        params = scheme.finish(scheme.loose(scheme.checked(scale), table), shape)
    if not small:
        _many(blocks, np.where(divisor < 0, divisor, np.maximum(divisor, _TINY)), borders, out)
    return params, codes


KERNEL = encode
