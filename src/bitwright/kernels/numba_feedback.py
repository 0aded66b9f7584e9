"""GPTQ's inner loop on the CPU: parallel over tiles of rows, vectorised across the rows of a tile.

The block arrives transposed, ``(columns, rows)``, so that neighbouring rows are neighbours in memory: each step of the
sequential column loop is one run of vector operations over a tile's rows. A row's arithmetic is the same whatever the tile
or thread count, so the codes do not depend on either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from bitwright.core.scheme import AffineCodec, Codec

__all__ = ["KERNEL", "feedback_block"]

_ROW_TILE = 64  # 64 rows x 128 columns of float32 are 32 KiB: one L1 cache


def _compile(function: Callable[..., None]) -> Any:
    # contract: a*b+c as one fused operation; the reference differs by the last bit only.
    return numba.njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")(function)


@numba.njit(cache=True, error_model="numpy")
def _half(x):  # type: ignore[no-untyped-def]
    """A float32 number rounded to float16, ties to even; infinite where it overflows."""
    size = abs(x)
    if size >= np.float32(65520.0):
        return np.float32(np.copysign(np.inf, x))
    if size < np.float32(2.0**-14):  # subnormal: steps of 2^-24
        return np.float32(np.rint(x * np.float32(2.0**24)) * np.float32(2.0**-24))
    exponent = math.frexp(x)[1]
    return np.float32(math.ldexp(np.rint(math.ldexp(np.float64(x), 11 - exponent)), exponent - 11))


@numba.njit(cache=True, error_model="numpy")
def _keep(keep, targets, weights, error, errors):  # type: ignore[no-untyped-def]
    """Replace the errors of the outliers of one column by what rounding them to float16 leaves."""
    for r in range(len(keep)):
        if keep[r]:
            error[r] = weights[r] - _half(targets[r])
            errors[r] = error[r]


@_compile
def _affine(targets, weights, feedback, keep, scale, zero, low, high, codes, errors):  # type: ignore[no-untyped-def]
    block, rows = targets.shape
    tiles = (rows + _ROW_TILE - 1) // _ROW_TILE
    for tile in numba.prange(tiles):
        start = tile * _ROW_TILE
        stop = min(start + _ROW_TILE, rows)
        width = stop - start
        local = np.empty((block, _ROW_TILE), np.float32)
        error = np.empty(_ROW_TILE, np.float32)
        for j in range(block):
            for r in range(width):
                local[j, r] = targets[j, start + r]
        for j in range(block):
            for r in range(width):
                s = scale[j, start + r]
                z = zero[j, start + r]
                code = np.float32(np.rint(local[j, r] / s + z))
                code = min(max(code, low), high)
                codes[j, start + r] = np.uint8(code)
                error[r] = weights[j, start + r] - (code - z) * s
                errors[j, start + r] = error[r]
            if len(keep):
                _keep(keep[j, start:stop], local[j], weights[j, start:stop], error, errors[j, start:stop])
            for k in range(j + 1, block):
                f = feedback[j, k]
                for r in range(width):
                    local[k, r] += f * error[r]


@_compile
def _table(targets, weights, feedback, keep, scale, table, middles, codes, errors):  # type: ignore[no-untyped-def]
    block, rows = targets.shape
    tiles = (rows + _ROW_TILE - 1) // _ROW_TILE
    for tile in numba.prange(tiles):
        start = tile * _ROW_TILE
        stop = min(start + _ROW_TILE, rows)
        width = stop - start
        local = np.empty((block, _ROW_TILE), np.float32)
        error = np.empty(_ROW_TILE, np.float32)
        for j in range(block):
            for r in range(width):
                local[j, r] = targets[j, start + r]
        for j in range(block):
            for r in range(width):
                s = scale[j, start + r]
                x = local[j, r] / s
                code = 0
                for m in range(len(middles)):
                    code += x > middles[m]
                codes[j, start + r] = np.uint8(code)
                error[r] = weights[j, start + r] - table[code] * s
                errors[j, start + r] = error[r]
            if len(keep):
                _keep(keep[j, start:stop], local[j], weights[j, start:stop], error, errors[j, start:stop])
            for k in range(j + 1, block):
                f = feedback[j, k]
                for r in range(width):
                    local[k, r] += f * error[r]


def feedback_block(
    targets: torch.Tensor,
    weights: torch.Tensor,
    feedback: torch.Tensor,
    codec: Codec,
    columns: torch.Tensor,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as ``reference.feedback_block``; inputs are left as they were."""
    block, rows = targets.shape
    codes = torch.empty(block, rows, dtype=torch.uint8)
    errors = torch.empty(block, rows)
    tiles = codec.tile[columns]
    scale = codec.scale.T[tiles].contiguous().numpy()
    kept = np.empty((0, 0), np.bool_) if keep is None else keep.contiguous().numpy()
    arrays = (targets.contiguous().numpy(), weights.contiguous().numpy(), feedback.contiguous().numpy(), kept, scale)
    if isinstance(codec, AffineCodec):
        zero = codec.zero.T[tiles].contiguous().numpy()
        low, high = np.float32(codec.low), np.float32(codec.high)
        _affine(*arrays, zero, low, high, codes.numpy(), errors.numpy())
    else:
        table = codec.table.numpy().astype(np.float32)
        middles = ((table[1:] + table[:-1]) / np.float32(2)).astype(np.float32)
        _table(*arrays, table, middles, codes.numpy(), errors.numpy())
        if codec.codes is not None:
            codes = codec.codes[codes.long()]
    return codes, errors


KERNEL = feedback_block
