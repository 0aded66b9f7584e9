"""Parameter search against brute force and closed forms in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bitwright.core.method import Context
from bitwright.core.stats import Gram
from bitwright.errors import InputError
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.kernels.numba_tiles import tile_sums
from bitwright.methods.rtn import Rtn
from bitwright.methods.search import Search
from bitwright.schemes.affine import Affine

FAST = Context(feedback=feedback_block, tile_sums=tile_sums)
GENERIC = replace(FAST, tile_sums=None)

SCHEMES = [
    Affine(group_size=32, scale_dtype="float32"),
    Affine(bits=2, group_size=16),
    Affine(bits=3, symmetric=False, group_size=32, scale_dtype="float32"),
    Affine(bits=4, symmetric=False, group_size=32, zero_min=1),
    Affine(bits=8, granularity="channel", symmetric_range="narrow"),
    Affine(bits=3, granularity="tensor", scale_dtype="bfloat16"),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.describe()} {s.scale_dtype}")


def weight(rows=24, columns=96, *, seed=0):
    """Heavy tails, so that clipping pays."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=rng)
    return (w * w.abs()) * 0.02


def gram(columns=96, *, seed=1):
    """Column importances over three orders of magnitude."""
    rng = torch.Generator().manual_seed(seed)
    found = Gram(columns)
    found.update(torch.randn(64, columns, generator=rng) * (10 ** torch.linspace(-1, 0.5, columns)))
    return found


def tiles_of(values: torch.Tensor, scheme: Affine) -> np.ndarray:
    """(tiles, elements) float64."""
    values = values.double().numpy()
    if scheme.granularity == "tensor":
        return values.reshape(1, -1)
    return values.reshape(-1, scheme.span(values.shape[1]))


def errors_of(w, decoded, importance, scheme) -> np.ndarray:
    """Weighted squared error of every tile, in float64."""
    return tiles_of((w.double() - decoded.double()).square() * importance.double(), scheme).sum(1)


@pytest.mark.parametrize("context", [FAST, GENERIC], ids=["kernel", "generic"])
@schemes
def test_no_tile_is_worse_than_rounding_or_than_any_clipped_range(scheme, context):
    w, stats = weight(), gram()
    importance = stats.mean_square
    found = Search(steps=10).quantize(w, {"gram": stats}, scheme, context).tensor
    mine = errors_of(w, found.decode(), importance, scheme)
    rtn = errors_of(w, Rtn().quantize(w, {}, scheme, context).tensor.decode(), importance, scheme)
    assert (mine <= rtn * (1 + 1e-5)).all()
    for clip in np.linspace(1.0, 0.5, 11):
        params = scheme.fit(w, clip=float(clip))
        candidate = errors_of(w, scheme.decode(scheme.encode(w, params), params), importance, scheme)
        assert (mine <= candidate * (1 + 1e-5)).all(), clip


def test_an_outlier_costs_its_group_less_than_with_rounding():
    scheme = Affine(bits=3, group_size=64)
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    w[:, 11] = 0.11
    searched = Search().quantize(w, {}, scheme, FAST).tensor.decode()
    rounded = Rtn().quantize(w, {}, scheme, FAST).tensor.decode()
    rest = [c for c in range(64) if c != 11]
    mine, theirs = (w - searched).square(), (w - rounded).square()
    assert (mine.sum(1) < theirs.sum(1)).all()
    assert mine.sum() < 0.9 * theirs.sum()
    assert mine[:, rest].sum() < 0.8 * theirs[:, rest].sum()


@pytest.mark.parametrize("scheme", SCHEMES[:5], ids=lambda s: s.describe())
def test_importance_steers_the_choice(scheme):
    w, stats = weight(), gram()
    importance = stats.mean_square
    told = Search().quantize(w, {"gram": stats}, scheme, FAST).tensor.decode()
    untold = Search().quantize(w, {}, scheme, FAST).tensor.decode()
    plain = torch.ones(96)
    assert errors_of(w, told, importance, scheme).sum() < errors_of(w, untold, importance, scheme).sum()
    assert errors_of(w, untold, plain, scheme).sum() < errors_of(w, told, plain, scheme).sum()


