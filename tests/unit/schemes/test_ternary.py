"""Ternary and binary weights against the formulas of their papers, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.core.method import Context
from bitwright.core.stats import Gram
from bitwright.errors import NumericError, PlanError
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.kernels.numba_tiles import tile_sums
from bitwright.layouts.native import Native
from bitwright.methods.gptq import Gptq
from bitwright.methods.rtn import Rtn
from bitwright.methods.search import Search
from bitwright.schemes.binary import Binary
from bitwright.schemes.ternary import Ternary

CONTEXT = Context(feedback=feedback_block, tile_sums=tile_sums)
GRAINS = [{"group_size": 32}, {"granularity": "channel"}, {"granularity": "tensor"}]
grains = pytest.mark.parametrize("grain", GRAINS, ids=str)
kinds = pytest.mark.parametrize("kind", [Ternary, Binary])


def weight(rows=24, columns=128, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def tiles_of(w: torch.Tensor, grain) -> np.ndarray:
    values = w.double().numpy()
    if grain.get("granularity") == "tensor":
        return values.reshape(1, -1)
    return values.reshape(-1, grain.get("group_size", values.shape[1]))


@grains
def test_ternary_is_round_clip_of_the_mean(grain):
    """arXiv:2402.17764, eq. 1-3."""
    w = weight()
    scheme = Ternary(scale_dtype="float32", **grain)
    params, codes = scheme.quantize(w)
    tiles = tiles_of(w, grain)
    gamma = np.abs(tiles).mean(1, keepdims=True)
    np.testing.assert_allclose(params["scale"].numpy().reshape(-1, 1), gamma, rtol=1e-6)
    signs = np.clip(np.rint(tiles / gamma), -1, 1)
    assert np.array_equal(codes.numpy().reshape(tiles.shape), signs + 1)
    np.testing.assert_allclose(scheme.decode(codes, params).numpy().reshape(tiles.shape), signs * gamma, rtol=1e-6)


@grains
def test_binary_is_the_sign_times_the_mean(grain):
    """arXiv:1603.05279, eq. 6."""
    w = weight()
    scheme = Binary(scale_dtype="float32", **grain)
    params, codes = scheme.quantize(w)
    tiles = tiles_of(w, grain)
    expected = np.sign(tiles) * np.abs(tiles).mean(1, keepdims=True)
    np.testing.assert_allclose(scheme.decode(codes, params).numpy().reshape(tiles.shape), expected, rtol=1e-6)
    assert set(codes.unique().tolist()) == {0, 1}


def test_the_searched_ternary_scale_of_normal_weights_is_the_best_one():
    """Normal weights: the squared error 1 - 4 a p(a/2) ... is least at 1.224 sigma, which is 1.534 times the mean magnitude."""
    w = weight(4, 200_000, seed=3)
    scheme = Ternary(granularity="channel", scale_dtype="float32")
    found = Search().quantize(w, {}, scheme, CONTEXT).tensor.params["scale"][:, 0].numpy() / 0.02
    grid = np.linspace(0.5, 2.0, 301)
    values = w[0].double().numpy() / 0.02
    errors = [np.square(values - a * np.clip(np.rint(values / a), -1, 1)).mean() for a in grid]
    best = grid[int(np.argmin(errors))]
    assert best == pytest.approx(1.224, abs=0.02)
    np.testing.assert_allclose(found, best, atol=0.03)


@kinds
def test_search_loses_less_than_the_mean_where_inputs_differ(kind):
    w, scheme = weight(), kind(group_size=64)
    gram = Gram(128)
    gram.update(torch.randn(300, 128, generator=torch.Generator().manual_seed(1)) * 10 ** torch.linspace(-1, 1, 128))
    h = gram.mean_square.double()
    losses = []
    for method in (Rtn(), Search()):
        decoded = method.quantize(w, {"gram": gram}, scheme, CONTEXT).tensor.decode()
        losses.append(float(((w - decoded).double().square() * h).sum()))
    assert losses[1] < 0.98 * losses[0]


def test_refitted_binary_scales_are_weighted_means():
    w, scheme = weight(), Binary(group_size=32, scale_dtype="float32")
    h = torch.rand(128, generator=torch.Generator().manual_seed(1))
    params, codes = scheme.quantize(w)
    found = scheme.refit(w, codes, params, weights=h)["scale"].double().numpy()
    importance = h.double().numpy().reshape(1, 4, 32)
    expected = (np.abs(tiles_of(w, {"group_size": 32})).reshape(24, 4, 32) * importance).sum(-1) / importance.sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@kinds
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_loses_much_less_than_rounding(kind, act_order):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=rng) @ torch.randn(8, 128, generator=rng) + torch.randn(600, 128, generator=rng)
    gram, w, scheme = Gram(128), weight(48), kind(group_size=32)
    gram.update(x)
    losses = []
    for method in (Gptq(act_order=act_order), Rtn()):
        e = (w - method.quantize(w, {"gram": gram}, scheme, CONTEXT).tensor.decode()).double()
        losses.append(float((e @ gram.matrix.double() * e).sum()))
    assert losses[0] < 0.6 * losses[1]


@kinds
@pytest.mark.parametrize("clip", ["minmax", "search"])
def test_pruned_rows_stay_zero_under_gptq(kind, clip):
    gram, w = Gram(128), weight()
    gram.update(torch.randn(300, 128, generator=torch.Generator().manual_seed(1)))
    w[5] = 0
    decoded = Gptq(clip=clip).quantize(w, {"gram": gram}, kind(group_size=32), CONTEXT).tensor.decode()
    assert not decoded[5].any()
    assert torch.isfinite(decoded).all()


@kinds
def test_sizes_are_those_of_native_files(kind):
    scheme = kind(group_size=64)
    stored = Native().tensors("m", scheme, (64, 512))
    size = 8 * sum(spec.nbytes for spec in stored if not spec.name.endswith(".shape"))
    assert scheme.bits_per_weight((64, 512)) * 64 * 512 == size
    assert scheme.bits_per_weight((64, 512)) == {Ternary: 2.25, Binary: 1.25}[kind]


@kinds
def test_scales_that_overflow_are_refused(kind):
    with pytest.raises(NumericError, match="overflows"):
        kind().quantize(weight() * 1e8)


@kinds
@pytest.mark.parametrize("options", [{"group_size": 0}, {"granularity": "row"}, {"scale_dtype": "int8"}])
def test_options_out_of_range_are_refused(kind, options):
    with pytest.raises(PlanError):
        kind(**options)
