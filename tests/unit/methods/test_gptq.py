"""GPTQ against the algorithm of arXiv:2210.17323, written out column by column in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from bitwright.core.method import Context
from bitwright.core.scheme import Params, ParamSpec, Scheme, TableCodec, Tile, tile_of_columns
from bitwright.core.stats import CrossGram, Gram
from bitwright.errors import InputError, NumericError
from bitwright.kernels import reference
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.kernels.numba_tiles import tile_sums
from bitwright.methods.gptq import Gptq
from bitwright.methods.rtn import Rtn
from bitwright.schemes.affine import Affine

CONTEXT = Context(feedback=feedback_block, tile_sums=tile_sums)


@dataclass(frozen=True, kw_only=True)
class FiveLevels(Scheme):
    """A scheme that bitwright does not know: five unevenly spaced values times the largest magnitude of a group."""

    kind: ClassVar[str] = "five-levels"
    TABLE: ClassVar[tuple[float, ...]] = (-1.0, -0.35, 0.0, 0.3, 1.0)
    group_size: int = 16

    @property
    def tile(self) -> Tile:
        return Tile(1, self.group_size)

    @property
    def levels(self) -> int:
        return len(self.TABLE)

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        top = w.view(len(w), -1, self.group_size).abs().amax(-1)
        return {"scale": (top * clip).clamp_min(1e-20)}

    def _wide(self, params: Params) -> torch.Tensor:
        return params["scale"].repeat_interleave(self.group_size, dim=1)

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        x = w / self._wide(params)
        return (x.unsqueeze(-1) - torch.tensor(self.TABLE)).abs().argmin(-1).to(torch.uint8)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return torch.tensor(self.TABLE)[codes.long()] * self._wide(params)

    def codec(self, params: Params, shape: tuple[int, int]) -> TableCodec:
        return TableCodec(torch.tensor(self.TABLE), params["scale"], tile_of_columns(shape[1], self.group_size))

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        return (ParamSpec("scale", self.grid(shape), torch.float32),)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return 3 + 32 / self.group_size


def inputs(tokens: int, columns: int, *, seed: int = 0, common: float = 1.0) -> torch.Tensor:
    """Correlated activations (tokens, columns) whose columns differ in size. common 0: independent."""
    rng = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 8, generator=rng) @ torch.randn(8, columns, generator=rng)
    own = torch.randn(tokens, columns, generator=rng)
    return (own + common * shared) * torch.rand(columns, generator=rng).add(0.2)


def gram_of(x: torch.Tensor) -> Gram:
    gram = Gram(x.shape[1])
    gram.update(x)
    return gram


def weight(rows: int, columns: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def true_loss(w: torch.Tensor, decoded: torch.Tensor, gram: Gram) -> float:
    e = (w - decoded).double()
    return float((e @ gram.matrix.double() * e).sum())


class Paper:
    """Algorithm 1 of the paper without blocks: every column's error goes to all columns after it, by inv(H)'s Cholesky factor.

    ``steps``: w / scale + zero just before rounding, so that a test can tell a rounding tie from an error.
    """

    def __init__(self, w: torch.Tensor, gram: Gram, scheme: Scheme, damping: float, act_order: bool) -> None:
        h = 2 * gram.matrix.double().numpy()
        columns = len(h)
        h = h + damping * h.diagonal().mean() * np.eye(columns)
        order = np.argsort(-gram.matrix.diagonal().numpy(), kind="stable") if act_order else np.arange(columns)
        self.order = order
        upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
        now = w.double().numpy().copy()
        span = scheme.span(columns)
        original = now.copy()
        self.codes = np.zeros(w.shape, np.int64)
        self.steps = np.zeros(w.shape)
        self.scales = np.zeros((len(w), columns // span))
        now = now[:, order]
        for j, column in enumerate(order):
            tile = column // span
            if act_order or j % span == 0:
                entering = original[:, tile * span : (tile + 1) * span] if act_order else now[:, j : j + span]
                low, scale, zero, table = self._fit(entering, scheme)
                self.scales[:, tile] = scale
            self.steps[:, column] = now[:, j] / scale + zero
            if table is None:
                code = np.clip(np.rint(self.steps[:, column]), low, scheme.levels - 1)
                value = (code - zero) * scale
            else:
                code = np.abs(self.steps[:, column, None] - table).argmin(-1)
                value = table[code] * scale
            self.codes[:, column] = code
            error = (now[:, j] - value) / upper[j, j]
            now[:, j:] -= error[:, None] * upper[j, j:]

    @staticmethod
    def _fit(tile, scheme):
        """Lowest code, scale, zero point and table of a tile (rows, span), by the formulas of the schemes' docstrings."""
        if isinstance(scheme, FiveLevels):
            return 0, np.abs(tile).max(1), 0.0, np.array(scheme.TABLE, np.float32).astype(np.float64)
        if scheme.symmetric:
            zero = 2.0 ** (scheme.bits - 1)
            scale = np.abs(tile).max(1) / ((2**scheme.bits - 1) / 2)
        else:
            bottom, top = np.minimum(tile.min(1), 0), np.maximum(tile.max(1), 0)
            scale = (top - bottom) / (2**scheme.bits - 1)
            zero = np.rint(-bottom / scale)
        return 0, scale.astype(scheme.scale_dtype).astype(np.float64), zero, None

    def assert_same_codes(self, codes: torch.Tensor, levels: int, table: tuple[float, ...] | None = None) -> None:
        """Row by row up to the first column where float32 and float64 may round a tie differently."""
        found = codes.numpy().astype(np.int64)
        ties = 0
        for row in range(len(found)):
            differ = np.flatnonzero(found[row, self.order] != self.codes[row, self.order])
            if len(differ):
                column = self.order[differ[0]]
                step, pair = self.steps[row, column], (found[row, column], self.codes[row, column])
                assert abs(pair[0] - pair[1]) == 1, f"row {row} column {column}: {pair}"
                border = np.mean([table[code] for code in pair]) if table else np.mean(pair)
                assert abs(step - border) < 2e-3, f"row {row} column {column}: {step} is no tie between {pair}"
                ties += 1
        assert ties <= len(found) // 8


