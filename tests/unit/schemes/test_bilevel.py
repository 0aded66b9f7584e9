"""Bilevel integers against their formulas in float64, and their announced size against what the native layout stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.core.quantized import QuantizedTensor
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.layouts.native import Native
from bitwright.schemes.bilevel import Bilevel

DENSE = {"outliers": 0.0}


def weight(rows=40, columns=96, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def fields(words: torch.Tensor, bits: int, count: int) -> np.ndarray:
    """The first ``count`` fields of a little-endian bit stream."""
    stream = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    return (stream * (1 << np.arange(bits))).sum(1)


def statistic(name: str, params, scheme: Bilevel, shape: tuple[int, int], bits: int) -> np.ndarray:
    """(rows, groups) float64: low + code * step, row by row and group by group."""
    rows, groups = shape[0], shape[1] // scheme.group_size
    codes = fields(params[f"{name}_codes"], bits, rows * groups).reshape(rows, groups)
    low, step = (params[f"{name}_{part}"].double().numpy() for part in ("low", "step"))
    return np.array(
        [
            [low[r // scheme.super_group, g] + codes[r, g] * step[r // scheme.super_group, g] for g in range(groups)]
            for r in range(rows)
        ]
    )


SCHEMES = [
    Bilevel(**DENSE),
    Bilevel(bits=2, group_size=24, super_group=7, scale_bits=4, zero_bits=5, **DENSE),
    Bilevel(bits=4, group_size=32, super_group=64, scale_bits=6, zero_bits=0, **DENSE),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.describe())


@schemes
def test_decode_is_the_formula(scheme):
    w = weight()
    params, codes = scheme.quantize(w)
    scale = statistic("scale", params, scheme, (40, 96), scheme.scale_bits)
    zero = (
        statistic("zero", params, scheme, (40, 96), scheme.zero_bits) if scheme.zero_bits else 2.0 ** (scheme.bits - 1)
    )
    wide = (np.repeat(v, scheme.group_size, axis=1) for v in (scale, np.broadcast_to(zero, scale.shape)))
    scale, zero = wide
    expected = (codes.double().numpy() - zero) * scale
    np.testing.assert_allclose(scheme.decode(codes, params).double().numpy(), expected, rtol=1e-5, atol=1e-8)
    nearest = np.clip(np.rint(w.double().numpy() / scale + zero), 0, 2**scheme.bits - 1)
    assert (np.abs(nearest - codes.numpy()) > 0).mean() < 1e-3  # rounding ties of float32


@schemes
def test_second_level_codes_are_within_half_a_step(scheme):
    w = weight()
    loose = scheme.fit(w)
    stored = scheme.finish(loose, (40, 96))
    for name, bits in (("scale", scheme.scale_bits), ("zero", scheme.zero_bits)):
        if not bits:
            continue
        found = statistic(name, stored, scheme, (40, 96), bits)
        wanted = loose[name].double().numpy()
        if name == "zero":
            now = statistic("scale", stored, scheme, (40, 96), scheme.scale_bits)
            half = (2**scheme.bits - 1) / 2
            wanted = np.clip(half - (half - wanted) * loose["scale"].double().numpy() / now, 0, 2 * half)
        step = np.repeat(stored[f"{name}_step"].double().numpy(), scheme.super_group, axis=0)[:40]
        low = np.repeat(stored[f"{name}_low"].double().numpy(), scheme.super_group, axis=0)[:40]
        slack = 2.0**-10 * (low + step * 2**bits)  # float16 of both parameters
        assert (np.abs(found - wanted) <= step / 2 + slack).all()


def test_loose_parameters_spread_over_the_range_of_a_group():
    w = weight()
    params = Bilevel(**DENSE).fit(w)
    tiles = w.double().numpy().reshape(40, 6, 16)
    low, high = np.minimum(tiles.min(-1), 0), np.maximum(tiles.max(-1), 0)
    np.testing.assert_allclose(params["scale"].numpy(), (high - low) / 7, rtol=1e-5)
    np.testing.assert_allclose(params["zero"].numpy(), -low / ((high - low) / 7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighed", [False, True])
def test_refit_is_a_weighted_regression_line(weighed):
    scheme, w = Bilevel(**DENSE), weight(8, 32)
    h = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1 if weighed else None
    params = scheme.fit(w, clip=0.8)
    codes = scheme.encode(w, params)
    found = scheme.refit(w, codes, params, weights=h)
    for row in range(8):
        for group in range(2):
            cut = slice(16 * group, 16 * group + 16)
            root = np.sqrt(h[cut].double().numpy()) if weighed else np.ones(16)
            design = np.stack([codes[row, cut].double().numpy(), np.ones(16)], 1) * root[:, None]
            slope, offset = np.linalg.lstsq(design, w[row, cut].double().numpy() * root, rcond=None)[0]
            assert float(found["scale"][row, group]) == pytest.approx(slope, rel=1e-4)
            assert float(found["zero"][row, group]) == pytest.approx(-offset / slope, rel=1e-4)


def test_refit_leaves_a_group_with_one_code_as_it_was():
    scheme = Bilevel(**DENSE)
    w = torch.full((2, 16), 0.5)
    params = {"scale": torch.full((2, 1), 0.1), "zero": torch.full((2, 1), 2.0)}
    found = scheme.refit(w, torch.full((2, 16), 7, dtype=torch.uint8), params, weights=None)
    assert all(torch.equal(found[name], params[name]) for name in params)


@schemes
def test_stored_parameters_stay_as_they_are(scheme):
    w = weight()
    stored, codes = scheme.quantize(w)
    assert scheme.finish(stored, (40, 96)) is stored
    if scheme.zero_bits:
        assert scheme.refit(w, codes, stored, weights=None) is stored


@schemes
def test_rows_that_were_pruned_stay_zero(scheme):
    w = weight()
    w[[3, 17]] = 0
    params, codes = scheme.quantize(w)
    assert not scheme.decode(codes, params)[[3, 17]].any()


@pytest.mark.parametrize("outliers", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(256, 480), (40, 96), (37, 192)])
@schemes
def test_bits_per_weight_is_what_native_files_hold(scheme, shape, outliers):
    """All but the shape, which no scheme answers for, and the padding of code rows to whole words."""
    scheme = Bilevel(**{**{k: v for k, v in scheme.to_spec().items() if k != "kind"}, "outliers": outliers})
    rows, columns = shape
    stored = Native().tensors("m", scheme, shape)
    size = 8 * sum(spec.nbytes for spec in stored if not spec.name.endswith(".shape"))
    padding = rows * (-(columns * scheme.bits) % 32)
    assert scheme.bits_per_weight(shape) * rows * columns == pytest.approx(size - padding, abs=1e-3)
    assert scheme.outlier_count(shape) == round(outliers / 100 * rows * columns)


def test_sizes_by_hand():
    """256 x 256: 3 bits, (3 + 3) / 16 for codes of the first level, 4 * 16 / 256 for the second."""
    assert Bilevel(**DENSE).bits_per_weight((256, 256)) == 3 + 6 / 16 + 64 / 256
    # 655 outliers of 32 bits, 257 row starts of 32 bits.
    assert Bilevel(outliers=1.0).bits_per_weight((256, 256)) == 3.625 + (655 * 32 + 257 * 32) / 65536


def test_native_gives_outliers_back():
    scheme, w = Bilevel(outliers=1.0), weight(64, 96)
    params, codes = scheme.quantize(w)
    count = scheme.outlier_count((64, 96))
    indices = torch.randperm(64 * 96, generator=torch.Generator().manual_seed(2))[:count].sort().values
    q = QuantizedTensor(scheme, (64, 96), codes, params, (indices, torch.arange(count).half()))
    stored = Native().pack("m", q)
    assert Native().unpack("m", scheme, (64, 96), stored).equals(q)
    assert sum(t.nbytes for t in stored.values()) == sum(s.nbytes for s in Native().tensors("m", scheme, (64, 96)))


def test_columns_come_loose():
    scheme, w = SCHEMES[0], weight()
    params, codes = scheme.quantize(w)
    part = scheme.columns(params, 16, 48, (40, 96))
    assert torch.equal(scheme.decode(codes[:, 16:48].contiguous(), part), scheme.decode(codes, params)[:, 16:48])
    with pytest.raises(InputError, match="tile"):
        scheme.columns(params, 8, 24, (40, 96))


def test_scales_that_overflow_float16_are_refused():
    with pytest.raises(NumericError, match="overflows float16"):
        Bilevel(**DENSE).quantize(weight() * 1e8)


@pytest.mark.parametrize(
    "options",
    [{"bits": 5}, {"group_size": 0}, {"super_group": 0}, {"scale_bits": 0}, {"zero_bits": 9}, {"outliers": -1.0}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(PlanError):
        Bilevel(**options)
