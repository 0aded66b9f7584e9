"""Histogram, moments, moving ranges and shares against numpy, scipy and torch.ao, in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.stats import SIMPLE, Histogram, Moments, MovingMinMax, ShareAbove
from bitwright.errors import InputError

COLUMNS = 24
KINDS = [Histogram, Moments, MovingMinMax, ShareAbove]


def activations(tokens: int = 300, columns: int = COLUMNS, *, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Of unequal size and heavy-tailed, with exact zeros."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=rng) / torch.rand(tokens, columns, generator=rng).clamp_min(0.01)
    x[torch.rand(tokens, columns, generator=rng) < 0.1] = 0
    return (x * torch.logspace(-2, 1, columns)).to(dtype)


def state(stat) -> dict[str, object]:
    found = {field.name: getattr(stat, field.name) for field in dataclasses.fields(stat)}
    return {key: copy.copy(getattr(value, "tolist", lambda value=value: value)()) for key, value in found.items()}


def filled(kind, *parts: torch.Tensor):
    stat = kind(parts[0].shape[1])
    for part in parts:
        stat.update(part)
    return stat


# --- all of them ---------------------------------------------------------------------------------------------------------


def test_all_can_be_asked_for_by_name():
    assert all(SIMPLE[kind.name] is kind for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_order_equals_one_pass_and_leaves_the_other_alone(kind):
    parts = activations().split(100)
    whole, merged, second = filled(kind, *parts), filled(kind, parts[0]), filled(kind, *parts[1:])
    before = state(second)
    merged.merge(second)
    assert state(second) == before
    if kind is Moments:
        for name in ("mean", "m2", "m3", "m4"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=0)
        assert merged.count == whole.count
    else:
        assert state(merged) == state(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_without_tokens_change_nothing(kind):
    stat = filled(kind, torch.zeros(0, COLUMNS), activations())
    before = state(stat)
    stat.update(torch.zeros(0, COLUMNS))
    stat.merge(kind(COLUMNS))
    assert state(stat) == before
    empty = kind(COLUMNS)
    empty.merge(stat)
    assert state(empty) == before


@pytest.mark.parametrize("shape", [(4, COLUMNS + 1), (4, 1), (COLUMNS,), (2, 4, COLUMNS)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_are_refused(kind, shape):
    stat = kind(COLUMNS)
    with pytest.raises(InputError, match=rf"expects \(tokens, {COLUMNS}\)"):
        stat.update(torch.zeros(shape))
    assert stat.count == 0


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_other_widths_or_kinds_do_not_merge(kind):
    for columns in (1, COLUMNS + 1):
        with pytest.raises(InputError, match="cannot merge"):
            kind(COLUMNS).merge(kind(columns))
    other = ShareAbove if kind is not ShareAbove else Moments
    with pytest.raises(InputError, match="cannot merge"):
        kind(COLUMNS).merge(other(COLUMNS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone(kind, dtype):
    x = activations(dtype=dtype)
    before = x.clone()
    kind(COLUMNS).update(x)
    assert torch.equal(x, before)


# --- histogram -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bins", [4, 256, 2048])
def test_histogram_counts_like_numpy(dtype, bins):
    x = activations(dtype=dtype)
    seen = Histogram(COLUMNS, bins=bins)
    for part in x.split(70):
        seen.update(part)
    a = x.double().numpy()
    assert bins * seen.width / 2 <= np.abs(a).max() < bins * seen.width
    edges = np.arange(bins + 1) * seen.width
    np.testing.assert_array_equal(seen.counts[0], np.histogram(a[a > 0], edges)[0])
    np.testing.assert_array_equal(seen.counts[1], np.histogram(-a[a < 0], edges)[0])
    assert seen.zeros == (a == 0).sum()
    assert (seen.low, seen.high) == (a.min(), a.max())
    assert (seen.total, seen.lost) == (a.size, 0)
    np.testing.assert_array_equal(seen.magnitudes, np.histogram(np.abs(a[a != 0]), edges)[0])


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 40))
def test_histogram_depends_neither_on_batches_nor_on_the_order_of_merging(values, first, second):
    x = torch.tensor(values, dtype=torch.float32)[:, None]
    first, second = sorted((first, second))
    parts = [x[:first], x[first:second], x[second:]]
    whole = filled(Histogram, x)
    assert state(filled(Histogram, *reversed(parts))) == state(whole)
    a, b, c = (filled(Histogram, part) for part in parts)
    c.merge(a)
    b.merge(c)
    assert state(b) == state(whole)
    assert whole.total == len(values)


def test_a_value_at_the_edge_opens_the_next_width():
    seen = Histogram(1, bins=4)
    seen.update(torch.tensor([[3.999]]))
    assert seen.width == 1.0
    seen.update(torch.tensor([[4.0]]))
    assert seen.width == 2.0
    assert seen.counts.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_extreme_magnitudes_have_a_place():
    seen = filled(Histogram, torch.tensor([[1e-45, -1e-45, 0.0, -0.0]]))
    assert (seen.counts[:, 0].tolist(), seen.zeros) == ([1, 1], 2)
    seen.update(torch.tensor([[3.4e38, -3.4e38, 1.0, -1.0]]))
    assert seen.counts[:, 0].tolist() == [2, 2]
    assert int(seen.counts[:, 1024:].sum()) == 2


def test_values_that_are_not_finite_are_counted_apart():
    x = activations()
    clean = filled(Histogram, x[1:])
    x[0] = torch.tensor([math.nan, math.inf, -math.inf] * 8)
    seen = filled(Histogram, x)
    assert (seen.lost, seen.count) == (24, 300)
    assert torch.equal(seen.counts, clean.counts)
    assert (seen.low, seen.high) == (clean.low, clean.high)
    assert filled(Histogram, x[:1]).total == 0


def test_share_above_is_exact_at_edges_and_close_inside_bins():
    x = activations(3000)
    seen = filled(Histogram, x)
    a = np.abs(x.double().numpy())
    for edge in (1, 17, 1000):
        exact = float((a >= edge * seen.width).mean())
        assert seen.share_above(edge * seen.width) == pytest.approx(exact, abs=1e-12)
        inside = seen.share_above((edge + 0.5) * seen.width)
        assert float((a > (edge + 1) * seen.width).mean()) <= inside <= exact
    assert seen.share_above(1e30) == 0
    assert seen.share_above(0.0) == pytest.approx(float((a > 0).mean()))
    assert Histogram(3).share_above(1.0) == 0


def test_bins_must_be_a_power_of_two():
    for bins in (0, 1, 3, 2000):
        with pytest.raises(InputError, match="power of two"):
            Histogram(4, bins=bins)
    with pytest.raises(InputError, match="cannot merge"):
        Histogram(4, bins=8).merge(Histogram(4, bins=16))


# --- moments ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("split", [1, 70, 300, 10_000])
def test_moments_are_those_of_scipy(dtype, split):
    x = activations(600, dtype=dtype)
    seen = filled(Moments, *x.split(split))
    a = x.double().numpy()
    np.testing.assert_allclose(seen.mean, a.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen.variance, a.var(0), rtol=1e-10)
    np.testing.assert_allclose(seen.kurtosis, scipy.stats.kurtosis(a, 0, fisher=False), rtol=1e-9)
    np.testing.assert_allclose(seen.m3 / 600, scipy.stats.moment(a, 3), rtol=1e-7, atol=1e-9 * np.abs(a).max() ** 3)
    mean, sigma, kurtosis = seen.overall()
    assert mean == pytest.approx(a.mean(), rel=1e-9)
    assert sigma == pytest.approx(a.std(), rel=1e-10)
    assert kurtosis == pytest.approx(scipy.stats.kurtosis(a, None, fisher=False), rel=1e-9)


def test_a_large_mean_does_not_swallow_the_variance():
    rng = np.random.default_rng(0)
    a = 1e6 + rng.standard_normal((4000, 2)) * 1e-2
    seen = filled(Moments, *torch.from_numpy(a).split(7))
    centred = a - 1e6
    np.testing.assert_allclose(seen.variance, centred.var(0), rtol=1e-6)
    np.testing.assert_allclose(seen.kurtosis, scipy.stats.kurtosis(centred, 0, fisher=False), rtol=1e-5)


def test_constants_have_no_kurtosis():
    seen = filled(Moments, torch.full((5, 2), 3.0))
    assert seen.overall()[:2] == (3.0, 0.0)
    assert math.isnan(seen.overall()[2])
    assert bool(seen.kurtosis.isnan().all())
    assert Moments(2).overall()[:2] == (0.0, 0.0)


# --- moving ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.01, 0.3, 1.0])
def test_moving_average_is_that_of_torch(factor):
    parts = activations().split(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=factor)
        for part in parts:
            observer(part)
    low, high = filled(MovingMinMax, *parts).average(factor)
    assert low == pytest.approx(float(observer.min_val), rel=1e-5)
    assert high == pytest.approx(float(observer.max_val), rel=1e-5)


def test_moving_average_weighs_the_merged_as_the_later():
    early, late = filled(MovingMinMax, torch.tensor([[0.0, 1.0]])), filled(MovingMinMax, torch.tensor([[0.0, 3.0]]))
    early.merge(late)
    assert early.average(0.25) == (0.0, 1.5)


# --- shares ----------------------------------------------------------------------------------------------------------------


def test_shares_are_counted_exactly():
    x = activations()
    seen = ShareAbove(COLUMNS, threshold=2.0)
    for part in x.split(70):
        seen.update(part)
    above = np.abs(x.numpy()) > 2.0
    np.testing.assert_array_equal(seen.value, above.mean(0))
    assert seen.overall == above.mean()
    assert ShareAbove(COLUMNS).overall == 0
    with pytest.raises(InputError, match="cannot merge"):
        seen.merge(ShareAbove(COLUMNS))