SCHEMES = [
    Affine(group_size=32, scale_dtype="float32"),
    Affine(group_size=24, bits=3, scale_dtype="float16"),
    Affine(granularity="channel", scale_dtype="float32"),
    Affine(group_size=48, symmetric=False, scale_dtype="float32"),
    Affine(granularity="channel", symmetric=False, bits=2, scale_dtype="float32"),
    FiveLevels(group_size=16),
]


@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("block", [1, 7, 32, 200])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.kind}-{s.describe()}")
def test_codes_are_those_of_the_paper(scheme, block, act_order):
    x, w = inputs(300, 96), weight(24, 96)
    gram = gram_of(x)
    method = Gptq(damping=0.01, block=block, act_order=act_order, clip="minmax", correct_drift=False)
    outcome = method.quantize(w, {"gram": gram}, scheme, CONTEXT)
    paper = Paper(w, gram, scheme, 0.01, act_order)
    table = scheme.TABLE if isinstance(scheme, FiveLevels) else None
    paper.assert_same_codes(outcome.tensor.codes, scheme.levels, table)
    if act_order:
        np.testing.assert_allclose(outcome.tensor.params["scale"].double().numpy(), paper.scales, rtol=3e-7)
    assert outcome.damping == 0.01
    assert outcome.fallback is None


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [Affine(group_size=32), FiveLevels(group_size=32)], ids=lambda s: s.kind)
def test_reference_kernel_gives_the_same_codes_as_the_compiled_one(scheme, act_order):
    gram, w = gram_of(inputs(300, 96)), weight(24, 96)
    method = Gptq(block=16, act_order=act_order)
    codes = [
        method.quantize(w, {"gram": gram}, scheme, replace(CONTEXT, feedback=kernel)).tensor.codes
        for kernel in (feedback_block, reference.feedback_block)
    ]
    assert (codes[0] != codes[1]).any(1).sum() <= 2  # rows with a tie


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_rounding_when_inputs_correlate(bits, act_order):
    scheme = Affine(bits=bits, group_size=32)
    gram, w = gram_of(inputs(400, 128)), weight(48, 128)
    gptq = Gptq(act_order=act_order).quantize(w, {"gram": gram}, scheme, CONTEXT).tensor.decode()
    rtn = Rtn().quantize(w, {}, scheme, CONTEXT).tensor.decode()
    assert true_loss(w, gptq, gram) < 0.6 * true_loss(w, rtn, gram)


