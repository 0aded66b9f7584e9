"""SpQR: sensitivities against leave-one-out by brute force, the column loop against the paper's update, both in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from bitwright.core.linalg import upper_factor
from bitwright.core.method import Context
from bitwright.core.stats import Gram
from bitwright.errors import InputError, NumericError
from bitwright.kernels import reference
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.kernels.numba_tiles import tile_sums
from bitwright.methods.gptq import Gptq
from bitwright.methods.rtn import Rtn
from bitwright.methods.search import Search
from bitwright.methods.spqr import Spqr, largest, sensitivity
from bitwright.schemes.affine import Affine
from bitwright.schemes.bilevel import Bilevel

CONTEXT = Context(feedback=feedback_block, tile_sums=tile_sums)


@dataclass(frozen=True, kw_only=True)
class Sparse(Affine):
    """Affine integers beside one outlier in a hundred weights: parameters of one level, fitted tile by tile."""

    def outlier_count(self, shape: tuple[int, int]) -> int:
        return round(0.01 * shape[0] * shape[1])


def gram_of(columns: int, *, tokens=500, seed=0) -> Gram:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=rng) @ torch.randn(8, columns, generator=rng)
    gram = Gram(columns)
    gram.update((x + torch.randn(tokens, columns, generator=rng)) * torch.rand(columns, generator=rng).add(0.2))
    return gram


def weight(rows=48, columns=128, *, seed=1):
    """Heavy tails: every outlier taken out makes its group's range smaller."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return w * w.abs() * 0.02


def true_loss(w, decoded, gram) -> float:
    e = (w - decoded).double()
    return float((e @ gram.matrix.double() * e).sum())


