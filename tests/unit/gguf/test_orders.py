"""Row orders against orders written out by hand."""

import numpy as np
import pytest

from bitwright.errors import InputError
from bitwright.gguf.orders import groups_to_parts, interleave, rope_keys, rope_queries, thirds_of_heads
from bitwright.gguf.settings import Model


def model(**config):
    return Model(where="config.json", config=config, aliases={})


def test_halves_of_a_head_become_neighbours():
    assert interleave(8, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleave(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rotating_neighbours_of_reordered_rows_equals_rotating_halves():
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal(8), rng.standard_normal(4)
    cos, sin = np.cos(angles), np.sin(angles)
    halves = np.concatenate([x[:4] * cos - x[4:] * sin, x[4:] * cos + x[:4] * sin])
    order = interleave(8, 1)
    y = x[order]
    pairs = np.stack([y[0::2] * cos - y[1::2] * sin, y[1::2] * cos + y[0::2] * sin], 1).reshape(-1)
    np.testing.assert_allclose(pairs, halves[order], rtol=1e-12)


def test_keys_are_ordered_by_their_own_heads():
    found = model(num_attention_heads=4, num_key_value_heads=2)
    assert rope_queries(found, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert rope_keys(found, 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_heads_in_turn_become_all_queries_then_all_keys_then_all_values():
    # two heads of size two: q q k k v v | q q k k v v
    order = thirds_of_heads(model(num_attention_heads=2), 12)
    assert order.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_groups_of_queries_with_their_key_and_value():
    # two groups of two heads of size one: q q k v | q q k v
    order = groups_to_parts(model(num_attention_heads=4, num_key_value_heads=2), 8)
    assert order.tolist() == [0, 1, 4, 5, 2, 6, 3, 7]


def test_one_key_for_all_heads_stays_in_place():
    assert groups_to_parts(model(num_attention_heads=3, num_key_value_heads=1), 10).tolist() == list(range(10))


@pytest.mark.parametrize("rows", [7, 12])
def test_rows_that_heads_do_not_divide_are_refused(rows):
    with pytest.raises(InputError, match="heads"):
        interleave(rows, 4)