def test_beats_rounding_over_a_scheme_it_has_never_seen():
    scheme = FiveLevels(group_size=32)
    gram, w = gram_of(inputs(400, 128)), weight(48, 128)
    for act_order in (False, True):
        gptq = Gptq(act_order=act_order).quantize(w, {"gram": gram}, scheme, CONTEXT).tensor.decode()
        rtn = Rtn().quantize(w, {}, scheme, CONTEXT).tensor.decode()
        assert true_loss(w, gptq, gram) < 0.6 * true_loss(w, rtn, gram)


def test_without_correlation_it_is_rounding():
    scheme = Affine(group_size=32)
    gram, w = Gram(96), weight(16, 96)
    gram.matrix += torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(0)) + 0.1)
    gram.count = 1000
    expected = Rtn().quantize(w, {}, scheme, CONTEXT).tensor
    for act_order in (False, True):
        method = Gptq(act_order=act_order, clip="minmax")
        assert method.quantize(w, {"gram": gram}, scheme, CONTEXT).tensor.equals(expected)


@pytest.mark.parametrize("act_order", [False, True])
def test_searched_ranges_lose_less_than_extremes_at_few_bits(act_order):
    scheme = Affine(bits=2, group_size=32)
    gram, w = gram_of(inputs(400, 128)), weight(48, 128)
    losses = {}
    for clip in ("minmax", "search"):
        decoded = Gptq(act_order=act_order, clip=clip).quantize(w, {"gram": gram}, scheme, CONTEXT).tensor.decode()
        losses[clip] = true_loss(w, decoded, gram)
    assert losses["search"] < 0.8 * losses["minmax"]


def test_reported_loss_is_relative_to_the_output_energy():
    gram, w = gram_of(inputs(400, 64)), weight(40, 64)
    outcome = Gptq().quantize(w, {"gram": gram}, Affine(group_size=32), CONTEXT)
    expected = true_loss(w, outcome.tensor.decode(), gram) / true_loss(w, torch.zeros_like(w), gram)
    assert outcome.loss == pytest.approx(expected, rel=1e-4)


# --- dead columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_rounded_to_nearest_and_do_not_disturb_the_others(act_order):
    scheme = Affine(granularity="channel", scale_dtype="float32")
    x, w = inputs(300, 48), weight(16, 48)
    w[:, 0] = 0.1  # this column sets every row's range, so that the others may be left away
    dead = [5, 17, 47]
    alive = [c for c in range(48) if c not in dead]
    x[:, dead] = 0
    method = Gptq(act_order=act_order, clip="minmax", damping=0.01)
    gram = gram_of(x)
    outcome = method.quantize(w, {"gram": gram}, scheme, CONTEXT)
    assert outcome.dead_columns == 3
    nearest = scheme.encode(w, outcome.tensor.params)
    assert torch.equal(outcome.tensor.codes[:, dead], nearest[:, dead])
    # Damping is a fraction of the mean diagonal over all columns.
    alone = replace(method, damping=0.01 * len(alive) / 48)
    others = alone.quantize(w[:, alive].contiguous(), {"gram": gram_of(x[:, alive])}, scheme, CONTEXT).tensor
    assert (outcome.tensor.codes[:, alive] != others.codes).any(1).sum() <= 1


