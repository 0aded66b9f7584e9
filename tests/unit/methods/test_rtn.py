"""Round-to-nearest is the scheme's own quantizer."""

from __future__ import annotations

import pytest
import torch

from bitwright.core.method import Context, relative_loss
from bitwright.core.stats import Gram
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.methods.rtn import Rtn
from bitwright.schemes.affine import Affine

CONTEXT = Context(feedback=feedback_block)


def weight(rows=8, columns=64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_goes_to_its_nearest_code(symmetric):
    scheme, w = Affine(bits=3, group_size=16, symmetric=symmetric, scale_dtype="float32"), weight()
    tensor = Rtn().quantize(w, {}, scheme, CONTEXT).tensor
    scale = tensor.params["scale"].double()
    zero = tensor.params["zero"].double() if "zero" in tensor.params else torch.full_like(scale, 4)
    every = (torch.arange(8).double() - zero[..., None]) * scale[..., None]  # (rows, groups, levels)
    distance = (w.double().view(8, 4, 16, 1) - every.unsqueeze(2)).abs()
    mine = distance.gather(-1, tensor.codes.long().view(8, 4, 16, 1))[..., 0]
    torch.testing.assert_close(mine, distance.amin(-1), rtol=1e-5, atol=1e-9)


def test_loss_is_told_only_where_a_gram_matrix_was_given():
    w, scheme, gram = weight(), Affine(group_size=16), Gram(64)
    assert Rtn().quantize(w, {"gram": gram}, scheme, CONTEXT).loss is None
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)).double()
    gram.update(x)
    outcome = Rtn().quantize(w, {"gram": gram}, scheme, CONTEXT)
    error = ((w - outcome.tensor.decode()).double() @ x.T).square().sum() / (w.double() @ x.T).square().sum()
    assert outcome.loss == pytest.approx(float(error), rel=1e-4)


def test_relative_loss_of_many_rows_comes_from_evenly_spaced_ones():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    gram = x.T @ x
    w = torch.randn(1000, 16, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1000, 16, generator=torch.Generator().manual_seed(3)) * 0.1
    rows = range(0, 1000, 4)  # 1000 rows, at most 256: every fourth
    expected = (noise[rows] @ x.T).double().square().sum() / (w[rows] @ x.T).double().square().sum()
    assert relative_loss(w, w - noise, gram) == pytest.approx(float(expected), rel=1e-5)
    assert relative_loss(torch.zeros(4, 16), torch.ones(4, 16), gram) == 0.0