@schemes
def test_kernel_and_generic_path_agree(scheme):
    w, stats = weight(rows=64), gram()
    fast = Search().quantize(w, {"gram": stats}, scheme, FAST).tensor
    generic = Search().quantize(w, {"gram": stats}, scheme, GENERIC).tensor
    a, b = (errors_of(w, q.decode(), stats.mean_square, scheme) for q in (fast, generic))
    # Two candidates may be so close that float32 sums order them either way; the price is the same then.
    np.testing.assert_allclose(a, b, rtol=2e-4)
    same = torch.isclose(fast.params["scale"].float(), generic.params["scale"].float(), rtol=1e-4)
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("context", [FAST, GENERIC], ids=["kernel", "generic"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_refit_is_weighted_least_squares_for_the_rounded_codes(symmetric, context, weighed):
    scheme = Affine(bits=3, symmetric=symmetric, group_size=32, scale_dtype="float32")
    w, stats = weight(), gram()
    importance = stats.mean_square if weighed else torch.ones(96)
    given = {"gram": stats} if weighed else {}
    rtn = Rtn().quantize(w, {}, scheme, context).tensor
    found = Search(steps=0, refits=1).quantize(w, given, scheme, context).tensor
    zero = rtn.params["zero"].double() if "zero" in rtn.params else torch.full(rtn.params["scale"].shape, 4.0)
    tiles = tiles_of(w, scheme)
    h = tiles_of(importance.expand(w.shape), scheme)
    steps = tiles_of(rtn.codes.double(), scheme) - zero.numpy().reshape(-1, 1)
    best = (h * steps * tiles).sum(1) / (h * steps**2).sum(1)
    kept = rtn.params["scale"].double().numpy().ravel()
    scale = found.params["scale"].double().numpy().ravel()
    moved = scale != kept
    assert moved.mean() > 0.9  # the refit is dropped only where new codes under it are worse
    np.testing.assert_allclose(scale[moved], best[moved], rtol=1e-5)
    if not symmetric:
        assert torch.equal(found.params["zero"], rtn.params["zero"])


def test_without_steps_and_refits_it_is_rounding():
    w = weight()
    for scheme in SCHEMES:
        found = Search(steps=0, refits=0).quantize(w, {"gram": gram()}, scheme, FAST).tensor
        assert found.equals(Rtn().quantize(w, {}, scheme, FAST).tensor)


def test_more_refits_never_lose():
    w, stats, scheme = weight(), gram(), SCHEMES[1]
    losses = [
        errors_of(
            w, Search(refits=n).quantize(w, {"gram": stats}, scheme, FAST).tensor.decode(), stats.mean_square, scheme
        )
        for n in (0, 1, 2, 4, 8)
    ]
    assert all((b <= a * (1 + 1e-5)).all() for a, b in pairwise(losses))
    assert losses[-1].sum() < losses[0].sum()


@schemes
def test_the_result_does_not_depend_on_the_row_chunks(scheme):
    w, stats = weight(rows=23), gram()
    whole = Search(chunk_rows=512).quantize(w, {"gram": stats}, scheme, FAST).tensor
    for rows in (5, 23):
        assert Search(chunk_rows=rows).quantize(w, {"gram": stats}, scheme, FAST).tensor.equals(whole)


def test_a_gram_matrix_without_energy_counts_as_none():
    w, scheme, silent = weight(), SCHEMES[0], Gram(96)
    silent.update(torch.zeros(4, 96))
    assert (
        Search()
        .quantize(w, {"gram": silent}, scheme, FAST)
        .tensor.equals(Search().quantize(w, {}, scheme, FAST).tensor)
    )


def test_a_group_without_energy_stays_usable():
    w, scheme, stats = weight(), SCHEMES[0], gram()
    stats.matrix[:32] = 0
    stats.matrix[:, :32] = 0
    found = Search().quantize(w, {"gram": stats}, scheme, FAST).tensor
    assert torch.isfinite(found.decode()).all()
    rtn = Rtn().quantize(w, {}, scheme, FAST).tensor
    assert torch.equal(found.params["scale"][:, 0], rtn.params["scale"][:, 0])


def test_zero_and_constant_tiles_stay_finite_and_exact():
    scheme = Affine(group_size=32, symmetric=False, scale_dtype="float32")
    w = weight()
    w[0] = 0
    w[1] = 0.25
    found = Search().quantize(w, {"gram": gram()}, scheme, FAST).tensor.decode()
    assert torch.equal(found[0], w[0])
    torch.testing.assert_close(found[1], w[1])


@pytest.mark.parametrize(
    "options", [{"steps": -1}, {"smallest": 0.0}, {"smallest": 1.5}, {"refits": -1}, {"chunk_rows": 0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        Search(**options)