@pytest.mark.parametrize("act_order", [False, True])
def test_a_group_whose_inputs_are_all_dead_is_still_quantized(act_order):
    x, w = inputs(300, 64), weight(16, 64)
    x[:, 32:] = 0
    outcome = Gptq(act_order=act_order).quantize(w, {"gram": gram_of(x)}, Affine(group_size=32), CONTEXT)
    assert outcome.dead_columns == 32
    assert (outcome.tensor.decode() - w)[:, 32:].abs().max() < 0.02


# --- damping and fallback ----------------------------------------------------------------------------------------------


def indefinite(coupling: float) -> Gram:
    """Not the Gram matrix of any data: positive definite only when more than ``coupling`` - 1 is added to its diagonal."""
    gram = Gram(8)
    gram.matrix += torch.eye(8)
    gram.matrix[2, 5] = gram.matrix[5, 2] = coupling
    gram.count = 100
    return gram


@pytest.mark.parametrize(("coupling", "damping"), [(1.02, 0.05), (1.2, 0.5), (4.0, 5.0), (40.0, 50.0)])
def test_damping_is_raised_tenfold_until_the_matrix_is_positive_definite(coupling, damping):
    outcome = Gptq(damping=0.05).quantize(weight(4, 8), {"gram": indefinite(coupling)}, Affine(group_size=8), CONTEXT)
    assert outcome.damping == pytest.approx(damping)
    assert outcome.fallback is None


def test_a_gram_matrix_that_only_float64_factorises_needs_no_more_damping():
    gram = Gram(2)  # determinant 1 by Cassini's identity: see tests/unit/core/test_linalg.py
    gram.matrix += torch.tensor([[1346269.0, 2178309.0], [2178309.0, 3524578.0]])
    gram.count = 100
    outcome = Gptq(damping=1e-9).quantize(weight(4, 2), {"gram": gram}, Affine(group_size=2), CONTEXT)
    assert outcome.damping == 1e-9
    assert torch.isfinite(outcome.tensor.decode()).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_after_three_raises_it_falls_back_to_search_and_says_so(act_order):
    outcome = Gptq(damping=0.05, act_order=act_order).quantize(
        weight(4, 8), {"gram": indefinite(60.0)}, Affine(group_size=8), CONTEXT
    )
    assert outcome.fallback is not None
    assert "not positive definite" in outcome.fallback
    assert "search" in outcome.fallback
    assert outcome.damping is None


def test_strict_raises_instead_of_falling_back():
    strict = replace(CONTEXT, strict=True)
    with pytest.raises(NumericError, match="not positive definite"):
        Gptq(damping=0.05).quantize(weight(4, 8), {"gram": indefinite(60.0)}, Affine(group_size=8), strict)


