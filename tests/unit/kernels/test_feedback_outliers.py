"""Outliers in the error-feedback loop: they take their target in float16, and columns after them see what that leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.core.scheme import AffineCodec, TableCodec, tile_of_columns
from bitwright.kernels import numba_feedback, reference

KERNELS = {"reference": reference.feedback_block, "numba": numba_feedback.feedback_block}
kernels = pytest.mark.parametrize("name", KERNELS)


def problem(block=24, rows=70, *, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(block, rows, generator=rng) * 0.02
    targets = weights + torch.randn(block, rows, generator=rng) * 0.004
    feedback = torch.randn(block, block, generator=rng).triu(1) * 0.15 + torch.eye(block)
    keep = torch.rand(block, rows, generator=rng) < 0.1
    return targets, weights, feedback, keep


def codec_of(kind: str, rows: int, columns: int):
    tile = tile_of_columns(columns, 8)
    scale = torch.full((rows, int(tile.max()) + 1), 0.01)
    if kind == "table":
        return TableCodec(torch.tensor([-4.0, -1.5, 0.0, 1.0, 3.0]), scale, tile)
    return AffineCodec(scale, torch.full_like(scale, 3.3), tile, 0, 7)


@pytest.mark.parametrize("kind", ["affine", "table"])
@kernels
def test_errors_are_those_of_the_loop_written_out(name, kind):
    targets, weights, feedback, keep = problem()
    block, rows = targets.shape
    codec = codec_of(kind, rows, block)
    codes, errors = KERNELS[name](targets, weights, feedback, codec, torch.arange(block), keep)
    t = targets.double().numpy().copy()
    for j in range(block):
        if kind == "affine":
            value = (codes[j].double().numpy() - 3.3) * 0.01
        else:
            value = codec.table[codes[j].long()].double().numpy() * 0.01
        kept = keep[j].numpy()
        # The kernel's own codes: only what becomes of outliers is checked here. One float16 step is 2^-10 of the value at most.
        error = weights[j].double().numpy() - np.where(kept, t[j].astype(np.float16).astype(np.float64), value)
        tolerance = np.where(kept, np.abs(t[j]) * 2.0**-10 + 2.0**-24, 2e-6)
        assert (np.abs(errors[j].numpy() - error) <= tolerance).all()
        decoded = weights[j].numpy() - errors[j].numpy()
        assert np.abs(decoded - decoded.astype(np.float16).astype(np.float32))[kept].max(initial=0.0) < 2e-9
        t[j + 1 :] += feedback[j, j + 1 :, None].double().numpy() * errors[j].double().numpy()


@kernels
def test_no_outliers_and_none_kept_are_the_same_bits(name):
    targets, weights, feedback, keep = problem()
    codec = codec_of("affine", 70, 24)
    plain = KERNELS[name](targets, weights, feedback, codec, torch.arange(24))
    masked = KERNELS[name](targets, weights, feedback, codec, torch.arange(24), torch.zeros_like(keep))
    assert all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True))


@kernels
def test_an_outlier_does_not_change_other_rows(name):
    targets, weights, feedback, keep = problem()
    codec = codec_of("affine", 70, 24)
    plain = KERNELS[name](targets, weights, feedback, codec, torch.arange(24))
    keep[:, 1:] = False
    keep[3, 0] = True
    masked = KERNELS[name](targets, weights, feedback, codec, torch.arange(24), keep)
    assert all(torch.equal(a[:, 1:], b[:, 1:]) for a, b in zip(plain, masked, strict=True))
    assert not torch.equal(plain[1][:, 0], masked[1][:, 0])


def test_the_compiled_rounding_is_float16s():
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(4000, generator=rng) * 10 ** (torch.rand(4000, generator=rng) * 14 - 9)
    edges = [
        65519.0,
        65520.0,
        -70000.0,
        0.0,
        2.0**-25,
        2.0**-24,
        3 * 2.0**-25,
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        -(2.0**-14),
    ]
    x = torch.cat([wide, torch.tensor(edges)])[:, None].T.contiguous()
    one = AffineCodec(torch.ones(x.shape[1], 1), torch.zeros(x.shape[1], 1), torch.tensor([0]), 0, 1)
    zeros = torch.zeros_like(x)
    keep = torch.ones_like(x, dtype=torch.bool)
    errors = numba_feedback.feedback_block(x, zeros, torch.eye(1), one, torch.tensor([0]), keep)[1]
    assert torch.equal(-errors, x.half().float())
