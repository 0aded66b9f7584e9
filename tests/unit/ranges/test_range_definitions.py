"""Each range finder against its definition, written out plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.stats import Histogram, MinMax, MovingMinMax
from bitwright.errors import InputError
from bitwright.ranges.entropy import EntropyRange
from bitwright.ranges.minmax import MinMaxRange
from bitwright.ranges.moving_average import MovingAverageRange
from bitwright.ranges.mse import MseRange, histogram_points, squared_error
from bitwright.ranges.percentile import PercentileRange

INT8 = InputScheme(strategy="tensor", dynamic=False)
ASYM = InputScheme(strategy="tensor", dynamic=False, symmetric=False)
FP8 = InputScheme(number="float", strategy="tensor", dynamic=False)


def student(freedom: float, tokens: int = 2000, columns: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(freedom, (tokens, columns))).float()


def gated(seed: int = 0) -> torch.Tensor:
    """One-sided, as behind SiLU: a long positive tail, no negative value below -0.28."""
    return torch.nn.functional.silu(student(3, seed=seed))


def histogram(x: torch.Tensor, bins: int = 2048) -> Histogram:
    seen = Histogram(x.shape[1], bins=bins)
    seen.update(x)
    return seen


# --- extremes and averages -----------------------------------------------------------------------------------------------


def test_minmax_is_the_extremes_of_all_columns():
    seen, x = MinMax(16), student(3)
    seen.update(x)
    assert MinMaxRange().find({"min_max": seen}, INT8) == (float(x.min()), float(x.max()))


def test_moving_average_follows_its_recursion():
    seen, parts = MovingMinMax(16), student(3).split(100)
    for part in parts:
        seen.update(part)
    low = high = None
    for part in parts:
        a, b = float(part.min()), float(part.max())
        low, high = (a, b) if low is None else (0.9 * low + 0.1 * a, 0.9 * high + 0.1 * b)
    assert MovingAverageRange(factor=0.1).find({"moving_min_max": seen}, INT8) == pytest.approx((low, high))


# --- percentile ------------------------------------------------------------------------------------------------------------


def beyond(a: np.ndarray, limit: float) -> int:
    return int((a > limit).sum())


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99])
@pytest.mark.parametrize("data", [student(3), gated(), student(3).bfloat16()], ids=["student", "gated", "bfloat16"])
def test_percentiles_leave_their_share_beyond_to_the_width_of_a_bin(percentile, data):
    seen, a = histogram(data), data.double().numpy()
    share = (1 - percentile / 100) * a.size
    low, high = PercentileRange(percentile=percentile).find({"histogram": seen}, INT8)
    limit = max(-low, high)
    assert beyond(np.abs(a), limit + seen.width) <= share <= beyond(np.abs(a), limit - seen.width)
    assert low == max(-limit, seen.low)
    assert high == min(limit, seen.high)
    low, high = PercentileRange(percentile=percentile).find({"histogram": seen}, ASYM)
    assert beyond(a, high + seen.width) <= share <= beyond(a, high - seen.width)
    assert beyond(-a, -low + seen.width) <= share <= beyond(-a, -low - seen.width)


def test_percentiles_of_dense_values_are_those_of_numpy():
    x = student(300)
    seen, a = histogram(x), x.double().numpy()
    _, high = PercentileRange(percentile=95.0).find({"histogram": seen}, INT8)
    assert high == pytest.approx(np.percentile(np.abs(a), 95.0), abs=seen.width)
    low, high = PercentileRange(percentile=95.0).find({"histogram": seen}, ASYM)
    assert (low, high) == pytest.approx(tuple(np.percentile(a, [5.0, 95.0])), abs=seen.width)


def test_percentile_of_everything_is_minmax():
    x = student(3)
    assert PercentileRange(percentile=100).find({"histogram": histogram(x)}, ASYM) == (float(x.min()), float(x.max()))


def test_percentile_does_not_count_zeros():
    x = torch.zeros(10_000, 16)
    x[:100] = student(30, 100)
    inside = PercentileRange(percentile=99.0)
    assert inside.find({"histogram": histogram(x)}, INT8) == inside.find({"histogram": histogram(x[:100])}, INT8)


# --- entropy -----------------------------------------------------------------------------------------------------------------


def migacz(counts: np.ndarray, levels: int) -> tuple[int, list[float]]:
    """The pseudo-code of the GTC 2017 talk, slide 38, bin by bin."""
    divergences = []
    for i in range(levels, len(counts) + 1):
        p = counts[:i].astype(float)
        beyond = counts[i:].sum()
        q = np.zeros(i)
        for level in range(levels):
            start, stop = level * i // levels, (level + 1) * i // levels
            filled = counts[start:stop] > 0
            if filled.any():
                q[start:stop][filled] = counts[start:stop].sum() / filled.sum()
        p[-1] += beyond
        p, q = p / p.sum(), q / q.sum()
        terms = [a * math.log(a / b) if b > 0 else math.inf for a, b in zip(p, q, strict=True) if a > 0]
        divergences.append(math.fsum(terms))
    return levels + int(np.argmin(divergences)), divergences


@pytest.mark.parametrize("data", [student(3), gated(), student(30), student(2).bfloat16()])
def test_entropy_finds_what_the_pseudo_code_finds(data):
    seen = histogram(data, bins=512)
    counts = seen.magnitudes.numpy()
    counts = counts[: counts.nonzero()[0].max() + 1]
    bins, divergences = migacz(counts, 32)
    low, high = EntropyRange(levels=32).find({"histogram": seen}, INT8)
    limit = (bins + 0.5) * seen.width
    assert (low, high) == (max(-limit, seen.low), min(limit, seen.high))
    assert divergences[bins - 32] == min(divergences)


def test_entropy_cuts_both_ends_of_asymmetric_inputs_at_the_same_magnitude():
    seen = histogram(gated())
    assert EntropyRange().find({"histogram": seen}, ASYM) == EntropyRange().find({"histogram": seen}, INT8)
    assert EntropyRange().find({"histogram": seen}, ASYM)[0] == seen.low


def test_entropy_of_float8_clips_less_than_that_of_int8():
    seen = histogram(student(3, tokens=40_000))
    int8, fp8 = (EntropyRange().find({"histogram": seen}, inputs)[1] for inputs in (INT8, FP8))
    assert int8 < 0.5 * fp8


# --- mse ---------------------------------------------------------------------------------------------------------------------


def error(x: torch.Tensor, inputs: InputScheme, found: tuple[float, float]) -> float:
    """Mean squared error on the values themselves, in float64, with the quantizer written out."""
    low, high = found
    a = x.double().numpy()
    if inputs.number == "float":
        scale = max(-low, high) / 448
        q = torch.from_numpy(np.clip(a / scale, -448, 448)).float().to(torch.float8_e4m3fn).double().numpy() * scale
    elif inputs.symmetric:
        scale = max(-low, high) / 127
        q = np.clip(np.round(a / scale), -128, 127) * scale
    else:
        scale = (high - low) / 255
        zero = np.clip(np.round(-128 - low / scale), -128, 127)
        q = (np.clip(np.round(a / scale + zero), -128, 127) - zero) * scale
    return float(np.mean((q - a) ** 2))


@pytest.mark.parametrize("inputs", [INT8, ASYM, FP8], ids=["int8", "asym", "fp8"])
@pytest.mark.parametrize("data", [student(3), gated(), student(300), student(2).bfloat16(), student(3) + 4])
def test_mse_is_never_worse_than_the_full_range(data, inputs):
    seen = histogram(data)
    found = MseRange().find({"histogram": seen}, inputs)
    points = histogram_points(seen)
    full = (seen.low, seen.high)
    assert squared_error(points, inputs, *found) <= squared_error(points, inputs, *full)
    # What holds for the histogram holds for the values, but for the width of its bins.
    assert error(data, inputs, found) <= 1.001 * error(data, inputs, full)


@pytest.mark.parametrize("inputs", [INT8, ASYM], ids=["int8", "asym"])
@pytest.mark.parametrize("data", [student(3), gated()], ids=["student", "gated"])
def test_mse_is_nearly_the_best_of_all_clips(data, inputs):
    seen = histogram(data)
    found = error(data, inputs, MseRange().find({"histogram": seen}, inputs))
    highs = seen.high * np.linspace(0.02, 1, 60)
    lows = seen.low * (np.linspace(0.02, 1, 60) if inputs.symmetric else np.array([1.0, 0.8, 0.6, 0.4, 0.2]))
    pairs = zip(lows, highs, strict=True) if inputs.symmetric else ((a, b) for a in lows for b in highs)
    assert found <= 1.05 * min(error(data, inputs, pair) for pair in pairs)
    assert found < 0.95 * error(data, inputs, (seen.low, seen.high))


def test_mse_points_stand_for_all_values_but_zeros():
    x = gated()
    x[:5] = 0
    values, weights = histogram_points(histogram(x))
    a = x.double()
    assert float(weights.sum()) == pytest.approx(int((a != 0).sum()))
    assert float((weights * values).sum()) == pytest.approx(float(a.sum()), rel=5e-3)
    assert float((weights * values.double() ** 2).sum()) == pytest.approx(float((a**2).sum()), rel=1e-3)
    assert float(a.min()) <= float(values.min())
    assert float(values.max()) <= float(a.max())


def test_ranges_of_inputs_that_scale_themselves_are_the_whole():
    x = student(2)
    stats = {"histogram": histogram(x)}
    whole = (float(x.min()), float(x.max()))
    nvfp4 = InputScheme(bits=4, number="float", strategy="tensor_group", group_size=16, dynamic=False)
    for inputs in (nvfp4, InputScheme()):
        assert MseRange().find(stats, inputs) == whole
        assert EntropyRange().find(stats, inputs) == whole


@pytest.mark.parametrize("make", [
    lambda: PercentileRange(percentile=50), lambda: PercentileRange(percentile=100.1), lambda: MovingAverageRange(factor=0),
    lambda: MovingAverageRange(factor=1.5), lambda: MseRange(steps=0), lambda: MseRange(smallest=1.0), lambda: EntropyRange(levels=1),
])  # fmt: skip
def test_options_out_of_range_are_refused_with_a_mend(make):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.mend
