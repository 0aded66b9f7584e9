"""Encode every tile under given parameters and sum up the outcome in one pass over the weight, parallel over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from bitwright.core.method import TileSums
from bitwright.core.scheme import Params, Scheme
from bitwright.schemes.affine import Affine

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


def tile_sums(w: torch.Tensor, weights: torch.Tensor | None, scheme: Scheme, params: Params) -> TileSums | None:
    """Same contract as ``core.method.TileKernel``; knows affine schemes whose tiles lie in one row."""
    if not isinstance(scheme, Affine) or scheme.tile.rows != 1:
        return None
    rows, columns = w.shape
    span = scheme.span(columns)
    scale = params["scale"].float().contiguous()
    zero = params["zero"].float() if "zero" in params else torch.full_like(scale, scheme.middle)
    importance = torch.ones(columns) if weights is None else weights.float().contiguous()
    out = [torch.empty(rows, columns // span) for _ in range(3)]
    _affine(
        w.contiguous().numpy(), importance.numpy(), scale.numpy(), zero.contiguous().numpy(), np.float32(scheme.low),
        np.float32(scheme.levels - 1), span, *(tensor.numpy() for tensor in out),
    )  # fmt: skip
    return TileSums(*out)


KERNEL = tile_sums