def group_error(values: np.ndarray, cost: np.ndarray, bits: int) -> float:
    """Weighted squared error of rounding one group, range from its extremes and zero, zero point a real number."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    codes = np.clip(np.rint((values - low) / scale), 0, 2**bits - 1)
    return float((cost * (values - low - codes * scale) ** 2).sum())


def test_sensitivity_is_leave_one_out_by_brute_force():
    scheme, w = Bilevel(group_size=16), weight(12, 64)
    cost = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    found = sensitivity(w, cost, scheme, CONTEXT).double().numpy()
    values, costs = w.double().numpy(), cost.double().numpy()
    wanted = np.zeros(w.shape)
    for row in range(12):
        for column in range(64):
            group = np.arange(column // 16 * 16, column // 16 * 16 + 16)
            rest = group[group != column]
            whole = group_error(values[row, group], costs[group], 3)
            wanted[row, column] = whole - group_error(values[row, rest], costs[rest], 3)
    # Where a fit without the weight happens to be worse, the old fit is still there: its own error is spared in any case.
    params = scheme.fit(w)
    own = (w - scheme.decode(scheme.encode(w, params), params)).square() * cost
    wanted = np.maximum(wanted, own.double().numpy())
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-3 * wanted.max())


def test_sensitivity_of_tiles_of_many_rows_is_each_weights_own_error():
    scheme, w = Affine(granularity="tensor", scale_dtype="float32"), weight(12, 64)
    params, codes = scheme.quantize(w)
    expected = (w - scheme.decode(codes, params)).square() * 2.0
    torch.testing.assert_close(sensitivity(w, torch.full((64,), 2.0), scheme, CONTEXT), expected)


def test_largest_counts_exactly_and_breaks_ties_by_place():
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (20, 30), generator=rng).float()
    for count in (0, 1, 77, 600):
        chosen = largest(values, count).view(-1).numpy()
        expected = np.zeros(600, bool)
        expected[np.argsort(-values.view(-1).numpy(), kind="stable")[:count]] = True
        assert np.array_equal(chosen, expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [Bilevel(outliers=0.5), Sparse(bits=3, group_size=32)], ids=lambda s: s.kind)
def test_outliers_are_as_many_as_announced_in_order_and_in_16_bits(scheme, act_order):
    w, gram = weight(), gram_of(128)
    tensor = Spqr(act_order=act_order).quantize(w, {"gram": gram}, scheme, CONTEXT).tensor
    indices, values = tensor.outliers
    assert len(indices) == len(values) == scheme.outlier_count((48, 128))
    assert indices.dtype == torch.int64
    assert (indices.diff() > 0).all()
    assert values.dtype == torch.float16
    assert torch.equal(tensor.decode().view(-1)[indices], values.float())


def test_planted_outliers_are_found():
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    places = torch.randperm(48 * 128, generator=torch.Generator().manual_seed(4))[:25].sort().values
    w.view(-1)[places] = 0.5
    tensor = Spqr().quantize(w, {"gram": gram_of(128)}, Bilevel(outliers=50 * 100 / (48 * 128)), CONTEXT).tensor
    assert set(places.tolist()) <= set(tensor.outliers[0].tolist())


@pytest.mark.parametrize("block", [16, 200])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_column_loop_is_the_papers_with_outliers_left_at_their_moved_value(act_order, block):
    """Algorithm 1: w -= error / [chol(H^-1)]_jj * row j; a column's outliers keep the value they have when it is their turn."""
    w, gram, scheme = weight(), gram_of(128), Bilevel(outliers=1.0)
    method = Spqr(act_order=act_order, block=block, damping=0.01, correct_drift=False)
    tensor = method.quantize(w, {"gram": gram}, scheme, CONTEXT).tensor
    h = gram.matrix.double().numpy()
    h = h + 0.01 * h.diagonal().mean() * np.eye(128)
    order = np.argsort(-gram.matrix.diagonal().numpy(), kind="stable") if act_order else np.arange(128)
    upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    apart = np.zeros(48 * 128, bool)
    apart[tensor.outliers[0].numpy()] = True
    apart = apart.reshape(48, 128)
    decoded = scheme.decode(tensor.codes, tensor.params).double().numpy()
    stored = tensor.decode().double().numpy()
    now = w.double().numpy()[:, order].copy()
    for j, column in enumerate(order):
        kept = apart[:, column]
        # One step of float16 is 2^-10 of the value at most; float32 sums leave less.
        np.testing.assert_allclose(stored[kept, column], now[kept, j], rtol=2.0**-10, atol=1e-5)
        codec = scheme.codec(tensor.params, (48, 128))
        scale = codec.scale[:, column // 16].double().numpy()
        zero = codec.zero[:, column // 16].double().numpy()
        nearest = (np.clip(np.rint(now[:, j] / scale + zero), 0, 7) - zero) * scale
        tie = np.abs(np.abs(now[:, j] / scale + zero - np.floor(now[:, j] / scale + zero)) - 0.5) < 2e-3
        np.testing.assert_allclose(decoded[~tie, column], nearest[~tie], rtol=1e-5, atol=1e-7)
        error = (now[:, j] - stored[:, column]) / upper[j, j]
        now[:, j:] -= error[:, None] * upper[j, j:]


def test_u_squared_is_the_cost_when_later_columns_compensate():
    """U_jj^2 = 1 / [(H over j and what is visited after it)^-1]_jj, the leave-one-out cost of eq. 2 on those columns."""
    gram = gram_of(24)
    upper = upper_factor(gram.matrix)
    h = gram.matrix.double().numpy()
    expected = [1 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(24)]
    np.testing.assert_allclose(upper.diagonal().double().numpy() ** 2, expected, rtol=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_beats_gptq_without_outliers_and_rounding(act_order):
    w, gram = weight(), gram_of(128)
    spqr = Spqr(act_order=act_order).quantize(w, {"gram": gram}, Bilevel(outliers=1.0), CONTEXT).tensor.decode()
    gptq = Gptq(act_order=act_order).quantize(w, {"gram": gram}, Bilevel(outliers=0.0), CONTEXT).tensor.decode()
    rtn = Rtn().quantize(w, {}, Bilevel(outliers=0.0), CONTEXT).tensor.decode()
    assert true_loss(w, spqr, gram) < 0.9 * true_loss(w, gptq, gram)
    assert true_loss(w, spqr, gram) < 0.4 * true_loss(w, rtn, gram)


def test_the_reference_kernel_gives_the_same_outliers():
    w, gram, scheme = weight(), gram_of(128), Bilevel(outliers=1.0)
    compiled = Spqr().quantize(w, {"gram": gram}, scheme, CONTEXT).tensor
    plain = Spqr().quantize(w, {"gram": gram}, scheme, replace(CONTEXT, feedback=reference.feedback_block)).tensor
    assert torch.equal(compiled.outliers[0], plain.outliers[0])
    assert (compiled.codes != plain.codes).any(1).sum() <= 3  # rows with a tie


def test_without_outliers_it_is_gptq_and_says_so():
    w, gram = weight(), gram_of(128)
    for scheme in (Affine(group_size=32), Bilevel(outliers=0.0)):
        assert "gptq" in Spqr().accepts(scheme)
        mine = Spqr().quantize(w, {"gram": gram}, scheme, CONTEXT).tensor
        assert mine.equals(Gptq().quantize(w, {"gram": gram}, scheme, CONTEXT).tensor)


@pytest.mark.parametrize("method", [Rtn(), Search(), Gptq()], ids=lambda m: m.name)
def test_methods_that_keep_no_outliers_refuse_schemes_that_have_some(method):
    assert "spqr" in method.accepts(Bilevel(outliers=0.1))
    assert method.accepts(Bilevel(outliers=0.0)) is None
    assert Spqr().accepts(Bilevel(outliers=0.1)) is None


@pytest.mark.parametrize("given", ["nothing", "no token", "zeros"])
def test_without_data_it_searches_and_keeps_outliers_apart(given):
    gram = Gram(128)
    if given == "zeros":
        gram.update(torch.zeros(10, 128))
    w, scheme = weight(), Bilevel(outliers=1.0)
    outcome = Spqr().quantize(w, {} if given == "nothing" else {"gram": gram}, scheme, CONTEXT)
    assert outcome.fallback is not None
    indices, values = outcome.tensor.outliers
    assert len(indices) == scheme.outlier_count((48, 128))
    assert torch.equal(values, w.view(-1)[indices].half())
    plain = Search().quantize(w, {}, Bilevel(outliers=0.0), CONTEXT).tensor.decode()
    assert (w - outcome.tensor.decode()).square().sum() < 0.9 * (w - plain).square().sum()


def test_outliers_that_overflow_float16_are_refused():
    w = weight()
    w[0, 0] = 1e5
    with pytest.raises(NumericError, match="outlier overflows"):
        Spqr().quantize(w, {"gram": gram_of(128)}, Bilevel(outliers=1.0), CONTEXT)


def test_dead_columns_lose_nothing_to_outliers():
    w, gram = weight(), gram_of(128)
    gram.matrix[7] = 0
    gram.matrix[:, 7] = 0
    outcome = Spqr().quantize(w, {"gram": gram}, Bilevel(outliers=1.0), CONTEXT)
    assert outcome.dead_columns == 1
    assert torch.isfinite(outcome.tensor.decode()).all()


def test_rounds_must_be_positive():
    with pytest.raises(InputError, match="rounds"):
        Spqr(rounds=0)
