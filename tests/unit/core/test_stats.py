"""Statistics against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.core.stats import AbsMax, CrossGram, Gram, MeanAbs, MinMax, accumulate_product
from bitwright.engine.collect import fast_accumulate
from bitwright.errors import InputError

COLUMNS = 24
SIMPLE = [Gram, AbsMax, MeanAbs, MinMax]


def activations(tokens=300, columns=COLUMNS, *, seed=0, dtype=torch.float32):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-2, 2, columns) + 0.1).to(dtype)


def values(stat) -> dict[str, np.ndarray]:
    names = {
        "gram": ["matrix"],
        "drift": ["matrix"],
        "abs_max": ["value"],
        "mean_abs": ["value"],
        "min_max": ["low", "high"],
    }
    return {name: getattr(stat, name).double().numpy().copy() for name in names[stat.name]}


def expected(kind, x: torch.Tensor) -> dict[str, np.ndarray]:
    a = x.double().numpy()
    return {
        Gram: lambda: {"matrix": a.T @ a},
        AbsMax: lambda: {"value": np.abs(a).max(0)},
        MeanAbs: lambda: {"value": np.abs(a).mean(0)},
        MinMax: lambda: {"low": a.min(0), "high": a.max(0)},
    }[kind]()


def assert_like(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Off-diagonal sums cancel; their error is measured against the diagonal.
        size = np.sqrt(np.outer(np.diag(value), np.diag(value))) if value.ndim == 2 else np.abs(value) + 1e-30
        assert (np.abs(found[name] - value) <= 2e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", SIMPLE)
def test_statistic_is_that_of_float64(kind, dtype):
    x = activations(dtype=dtype)
    stat = kind(COLUMNS)
    for part in x.split(70):
        stat.update(part)
    assert_like(values(stat), expected(kind, x))
    assert stat.count == 300


@pytest.mark.parametrize("kind", SIMPLE)
def test_merging_equals_one_pass(kind):
    x = activations()
    parts = []
    for piece in x.split(100):
        parts.append(kind(COLUMNS))
        parts[-1].update(piece)
    first, second, third = parts
    before = values(second)
    first.merge(second)
    first.merge(third)
    assert_like(values(first), expected(kind, x))
    assert first.count == 300
    assert all(np.array_equal(before[name], value) for name, value in values(second).items())


@pytest.mark.parametrize("kind", SIMPLE)
def test_merging_in_a_fixed_order_repeats_bit_for_bit(kind):
    def run():
        total = kind(COLUMNS)
        for piece in activations().split(64):
            part = kind(COLUMNS)
            part.update(piece)
            total.merge(part)
        return values(total)

    first, second = run(), run()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", SIMPLE)
def test_updates_without_tokens_change_nothing(kind):
    stat = kind(COLUMNS)
    stat.update(torch.zeros(0, COLUMNS))
    assert stat.count == 0
    stat.update(activations())
    before = values(stat)
    stat.update(torch.zeros(0, COLUMNS))
    stat.merge(kind(COLUMNS))
    assert stat.count == 300
    assert all(np.array_equal(before[name], value) for name, value in values(stat).items())


@pytest.mark.parametrize("shape", [(4, COLUMNS + 1), (4, 1), (COLUMNS,), (2, 4, COLUMNS)])
@pytest.mark.parametrize("kind", SIMPLE)
def test_other_shapes_are_refused(kind, shape):
    stat = kind(COLUMNS)
    with pytest.raises(InputError, match=rf"expects \(tokens, {COLUMNS}\)"):
        stat.update(torch.zeros(shape))
    assert stat.count == 0


@pytest.mark.parametrize("kind", SIMPLE)
def test_statistics_of_other_widths_do_not_merge(kind):
    for columns in (1, COLUMNS + 1):  # 1 would broadcast
        with pytest.raises(InputError, match="cannot merge"):
            kind(COLUMNS).merge(kind(columns))


def test_statistics_of_other_kinds_do_not_merge():
    with pytest.raises(InputError, match="cannot merge"):
        Gram(COLUMNS).merge(CrossGram(COLUMNS))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SIMPLE)
def test_inputs_are_left_alone(kind):
    x = activations()
    before = x.clone()
    kind(COLUMNS).update(x)
    assert torch.equal(x, before)


def test_mean_square_is_the_mean_over_tokens():
    gram, x = Gram(COLUMNS), activations()
    gram.update(x)
    np.testing.assert_allclose(gram.mean_square, x.double().square().mean(0), rtol=1e-5)
    assert torch.equal(Gram(3).mean_square, torch.zeros(3))


def test_mean_of_many_small_values_does_not_drift():
    stat = MeanAbs(1)
    for _ in range(50):
        stat.update(torch.full((1000, 1), 1e-4))
    stat.update(torch.full((1, 1), 4e3))
    assert float(stat.value) == pytest.approx((50_000 * 1e-4 + 4e3) / 50_001, rel=1e-6)


# --- drift -------------------------------------------------------------------------------------------------------------


def test_drift_is_the_sum_of_the_difference_times_the_input():
    now, original = activations(), activations(seed=1)
    drift = CrossGram(COLUMNS)
    for a, b in zip(original.split(70), now.split(70), strict=True):
        drift.update_pair(a, b)
    difference = original.double() - now.double()
    wanted = (difference.T @ now.double()).numpy()
    size = np.sqrt(np.outer(difference.square().sum(0), now.double().square().sum(0)))
    assert (np.abs(drift.matrix.numpy() - wanted) <= 2e-6 * size).all()
    assert drift.count == 300


def test_residual_drift_has_the_rows_of_the_output():
    now, stream, original = activations(), activations(columns=7, seed=1), activations(columns=7, seed=2)
    whole, first, second = (CrossGram(COLUMNS, rows=7) for _ in range(3))
    whole.update_against(original, stream, now)
    wanted = ((original.double() - stream.double()).T @ now.double()).numpy()
    size = np.sqrt(np.outer((original - stream).double().square().sum(0), now.double().square().sum(0)))
    assert whole.matrix.shape == (7, COLUMNS)
    assert (np.abs(whole.matrix.numpy() - wanted) <= 2e-6 * size).all()
    first.update_against(original[:100], stream[:100], now[:100])
    second.update_against(original[100:], stream[100:], now[100:])
    first.merge(second)
    assert (np.abs(first.matrix.numpy() - wanted) <= 2e-6 * size).all()
    assert first.count == 300


def test_drift_refuses_what_is_not_a_pair():
    drift = CrossGram(COLUMNS)
    with pytest.raises(InputError, match="update_pair"):
        drift.update(activations())
    with pytest.raises(InputError, match="pairs"):
        drift.update_pair(activations(10), activations(11))
    with pytest.raises(InputError, match="expects"):
        drift.update_pair(activations(10, 5), activations(10, 5))
    with pytest.raises(InputError, match="pairs"):
        CrossGram(COLUMNS, rows=7).update_pair(activations(), activations())
    with pytest.raises(InputError, match="cannot merge"):
        drift.merge(CrossGram(COLUMNS, rows=7))
    drift.update_pair(torch.zeros(0, COLUMNS), torch.zeros(0, COLUMNS))
    assert drift.count == 0


# --- the engine's product ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 513, 1024, 4100])
@pytest.mark.parametrize("accumulate", [fast_accumulate, accumulate_product])
def test_accumulated_products_lose_nothing(accumulate, tokens, dtype):
    x = (torch.randn(tokens, 160, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    y = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for a, b in ((x, x), (x, y)):
        before = torch.randn(160, b.shape[1], generator=torch.Generator().manual_seed(2)) * 1000
        found = before.clone()
        accumulate(found, a, b)
        wanted = before.double() + a.double().T @ b.double()
        size = before.abs() + torch.outer(a.double().square().sum(0).sqrt(), b.double().square().sum(0).sqrt())
        assert ((found - wanted).abs() <= 1e-5 * size).all()


def test_many_small_batches_accumulate_like_one_large():
    x = (torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    gram = Gram(64, accumulate=fast_accumulate)
    for part in x.split(32):
        gram.update(part)
    wanted = x.double().T @ x.double()
    size = wanted.diagonal().outer(wanted.diagonal()).sqrt()
    assert ((gram.matrix - wanted).abs() <= 1e-5 * size).all()


def test_fast_product_leaves_its_inputs_and_the_precision_of_others_as_they_were():
    before = torch.backends.mkldnn.matmul.fp32_precision
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    copy = x.clone()
    fast_accumulate(torch.zeros(64, 64), x, x)
    assert torch.equal(x, copy)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((a.T @ a).double(), a.double().T @ a.double(), rtol=0, atol=1e-3)
