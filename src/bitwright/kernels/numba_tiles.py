"""Encode every tile under given parameters and sum up the outcome in one pass over the weight, parallel over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from bitwright.core.method import TileSums
from bitwright.core.scheme import AffineCodec, Params, Scheme

__all__ = ["KERNEL", "tile_sums"]


def _compile(function: Callable[..., None]) -> Any:
    # reassoc: sums run in vector lanes. A row's lanes do not depend on the thread count, so neither does the result.
    flags = {"contract", "reassoc", "nsz"}
    return numba.njit(parallel=True, cache=True, fastmath=flags, error_model="numpy")(function)


@_compile
def _affine(w, weights, scale, zero, low, high, span, error, above, below):  # type: ignore[no-untyped-def]
    rows, columns = w.shape
    tiles = columns // span
    for row in numba.prange(rows):
        for tile in range(tiles):
            s = scale[row, tile]
            z = zero[row, tile]
            e = np.float32(0.0)
            a = np.float32(0.0)
            b = np.float32(0.0)
            for j in range(tile * span, tile * span + span):
                x = w[row, j]
                h = weights[j]
                step = min(max(np.float32(np.rint(x / s + z)), low), high) - z
                d = step * s - x
                e += h * d * d
                a += h * step * x
                b += h * step * step
            error[row, tile] = e
            above[row, tile] = a
            below[row, tile] = b


@_compile
def _table(w, weights, scale, table, middles, span, error, above, below):  # type: ignore[no-untyped-def]
    rows, columns = w.shape
    tiles = columns // span
    for row in numba.prange(rows):
        index = np.empty(span, np.int32)
        for tile in range(tiles):
            s = scale[row, tile]
            start = tile * span
            index[:] = 0
            for m in range(len(middles)):
                middle = middles[m]
                for j in range(span):
                    index[j] += w[row, start + j] / s > middle
            e = np.float32(0.0)
            a = np.float32(0.0)
            b = np.float32(0.0)
            for j in range(span):
                x = w[row, start + j]
                h = weights[start + j]
                step = table[index[j]]
                d = step * s - x
                e += h * d * d
                a += h * step * x
                b += h * step * step
            error[row, tile] = e
            above[row, tile] = a
            below[row, tile] = b


def tile_sums(w: torch.Tensor, weights: torch.Tensor | None, scheme: Scheme, params: Params) -> TileSums | None:
    """Same contract as ``core.method.TileKernel``; knows every scheme whose tiles lie in one row, through its codec."""
    if not scheme.by_rows((w.shape[0], w.shape[1])):
        return None
    rows, columns = w.shape
    span = scheme.span(columns)
    codec = scheme.codec(params, (rows, columns))
    if codec.scale.shape != (rows, columns // span):
        return None
    importance = torch.ones(columns) if weights is None else weights.float().contiguous()
    out = [torch.empty(rows, columns // span) for _ in range(3)]
    arrays = (w.contiguous().numpy(), importance.numpy(), codec.scale.contiguous().numpy())
    sums = tuple(tensor.numpy() for tensor in out)
    if isinstance(codec, AffineCodec):
        low, high = np.float32(codec.low), np.float32(codec.high)
        _affine(*arrays, codec.zero.contiguous().numpy(), low, high, span, *sums)
    else:
        table = codec.table.numpy().astype(np.float32)
        middles = ((table[1:] + table[:-1]) / np.float32(2)).astype(np.float32)
        _table(*arrays, table, middles, span, *sums)
    return TileSums(*out)


KERNEL = tile_sums
