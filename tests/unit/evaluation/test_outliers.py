"""Outlier figures against numpy and scipy in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from bitwright.errors import InputError
from bitwright.evaluation.outliers import InputProbe, LayerInput, OutlierReport, summarize

COLUMNS = 64


def normal(tokens: int = 2000) -> torch.Tensor:
    return torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(0))


def look(x: torch.Tensor, *, threshold: float = 6.0, top: int = 3, batch: int = 128) -> LayerInput:
    probe = InputProbe(x.shape[1], threshold)
    for part in x.split(batch):
        probe.update(part)
    return summarize(probe, block=2, label="mlp.up_proj", layers=("model.layers.2.mlp.up_proj",), top=top)


def test_figures_are_those_of_their_definitions():
    x = (normal() * torch.logspace(-1, 1, COLUMNS)).bfloat16()
    seen, a = look(x), x.double().numpy()
    largest = np.abs(a).max(0)
    assert seen.tokens == 2000
    assert seen.largest == largest.max()
    assert seen.sigma == pytest.approx(a.std())
    assert seen.kurtosis == pytest.approx(scipy.stats.kurtosis(a, None, fisher=False))
    assert seen.share_above == (np.abs(a) > 6).mean()
    assert seen.share_above_6_sigma == pytest.approx((np.abs(a) > 6 * a.std()).mean(), rel=0.02, abs=2 / a.size)
    assert seen.lost_bits_tensor == pytest.approx(math.log2(largest.max() / np.median(largest)))
    by_token = np.log2(np.abs(a).max(1) / np.median(largest)).mean()
    assert seen.lost_bits_token == pytest.approx(by_token)
    order = np.argsort(-largest, kind="stable")[:3]
    assert [c.index for c in seen.channels] == order.tolist()
    assert [c.ratio for c in seen.channels] == pytest.approx((largest / np.median(largest))[order].tolist())
    np.testing.assert_array_equal(seen.profile, largest)


def test_normal_inputs_are_fine():
    seen = look(normal())
    assert seen.advice == "fine"
    assert seen.kurtosis == pytest.approx(3, abs=0.1)
    assert seen.lost_bits_tensor < 1


def test_outlier_channels_are_found_and_call_for_smoothing():
    x = normal()
    x[:, [7, 40]] *= torch.tensor([20.0, 12.0])
    seen = look(x)
    assert [c.index for c in seen.channels][:2] == [7, 40]
    assert seen.channels[0].ratio == pytest.approx(20, rel=0.3)
    assert seen.lost_bits_tensor == pytest.approx(math.log2(20), abs=0.5)
    assert seen.advice == "smoothquant"
    x[:, 7] *= 50
    assert look(x).advice == "keep"


def test_outlier_tokens_call_for_a_scale_per_token():
    x = normal()
    x[100, 5] = 400.0
    seen = look(x)
    assert seen.channels[0].index == 5
    assert seen.lost_bits_tensor > 6
    assert seen.lost_bits_token < 1
    assert seen.advice == "per-token"


def test_channels_and_tokens_that_are_always_zero_do_not_count():
    x = normal()
    wide = torch.cat([x, torch.zeros(2000, 3 * COLUMNS)], dim=1)
    wide = torch.cat([wide, torch.zeros(500, 4 * COLUMNS)])
    plain, padded = look(x), look(wide)
    assert padded.lost_bits_tensor == plain.lost_bits_tensor
    assert padded.lost_bits_token == plain.lost_bits_token
    assert padded.channels == plain.channels


def test_inputs_that_are_all_zero_have_plain_figures():
    seen = look(torch.zeros(10, COLUMNS))
    assert (seen.largest, seen.sigma, seen.kurtosis, seen.share_above_6_sigma) == (0, 0, None, 0)
    assert (seen.lost_bits_tensor, seen.lost_bits_token, seen.advice) == (0, 0, "fine")
    assert "NaN" not in json.dumps(seen.to_json())


def test_batches_change_nothing():
    x = normal() * torch.logspace(-2, 2, COLUMNS)
    a, b = look(x, batch=7), look(x, batch=2000)
    assert (a.largest, a.share_above, a.share_above_6_sigma, a.channels) == (
        b.largest, b.share_above, b.share_above_6_sigma, b.channels,
    )  # fmt: skip
    assert a.sigma == pytest.approx(b.sigma, rel=1e-12)
    assert a.kurtosis == pytest.approx(b.kurtosis, rel=1e-10)


def test_values_that_are_not_finite_are_noticed():
    probe = InputProbe(COLUMNS, 6.0)
    probe.update(normal())
    assert probe.finite
    x = normal()
    x[3, 3] = math.inf
    probe.update(x)
    assert not probe.finite


def test_an_input_that_no_token_reached_is_an_error():
    with pytest.raises(InputError, match="no token reached"):
        look(torch.zeros(0, COLUMNS))
    with pytest.raises(InputError, match="not above 0"):
        InputProbe(COLUMNS, 0.0)


def test_report_is_plain_json_that_names_the_worst():
    spiky = normal()
    spiky[:, 3] *= 30
    report = OutlierReport("m", "text.txt", 2000, 6.0, (look(normal()), look(spiky, top=1)))
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["schema"] == "bitwright-analyze-1"
    assert found["advice"] == {"fine": 1, "per-token": 0, "smoothquant": 1, "keep": 0}
    assert report.worst is report.inputs[1]
    second = found["inputs"][1]
    assert second["channels"] == [
        {"index": 3, "largest": report.worst.largest, "ratio": second["channels"][0]["ratio"]}
    ]
    assert second["layers"] == ["model.layers.2.mlp.up_proj"]
    assert "SmoothQuant" in second["meaning"]
    assert "profile" not in second
