"""LLM.int8 weights against the formula, and against bitsandbytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.errors import NumericError
from bitwright.schemes.absmax_int8 import AbsmaxInt8


def weight(rows=16, columns=96):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def test_a_row_by_hand():
    params, codes = AbsmaxInt8().quantize(torch.tensor([[1.0, -2.0, 4.0]]))
    assert (codes.int() - 128).tolist() == [[32, -64, 127]]  # 31.75, -63.5 (half to even), 127
    assert params["absmax"].tolist() == [[4.0]]


def test_codes_and_values_follow_the_formula():
    w, scheme = weight(), AbsmaxInt8()
    params, codes = scheme.quantize(w)
    half = w.numpy().astype(np.float16).astype(np.float64)
    absmax = np.abs(half).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(params["absmax"].numpy(), absmax)
    exact = half * 127 / absmax
    steps = codes.numpy().astype(np.float64) - 128
    assert (np.abs(steps - exact) <= 0.5 + 1e-5).all()
    np.testing.assert_allclose(scheme.decode(codes, params).numpy(), steps * absmax / 127, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_magnitudes_equal_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    for values in (weight(), weight(64, 1024) * 30, torch.randint(-127, 128, (8, 64)).float()):
        w = values.to(dtype)
        theirs, absmax, _ = functional.int8_vectorwise_quant(w.to(torch.float16))
        params, codes = AbsmaxInt8().quantize(w.float())
        assert torch.equal((codes.int() - 128).to(torch.int8), theirs)
        assert torch.equal(params["absmax"].view(-1), absmax)


def test_rows_of_zeros_and_of_float16_subnormals_stay_finite():
    w = weight(4)
    w[0], w[1], w[2] = 0.0, 1e-7, 1e-30
    params, codes = AbsmaxInt8().quantize(w)
    decoded = AbsmaxInt8().decode(codes, params)
    assert not decoded[0].any()
    assert not decoded[2].any()
    torch.testing.assert_close(decoded[1], torch.full((96,), 2.0**-23))


def test_weights_beyond_float16_are_refused_with_a_mend():
    w = weight()
    w[3, 5] = 70000.0
    with pytest.raises(NumericError, match="overflows float16") as caught:
        AbsmaxInt8().quantize(w)
    assert "affine" in caught.value.mend


def test_refitting_is_least_squares():
    w, scheme = weight(4), AbsmaxInt8()
    params, codes = scheme.quantize(w)
    h = torch.rand(96, generator=torch.Generator().manual_seed(1))
    better = scheme.refit(w, codes, params, weights=h)
    steps, target = (codes.double() - 128).numpy(), w.double().numpy()
    for row in range(4):
        root = np.sqrt(h.double().numpy())
        best = np.linalg.lstsq((steps[row] * root)[:, None], target[row] * root, rcond=None)[0]
        np.testing.assert_allclose(float(better["absmax"][row, 0]) / 127, best[0], rtol=1e-5)
