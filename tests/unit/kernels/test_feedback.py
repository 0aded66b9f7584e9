"""The compiled error-feedback loop against the plain one, and the plain one against the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.core.scheme import AffineCodec, Codec, TableCodec, tile_of_columns
from bitwright.errors import InputError
from bitwright.kernels import numba_feedback, reference

KERNELS = {"reference": reference.feedback_block, "numba": numba_feedback.feedback_block}
NF4_LIKE = [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]


def codec_of(kind: str, rows: int, columns: int, *, span: int = 16, seed: int = 0) -> Codec:
    rng = torch.Generator().manual_seed(seed)
    tile = tile_of_columns(columns, span)
    tiles = int(tile.max()) + 1
    scale = torch.rand(rows, tiles, generator=rng) * 0.01 + 0.005
    if kind == "table":
        return TableCodec(torch.tensor(NF4_LIKE), scale * 4, tile)
    if kind == "two values":
        return TableCodec(torch.tensor([-1.0, 1.0]), scale * 4, tile)
    zero = torch.randint(3, 12, (rows, tiles), generator=rng).float()
    return AffineCodec(scale, zero, tile, 1 if kind == "narrow" else 0, 15)


def problem(block: int, rows: int, *, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(block, rows, generator=rng) * 0.02
    targets = weights + torch.randn(block, rows, generator=rng) * 0.004
    feedback = torch.randn(block, block, generator=rng).triu(1) * 0.15 + torch.eye(block)
    return targets, weights, feedback


def float64(targets, weights, feedback, codec, columns):
    """Codes, errors, and every target over its scale just before rounding, in float64."""
    t, w, f = (a.double().numpy().copy() for a in (targets, weights, feedback))
    codes, errors, steps = np.zeros(t.shape, int), np.zeros(t.shape), np.zeros(t.shape)
    for j in range(len(t)):
        tile = int(codec.tile[int(columns[j])])
        scale = codec.scale[:, tile].double().numpy()
        if isinstance(codec, AffineCodec):
            levels = np.arange(codec.low, codec.high + 1)
            every = levels - codec.zero[:, tile].double().numpy()[:, None]
        else:
            levels = np.arange(len(codec.table))
            every = np.tile(codec.table.double().numpy(), (len(scale), 1))
        steps[j] = t[j] / scale
        nearest = np.abs(steps[j][:, None] - every).argmin(1)
        codes[j] = levels[nearest]
        errors[j] = w[j] - every[np.arange(len(scale)), nearest] * scale
        for k in range(j + 1, len(t)):
            t[k] += f[j, k] * errors[j]
    return codes, errors, steps


def border_between(codec, columns, j, row, pair) -> float:
    """Half way between the values of two codes, over the scale."""
    if isinstance(codec, AffineCodec):
        zero = float(codec.zero[row, int(codec.tile[int(columns[j])])])
        return (pair[0] + pair[1]) / 2 - zero
    return (float(codec.table[pair[0]]) + float(codec.table[pair[1]])) / 2


def assert_agree(kernel, targets, weights, feedback, codec, columns):
    """Each row equals float64 up to its first rounding tie, if there is one."""
    codes, errors = kernel(targets, weights, feedback, codec, columns)
    block, rows = targets.shape
    assert codes.dtype == torch.uint8
    assert errors.dtype == torch.float32
    assert codes.shape == errors.shape == (block, rows)
    wanted, wanted_errors, steps = float64(targets, weights, feedback, codec, columns)
    found = codes.numpy().astype(int)
    ties = 0
    for row in range(rows):
        differ = np.flatnonzero(found[:, row] != wanted[:, row])
        stop = block
        if len(differ):
            stop = int(differ[0])
            pair = (found[stop, row], wanted[stop, row])
            assert abs(pair[0] - pair[1]) == 1
            assert abs(steps[stop, row] - border_between(codec, columns, stop, row, pair)) < 1e-3
            ties += 1
        np.testing.assert_allclose(errors[:stop, row], wanted_errors[:stop, row], rtol=0, atol=2e-6)
    assert ties <= max(1, rows // 16)


@pytest.mark.parametrize("kind", ["affine", "narrow", "table", "two values"])
@pytest.mark.parametrize(
    ("block", "rows"),
    [(1, 1), (1, 70), (32, 1), (32, 63), (32, 64), (32, 65), (17, 200), (128, 130)],
    ids=str,
)
@pytest.mark.parametrize("name", KERNELS)
def test_codes_and_errors_are_those_of_float64(name, block, rows, kind):
    codec = codec_of(kind, rows, block)
    assert_agree(KERNELS[name], *problem(block, rows), codec, torch.arange(block))


@pytest.mark.parametrize("kind", ["affine", "table"])
@pytest.mark.parametrize("name", KERNELS)
def test_columns_may_come_in_any_order_and_from_any_place(name, kind):
    """Activation order: a block of 24 columns picked from 96."""
    columns = torch.randperm(96, generator=torch.Generator().manual_seed(3))[:24]
    assert_agree(KERNELS[name], *problem(24, 77), codec_of(kind, 77, 96), columns)


@pytest.mark.parametrize("kind", ["affine", "table"])
def test_compiled_loop_equals_the_plain_one(kind):
    arguments = (*problem(64, 150), codec_of(kind, 150, 64), torch.arange(64))
    codes, errors = numba_feedback.feedback_block(*arguments)
    plain_codes, plain_errors = reference.feedback_block(*arguments)
    same = (codes == plain_codes).all(0)
    assert (~same).sum() <= 9  # rows with a tie
    torch.testing.assert_close(errors[:, same], plain_errors[:, same], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_without_feedback_every_column_is_rounded_alone(name):
    targets, weights, _ = problem(20, 30)
    codec = codec_of("affine", 30, 20)
    codes, errors = KERNELS[name](targets, weights, torch.eye(20), codec, torch.arange(20))
    for j in (0, 7, 19):
        alone, alone_errors = KERNELS[name](
            targets[j : j + 1], weights[j : j + 1], torch.eye(1), codec, torch.tensor([j])
        )
        assert torch.equal(codes[j], alone[0])
        assert torch.equal(errors[j], alone_errors[0])


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_s_result_does_not_depend_on_its_neighbours(name):
    targets, weights, feedback = problem(32, 130)
    codec = codec_of("affine", 130, 32)
    codes, errors = KERNELS[name](targets, weights, feedback, codec, torch.arange(32))
    rows = torch.tensor([0, 63, 64, 129])
    few = AffineCodec(codec.scale[rows], codec.zero[rows], codec.tile, codec.low, codec.high)
    few_codes, few_errors = KERNELS[name](targets[:, rows], weights[:, rows], feedback, few, torch.arange(32))
    assert torch.equal(few_codes, codes[:, rows])
    assert torch.equal(few_errors, errors[:, rows])


@pytest.mark.parametrize("kind", ["affine", "table"])
@pytest.mark.parametrize("name", KERNELS)
def test_far_targets_take_the_outermost_codes(name, kind):
    targets = torch.tensor([[1e6, -1e6, 1e30, -1e30]])
    codec = codec_of(kind, 4, 1)
    codes, _ = KERNELS[name](targets, targets.clone(), torch.eye(1), codec, torch.tensor([0]))
    assert codes.tolist() == [[15, 0, 15, 0]]


@pytest.mark.parametrize("name", KERNELS)
def test_a_target_half_way_goes_to_the_even_step_or_the_lower_entry(name):
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5]])
    one = torch.ones(4, 1)
    affine = AffineCodec(one, one * 8, torch.tensor([0]), 0, 15)
    assert KERNELS[name](halves, halves, torch.eye(1), affine, torch.tensor([0]))[0].tolist() == [[8, 10, 10, 8]]
    table = TableCodec(torch.tensor([0.0, 1.0, 2.0, 3.0]), one, torch.tensor([0]))
    assert KERNELS[name](halves, halves, torch.eye(1), table, torch.tensor([0]))[0].tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_are_left_alone_and_may_be_views(name):
    targets, weights, feedback = problem(32, 50)
    codec = codec_of("affine", 50, 32)
    plain = KERNELS[name](targets, weights, feedback, codec, torch.arange(32))
    wide = torch.randn(64, 64)
    wide[::2, ::2] = feedback
    views = (targets.T.contiguous().T, weights.T.contiguous().T, wide[::2, ::2])
    before = [a.clone() for a in (*views, codec.scale, codec.zero)]
    again = KERNELS[name](*views, codec, torch.arange(32))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*views, codec.scale, codec.zero), strict=True))


def test_a_table_of_one_value_is_refused():
    with pytest.raises(InputError, match="two finite values"):
        TableCodec(torch.tensor([1.0]), torch.ones(2, 1), torch.tensor([0]))
