"""Evaluation windows against a count by hand."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import InputError
from bitwright.evaluation.windows import Window, make_windows


def cut(count, **options):
    return [(w.tokens[0].tolist(), w.first) for w in make_windows(range(count), **options)]


def test_non_overlapping_windows_drop_the_tail_and_the_first_token_of_each():
    assert cut(11, length=4) == [([0, 1, 2, 3], 1), ([4, 5, 6, 7], 1)]
    assert cut(8, length=4) == [([0, 1, 2, 3], 1), ([4, 5, 6, 7], 1)]
    assert [w.counted for w in make_windows(range(11), length=4)] == [3, 3]


def test_a_text_shorter_than_one_window_is_one_shorter_window():
    assert cut(3, length=8) == [([0, 1, 2], 1)]
    assert cut(3, length=8, stride=4) == [([0, 1, 2], 1)]


def test_sliding_windows_count_only_what_is_new():
    assert cut(10, length=6, stride=2) == [
        ([0, 1, 2, 3, 4, 5], 1),
        ([2, 3, 4, 5, 6, 7], 4),
        ([4, 5, 6, 7, 8, 9], 4),
    ]


def test_the_last_sliding_window_may_be_shorter():
    assert cut(9, length=6, stride=2) == [([0, 1, 2, 3, 4, 5], 1), ([2, 3, 4, 5, 6, 7], 4), ([4, 5, 6, 7, 8], 4)]


def test_stride_of_a_whole_window_keeps_the_tail():
    assert cut(11, length=4, stride=4) == [([0, 1, 2, 3], 1), ([4, 5, 6, 7], 1), ([8, 9, 10], 1)]
    assert cut(9, length=4, stride=4) == [([0, 1, 2, 3], 1), ([4, 5, 6, 7], 1)]  # a lone token predicts nothing


@pytest.mark.parametrize("count", [2, 5, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("length", "stride"), [(2, 1), (8, 1), (8, 3), (8, 7), (16, 8), (16, 15)])
def test_sliding_predicts_every_token_but_the_first_exactly_once_with_enough_context(count, length, stride):
    predicted, positions = [], []
    for window in make_windows(range(count), length=length, stride=stride):
        tokens = window.tokens[0].tolist()
        predicted += tokens[window.first :]
        positions += tokens[window.new :]
        for token in tokens[window.first :]:
            assert token - tokens[0] >= min(length - stride, token)
        assert len(tokens) <= length
    assert predicted == list(range(1, count))
    assert positions == list(range(count))


def test_the_limit_stops_early_and_changes_nothing_before():
    assert cut(100, length=8, limit=3) == cut(100, length=8)[:3]
    assert cut(100, length=8, stride=4, limit=3) == cut(100, length=8, stride=4)[:3]
    assert len(cut(100, length=8, limit=1000)) == 12


def test_windows_are_batches_of_one_in_int64():
    (window,) = make_windows([5, 6, 7], length=3)
    assert window.tokens.dtype == torch.int64
    assert window.tokens.shape == (1, 3)
    assert Window(window.tokens).first == 1


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (range(9), {"length": 1}),
        (range(9), {"length": 4, "stride": 0}),
        (range(9), {"length": 4, "stride": 5}),
        (range(9), {"length": 4, "limit": 0}),
        ([1], {"length": 4}),
        ([], {"length": 4}),
    ],
)
def test_what_predicts_nothing_is_refused(ids, options):
    with pytest.raises(InputError):
        make_windows(ids, **options)
