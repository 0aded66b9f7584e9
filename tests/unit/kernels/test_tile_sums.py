"""Tile sums in one pass against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.core.method import TileSums
from bitwright.kernels import numba_tiles, reference
from bitwright.schemes.affine import Affine

KERNELS = {"reference": reference.tile_sums, "numba": numba_tiles.tile_sums}
SCHEMES = [
    Affine(bits=4, group_size=16),
    Affine(bits=2, group_size=8, symmetric=False, scale_dtype="float32"),
    Affine(bits=8, granularity="channel", symmetric_range="narrow", scale_dtype="bfloat16"),
    Affine(bits=3, granularity="channel", symmetric=False, zero_min=1),
    Affine(bits=5, group_size=1, scale_dtype="float32"),
]


def weight(rows, columns=48):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def expected(w, weights, scheme, params) -> TileSums:
    """By nearest code among all of them, in float64."""
    span = scheme.span(w.shape[1])
    tiles = w.double().numpy().reshape(len(w), -1, span)
    h = (
        np.broadcast_to(weights.double().numpy(), w.shape).reshape(tiles.shape)
        if weights is not None
        else np.ones(tiles.shape)
    )
    scale = params["scale"].double().numpy()[..., None]
    zero = params["zero"].double().numpy()[..., None] if "zero" in params else float(2 ** (scheme.bits - 1))
    every = np.arange(scheme.low, scheme.levels) - np.broadcast_to(zero, scale.shape)  # (rows, tiles, levels)
    nearest = np.abs(tiles[..., None] - (every * scale)[:, :, None, :]).argmin(-1)
    steps = np.take_along_axis(every, nearest, axis=-1)
    return TileSums(*((h * part).sum(-1) for part in ((tiles - steps * scale) ** 2, tiles * steps, steps**2)))


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.describe())
@pytest.mark.parametrize("name", KERNELS)
def test_sums_are_those_of_float64(name, scheme, rows, weighed):
    w = weight(rows)
    weights = torch.rand(48, generator=torch.Generator().manual_seed(1)) if weighed else None
    params = scheme.fit(w, clip=0.8)
    found = KERNELS[name](w, weights, scheme, params)
    assert found is not None
    wanted = expected(w, weights, scheme, params)
    for part in ("error", "above", "below"):
        value = getattr(found, part)
        assert value.dtype == torch.float32
        assert value.shape == params["scale"].shape
        limit = np.abs(getattr(wanted, part)) * 2e-5 + 1e-7
        assert (np.abs(value.double().numpy() - getattr(wanted, part)) <= limit).all(), part


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_are_left_alone_and_may_be_views(name):
    scheme, w = SCHEMES[0], weight(9)
    weights = torch.rand(96, generator=torch.Generator().manual_seed(1))[::2]
    params = scheme.fit(w)
    plain = KERNELS[name](w, weights.clone(), scheme, params)
    turned = w.T.contiguous().T
    before = [turned.clone(), weights.clone(), params["scale"].clone()]
    again = KERNELS[name](turned, weights, scheme, params)
    for part in ("error", "above", "below"):  # torch sums a view in another order
        torch.testing.assert_close(getattr(plain, part), getattr(again, part))
    assert all(torch.equal(a, b) for a, b in zip(before, (turned, weights, params["scale"]), strict=True))


def test_a_row_s_sums_do_not_depend_on_its_neighbours():
    scheme, w = SCHEMES[0], weight(130)
    params = scheme.fit(w)
    whole = numba_tiles.tile_sums(w, None, scheme, params)
    one = numba_tiles.tile_sums(w[77:78], None, scheme, {"scale": params["scale"][77:78]})
    assert whole is not None
    assert one is not None
    assert torch.equal(whole.error[77:78], one.error)


@pytest.mark.parametrize("name", KERNELS)
def test_schemes_whose_tiles_span_rows_are_left_to_the_generic_path(name):
    scheme, w = Affine(granularity="tensor"), weight(4)
    assert KERNELS[name](w, None, scheme, scheme.fit(w)) is None
