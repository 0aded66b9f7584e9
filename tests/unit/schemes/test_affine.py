"""Affine integers against their formulas, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.scheme import Limits
from bitwright.errors import NumericError, PlanError
from bitwright.schemes.affine import Affine
from bitwright.schemes.affine_indexed import AffineIndexed

BITS = (2, 3, 4, 5, 6, 8)


def weight(rows=8, columns=256, *, seed=0, scale=0.02):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def tiles_of(w: torch.Tensor, scheme: Affine) -> np.ndarray:
    """(tiles, elements) float64, row by row."""
    values = w.double().numpy()
    if scheme.granularity == "tensor":
        return values.reshape(1, -1)
    return values.reshape(-1, scheme.group_size if scheme.granularity == "group" else values.shape[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric_range", ["full", "narrow"])
def test_symmetric_conventions(bits, granularity, symmetric_range):
    scheme = Affine(
        bits=bits, granularity=granularity, group_size=64, symmetric_range=symmetric_range, scale_dtype="float32"
    )
    w = weight(seed=bits)
    params, codes = scheme.quantize(w)
    tiles = tiles_of(w, scheme)
    half = 2 ** (bits - 1)
    low = -half if symmetric_range == "full" else -half + 1
    top = np.abs(tiles).max(axis=1, keepdims=True)
    scale = top / ((2**bits - 1) / 2) if symmetric_range == "full" else top / (half - 1)
    np.testing.assert_allclose(params["scale"].double().numpy().reshape(-1, 1), scale, rtol=3e-7)
    steps = np.clip(np.rint(tiles / scale), low, half - 1)
    got = codes.numpy().astype(np.int64).reshape(tiles.shape) - half
    # A value on a rounding border may fall either way in float32; nothing else may differ.
    border = np.abs(np.abs(tiles / scale - np.floor(tiles / scale)) - 0.5) < 1e-4
    assert ((got == steps) | border).all()
    assert got.min() >= low
    decoded = scheme.decode(codes, params).double().numpy().reshape(tiles.shape)
    np.testing.assert_allclose(decoded, got * scale, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("offset", [0.0, 0.05, -0.05])
def test_asymmetric_convention(bits, granularity, offset):
    scheme = Affine(bits=bits, symmetric=False, granularity=granularity, group_size=32, scale_dtype="float32")
    w = weight(seed=bits) + offset
    params, codes = scheme.quantize(w)
    tiles = tiles_of(w, scheme)
    low = np.minimum(tiles.min(axis=1, keepdims=True), 0)
    high = np.maximum(tiles.max(axis=1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    np.testing.assert_allclose(params["scale"].double().numpy().reshape(-1, 1), scale, rtol=5e-7)
    zero = params["zero"].numpy().astype(np.int64).reshape(-1, 1)
    assert (np.abs(zero - (-low / scale)) <= 0.5 + 1e-4).all()
    decoded = scheme.decode(codes, params).double().numpy().reshape(tiles.shape)
    # Rounding the zero point shifts the range by up to half a step, so an end may miss by one step; inside it is half a
    # step.
    assert (np.abs(decoded - tiles) <= scale * (1 + 1e-4)).all()


@pytest.mark.parametrize("group_size", [1, 8, 32, 64, 96, 128, 384])
def test_any_divisor_is_a_group_size(group_size):
    scheme = Affine(group_size=group_size, scale_dtype="float32")
    w = weight(4, 384)
    params, codes = scheme.quantize(w)
    assert params["scale"].shape == (4, 384 // group_size)
    assert codes.dtype == torch.uint8
    bound = params["scale"].float().repeat_interleave(group_size, dim=1) * 0.5001
    assert ((scheme.decode(codes, params) - w).abs() <= bound).all()


def test_a_group_size_that_does_not_divide_names_one_that_does():
    with pytest.raises(PlanError, match="group_size 100"):
        Affine(group_size=128).grid((8, 4100))


def test_codes_are_chosen_with_the_stored_scale():
    """With scales in bfloat16 (8 bits of mantissa) the codes of the float32 scale would often be wrong by one."""
    scheme = Affine(bits=8, group_size=64, scale_dtype="bfloat16")
    w = weight(16, 512)
    params, codes = scheme.quantize(w)
    stored = params["scale"].double().repeat_interleave(64, dim=1)
    expected = torch.clamp(torch.round(w.double() / stored) + 128, 0, 255)
    assert int((codes.double() - expected).abs().max()) <= 1
    assert float((codes.double() == expected).double().mean()) > 0.999


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("low", [0.0, 0.5, -0.001])
def test_zero_min_keeps_zero_points_away_from_zero(bits, low):
    free = Affine(bits=bits, symmetric=False, group_size=32)
    bound = free.limit(Limits(scale_dtype=torch.float16, zero_min=1))
    assert bound.zero_min == 1
    w = torch.rand(16, 128, generator=torch.Generator().manual_seed(1)) + low
    params, codes = bound.quantize(w)
    assert int(params["zero"].min()) >= 1
    assert int(free.fit(w)["zero"].min()) == 0
    # The range is widened below, so that the largest value is not clipped.
    error = (bound.decode(codes, params) - w).abs()
    assert (error <= params["scale"].float().repeat_interleave(32, dim=1) * 0.55).all()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    zero_min=st.sampled_from([0, 1]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    rows=st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=True), min_size=8, max_size=8), min_size=1, max_size=4
    ),
)
def test_any_finite_weight_gives_finite_stable_codes(bits, symmetric, zero_min, dtype, rows):
    scheme = Affine(bits=bits, symmetric=symmetric, group_size=4, scale_dtype=dtype, zero_min=zero_min)
    w = torch.tensor(rows, dtype=torch.float32)
    params, codes = scheme.quantize(w)
    decoded = scheme.decode(codes, params)
    assert torch.isfinite(decoded).all()
    assert bool((params["scale"] > 0).all())
    assert torch.equal(scheme.encode(decoded, params), codes)
    if not symmetric and zero_min:
        assert int(params["zero"].min()) >= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_represented_exactly(symmetric):
    scheme = Affine(symmetric=symmetric, group_size=8)
    w = torch.tensor([[0.0, 0.3, 0.7, 0.9, 0.0, 0.2, 1.0, 0.5], [0.0] * 8])
    params, codes = scheme.quantize(w)
    decoded = scheme.decode(codes, params)
    assert (decoded[w == 0] == 0).all()


def test_small_tiles_keep_their_resolution_in_float16():
    """At 8 bits a tile with max|w| = 0.001 wants a scale of 7.8e-6, which is a subnormal float16 (6.1e-5 is the
    smallest normal).

    A scale clamped to normal numbers would leave 33 of 256 levels and eight times the error.
    """
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    w = w / w.abs().amax(dim=1, keepdim=True) * 1e-3
    half, full = (Affine(bits=8, group_size=128, scale_dtype=d) for d in ("float16", "float32"))
    errors = []
    for scheme in (half, full):
        params, codes = scheme.quantize(w)
        errors.append(float((scheme.decode(codes, params) - w).square().mean().sqrt()))
    assert errors[0] < 1.1 * errors[1]


def test_a_scale_beyond_float16_is_an_error_that_names_the_way_out():
    w = weight(2, 64, scale=1.0)
    w[1, 3] = 1e6
    with pytest.raises(NumericError, match="overflows float16") as caught:
        Affine(group_size=64).quantize(w)
    assert "bfloat16" in caught.value.mend
    wide = Affine(group_size=64, scale_dtype="bfloat16")
    params, codes = wide.quantize(w)
    assert torch.isfinite(wide.decode(codes, params)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_numbers_are_an_error(bad, symmetric):
    w = weight(2, 64)
    w[0, 5] = bad
    with pytest.raises(NumericError):
        Affine(group_size=64, symmetric=symmetric).fit(w)


def test_refit_finds_the_least_squares_scale():
    scheme = Affine(bits=3, group_size=32, scale_dtype="float32")
    w, weights = weight(4, 64), torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    params, codes = scheme.quantize(w)
    better = scheme.refit(w, codes, params, weights=weights)
    steps = codes.double().view(4, 2, 32) - 4
    target, importance = w.double().view(4, 2, 32), weights.double().view(1, 2, 32)
    expected = (importance * steps * target).sum(-1) / (importance * steps * steps).sum(-1)
    torch.testing.assert_close(better["scale"].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 7}, "7"),
        ({"bits": 1}, "1"),
        ({"group_size": 0}, "group_size"),
        ({"granularity": "row"}, "granularity"),
        ({"scale_dtype": "int8"}, "scale_dtype"),
        ({"zero_min": 16}, "zero_min"),
    ],
)
def test_impossible_schemes_are_refused(options, match):
    with pytest.raises(PlanError, match=match):
        Affine(**options)


def test_an_empty_weight_is_refused():
    with pytest.raises(PlanError, match="empty"):
        Affine().grid((0, 128))


def test_bits_per_weight_counts_scales_and_zero_points():
    assert Affine().bits_per_weight((1024, 1024)) == 4 + 16 / 128
    assert Affine(symmetric=False, group_size=32).bits_per_weight((64, 64)) == 4 + 20 / 32
    assert Affine(bits=8, granularity="channel").bits_per_weight((64, 256)) == 8 + 16 / 256


def test_an_index_names_the_group_of_every_column():
    scheme = AffineIndexed(bits=4, group_size=2, scale_dtype="float32")
    params = {
        "scale": torch.tensor([[1.0, 10.0]]),
        "zero": torch.tensor([[8, 0]], dtype=torch.uint8),
        "g_idx": torch.tensor([1, 0, 0, 1], dtype=torch.int32),
    }
    codes = torch.tensor([[3, 3, 9, 15]], dtype=torch.uint8)
    decoded = scheme.decode(codes, params)
    assert decoded.tolist() == [[30.0, -5.0, 1.0, 150.0]]
    assert torch.equal(scheme.encode(decoded, params), codes)
    codec = scheme.codec(params, (1, 4))
    assert torch.equal((codes.float() - codec.zero[:, codec.tile]) * codec.scale[:, codec.tile], decoded)
    with pytest.raises(PlanError, match="reading"):
        scheme.fit(decoded)
