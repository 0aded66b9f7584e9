"""Formulas of layer errors against the same sums written out in numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.evaluation.layer_error import OutputError, energy, ratio, snr_db, top_share, weight_histogram


@pytest.fixture
def case():
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(24, 150)).astype(np.float32)
    difference = 0.01 * rng.normal(size=weight.shape).astype(np.float32)
    x = rng.normal(size=(1300, 150)).astype(np.float32)
    x[:, 7] *= 30
    return x, weight, difference


def filled(case):
    x, weight, difference = (torch.from_numpy(value) for value in case)
    sums = OutputError(150)
    for piece in torch.split(x, 700):
        sums.update(piece, weight, difference)
    return sums


def test_output_error_is_that_of_the_products_in_float64(case):
    x, weight, difference = (value.astype(np.float64) for value in case)
    sums = filled(case)
    expected = np.square(x @ difference.T).sum() / np.square(x @ weight.T).sum()
    assert sums.relative == pytest.approx(expected, rel=1e-6)
    assert sums.tokens == 1300
    assert snr_db(sums.relative) == pytest.approx(-10 * np.log10(expected), rel=1e-6)


def test_top_channels_take_the_diagonal_of_the_gram_matrix(case):
    x, _, difference = (value.astype(np.float64) for value in case)
    parts = np.diag(x.T @ x) * np.diag(difference.T @ difference)
    expected = np.sort(parts)[::-1][:2].sum() / parts.sum()  # 1 % of 150 channels, rounded up
    assert filled(case).top_channels(torch.from_numpy(case[2])) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.5  # the channel that was made large


def test_equal_weights_have_no_error_and_no_decibels(case):
    x, weight, _ = (torch.from_numpy(value) for value in case)
    sums = OutputError(150)
    sums.update(x, weight, torch.zeros_like(weight))
    assert sums.relative == 0.0
    assert snr_db(sums.relative) is None
    assert sums.top_channels(torch.zeros_like(weight)) == 0.0
    assert top_share(torch.zeros(5)) == 0.0


def test_without_a_signal_any_error_is_whole():
    assert ratio(energy(torch.ones(3)), energy(torch.zeros(3))) == 1.0
    assert ratio(0.0, 0.0) == 0.0


def test_histogram_bins_are_those_of_a_sorted_search():
    rng = np.random.default_rng(5)
    source = rng.normal(size=(70, 33)).astype(np.float32)
    model = (source + 0.3 * rng.normal(size=source.shape)).astype(np.float32)
    found = weight_histogram("m", torch.from_numpy(source), torch.from_numpy(model), rows=16)
    edges = np.asarray(found.edges)
    assert len(found.source) == len(found.model) == 64 == len(edges) - 1
    assert (edges[0], edges[-1]) == (source.min(), source.max())
    for values, shares in ((source, found.source), (model, found.model)):
        below = np.searchsorted(np.sort(values.ravel().astype(np.float64)), edges, side="left")
        below[-1] = (values <= edges[-1]).sum()
        assert np.abs(np.diff(below) / values.size - np.asarray(shares)).max() <= 1 / values.size
    assert sum(found.source) == pytest.approx(1)
    assert sum(found.model) == pytest.approx(((model >= source.min()) & (model <= source.max())).mean())


def test_constant_weights_have_a_histogram():
    found = weight_histogram("m", torch.full((2, 4), 3.0), torch.full((2, 4), 3.0), bins=4)
    assert found.edges == (2.5, 2.75, 3.0, 3.25, 3.5)
    assert found.source == found.model == (0.0, 0.0, 1.0, 0.0)
