"""The bit stream against Python integers and against the worked words that checkpoint readers agree on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.bits import pack_words, packed_words, unpack_words
from bitwright.errors import InputError


def words_of(fields: list[int], bits: int) -> list[int]:
    """One row as one big integer, cut into 32-bit words."""
    stream = sum(field << (bits * i) for i, field in enumerate(fields))
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(fields) * bits // 32))]


def unsigned(packed: torch.Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()]


@pytest.mark.parametrize(
    ("bits", "fields", "words"),
    [
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (8, [1, 2, 3, 4], [0x04030201]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (8, [0, 127, 128, 255], [0xFF807F00]),
    ],
)
def test_worked_words(bits, fields, words):
    codes = torch.tensor([fields], dtype=torch.uint8)
    assert unsigned(pack_words(codes, bits)) == [words]
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, len(fields)), codes)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_width_and_count_is_the_integer_stream_and_comes_back(data):
    bits = data.draw(st.integers(1, 8))
    rows = data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, 100))
    field = st.integers(0, 2**bits - 1)
    codes = data.draw(st.lists(st.lists(field, min_size=count, max_size=count), min_size=rows, max_size=rows))
    packed = pack_words(torch.tensor(codes), bits)
    assert unsigned(packed) == [words_of(row, bits) for row in codes]
    assert unpack_words(packed, bits, count).tolist() == codes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_larger_than_one_piece(bits):
    codes = torch.randint(0, 2**bits, (37, 20_004), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_words(codes, bits)
    assert packed.shape == (37, packed_words(20_004, bits))
    assert unsigned(packed[36:]) == [words_of(codes[36].tolist(), bits)]
    assert torch.equal(unpack_words(packed, bits, 20_004), codes)


def test_views_that_are_neither_contiguous_nor_aligned():
    codes = torch.randint(0, 16, (64, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert unsigned(pack_words(codes.t(), 4)) == [words_of(row, 4) for row in codes.t().tolist()]
    shifted = codes.view(-1)[3 : 3 + 1024].view(16, 64)
    assert unsigned(pack_words(shifted, 4)) == [words_of(row, 4) for row in shifted.tolist()]
    packed = pack_words(codes[:, :32], 8)
    assert torch.equal(unpack_words(packed.t().contiguous().t(), 8, 32), codes[:, :32])


def test_surplus_words_are_ignored_and_codes_are_not_changed():
    codes = torch.arange(16, dtype=torch.uint8)[None]
    before = codes.clone()
    packed = torch.cat([pack_words(codes, 4), torch.full((1, 3), -1, dtype=torch.int32)], dim=1)
    stored = packed.clone()
    assert torch.equal(unpack_words(packed, 4, 16), codes)
    assert torch.equal(codes, before)
    assert torch.equal(packed, stored)


def test_empty_weights():
    assert pack_words(torch.empty(0, 8, dtype=torch.uint8), 4).shape == (0, 1)
    assert unpack_words(torch.empty(0, 1, dtype=torch.int32), 4, 8).shape == (0, 8)
    assert pack_words(torch.empty(4, 0, dtype=torch.uint8), 4).shape == (4, 0)


@pytest.mark.parametrize("codes", [[[0, 16]], [[-1, 3]], [[0, 300]]])
def test_codes_that_would_spoil_their_neighbours_are_refused(codes):
    with pytest.raises(InputError, match="do not fit into 4 bits"):
        pack_words(torch.tensor(codes), 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_unknown_widths_are_refused(bits):
    with pytest.raises(InputError, match="bits"):
        pack_words(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(InputError, match="bits"):
        unpack_words(torch.zeros(1, 8, dtype=torch.int32), bits, 1)


def test_too_few_words_are_refused():
    with pytest.raises(InputError, match="hold fewer than 9 fields"):
        unpack_words(torch.zeros(1, 1, dtype=torch.int32), 4, 9)


def test_single_rows_and_columns_of_transposes():
    """PyTorch calls them contiguous whatever their strides are, and refuses to reinterpret them."""
    column = torch.arange(32, dtype=torch.uint8)[:, None] % 16
    packed = pack_words(column.t(), 4)
    assert unsigned(packed) == [words_of(column[:, 0].tolist(), 4)]
    assert torch.equal(unpack_words(packed, 4, 32), column.t())
    one_word = pack_words(column[:8].t(), 4).t()
    assert unpack_words(one_word, 4, 8).tolist() == [list(range(8))]