@pytest.mark.parametrize("stats", ["nothing", "no token", "only zeros"])
def test_without_calibration_it_falls_back(stats):
    gram = Gram(64)
    if stats == "only zeros":
        gram.update(torch.zeros(10, 64))
    given = {} if stats == "nothing" else {"gram": gram}
    scheme, w = Affine(group_size=32), weight(8, 64)
    outcome = Gptq().quantize(w, given, scheme, CONTEXT)
    assert outcome.fallback is not None
    rtn = Rtn().quantize(w, {}, scheme, CONTEXT).tensor
    assert (outcome.tensor.decode() - w).square().sum() <= (rtn.decode() - w).square().sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(bad):
    gram = gram_of(inputs(50, 16))
    gram.matrix[3, 3] = bad
    with pytest.raises(NumericError, match="not finite"):
        Gptq().quantize(weight(4, 16), {"gram": gram}, Affine(group_size=16), CONTEXT)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 1.0}, {"block": 0}, {"clip": "mse"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        Gptq(**options)


# --- drift -------------------------------------------------------------------------------------------------------------

#: One column a group and a code for its own magnitude: decodes whatever it is given, so that the rounded target shows.
EXACT = Affine(bits=8, group_size=1, symmetric_range="narrow", scale_dtype="float32")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_drift_correction_is_the_least_squares_solution(act_order, with_residual):
    now = inputs(400, 24, seed=3, common=0.2)
    original = now + 0.3 * inputs(400, 24, seed=4)
    w = weight(10, 24)
    drift = CrossGram(24)
    drift.update_pair(original, now)
    stats: dict[str, Any] = {"gram": gram_of(now), "drift": drift}
    wanted = original.double().numpy() @ w.double().numpy().T
    if with_residual:
        rng = torch.Generator().manual_seed(5)
        stream, original_stream = torch.randn(2, 400, 10, generator=rng) * 0.1
        residual = CrossGram(24, rows=10)
        residual.update_against(original_stream, stream, now)
        stats["residual_drift"] = residual
        wanted = wanted + (original_stream - stream).double().numpy()
    outcome = Gptq(damping=1e-9, act_order=act_order, clip="minmax").quantize(w, stats, EXACT, CONTEXT)
    best = np.linalg.lstsq(now.double().numpy(), wanted, rcond=None)[0].T
    assert np.abs(best - w.numpy()).max() > 0.005  # there is something to correct
    np.testing.assert_allclose(outcome.tensor.decode().numpy(), best, atol=2e-5)


def test_drift_correction_brings_the_outputs_nearer_to_the_original_ones():
    now = inputs(400, 64, seed=3)
    original = now + 0.02 * now @ torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    w, scheme = weight(32, 64), Affine(group_size=32)
    drift = CrossGram(64)
    drift.update_pair(original, now)
    stats = {"gram": gram_of(now), "drift": drift}
    errors = []
    for correct in (stats, {"gram": stats["gram"]}):
        decoded = Gptq().quantize(w, correct, scheme, CONTEXT).tensor.decode()
        errors.append((original.double() @ w.double().T - now.double() @ decoded.double().T).square().sum())
    assert errors[0] < 0.5 * errors[1]


def test_no_drift_corrects_nothing():
    now, w, scheme = inputs(200, 32), weight(8, 32), Affine(group_size=16)
    drift = CrossGram(32)
    drift.update_pair(now, now)
    gram = gram_of(now)
    with_drift = Gptq().quantize(w, {"gram": gram, "drift": drift}, scheme, CONTEXT).tensor
    assert with_drift.equals(Gptq().quantize(w, {"gram": gram}, scheme, CONTEXT).tensor)


@pytest.mark.parametrize("act_order", [False, True])
def test_drift_leaves_dead_columns_alone(act_order):
    now = inputs(400, 24, common=0.2)
    now[:, [4, 9]] = 0
    original = now + 0.3 * inputs(400, 24, seed=4)
    drift = CrossGram(24)
    drift.update_pair(original, now)
    w = weight(6, 24)
    outcome = Gptq(act_order=act_order, clip="minmax").quantize(
        w, {"gram": gram_of(now), "drift": drift}, EXACT, CONTEXT
    )
    np.testing.assert_allclose(outcome.tensor.decode()[:, [4, 9]], w[:, [4, 9]], rtol=1e-6)


def test_drift_is_asked_for_only_when_it_is_corrected():
    assert Gptq().needs == {"gram", "drift"}
    assert Gptq(correct_drift=False).needs == {"gram"}


# --- purity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_are_left_alone_and_results_repeat_bit_for_bit(act_order):
    x, w = inputs(300, 64), weight(16, 64)
    x[:, 7] = 0
    drift = CrossGram(64)
    drift.update_pair(x + 0.1, x)
    residual = CrossGram(64, rows=16)
    residual.update_against(torch.ones(300, 16), torch.zeros(300, 16), x)
    stats: dict[str, Any] = {"gram": gram_of(x), "drift": drift, "residual_drift": residual}
    before = [w.clone(), *(s.matrix.clone() for s in stats.values())]
    method, scheme = Gptq(act_order=act_order), Affine(group_size=32)
    first = method.quantize(w, stats, scheme, CONTEXT)
    second = method.quantize(w, stats, scheme, CONTEXT)
    assert first.tensor.equals(second.tensor)
    assert first.loss == second.loss
    assert all(torch.equal(a, b) for a, b in zip(before, [w, *(s.matrix for s in stats.values())], strict=True))
