import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import InputError
from bitwright.io import gguf_values as v
from bitwright.io.gguf_values import GgufValue, Strings, ValueType, encode_value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (v.u8(255), struct.pack("<IB", 0, 255)),
        (v.i8(-128), struct.pack("<Ib", 1, -128)),
        (v.u16(65535), struct.pack("<IH", 2, 65535)),
        (v.i16(-2), struct.pack("<Ih", 3, -2)),
        (v.u32(2**32 - 1), struct.pack("<II", 4, 2**32 - 1)),
        (v.i32(-3), struct.pack("<Ii", 5, -3)),
        (v.f32(0.1), struct.pack("<If", 6, 0.1)),
        (v.boolean(True), struct.pack("<IB", 7, 1)),
        (v.string("é"), struct.pack("<IQ", 8, 2) + "é".encode()),
        (v.u64(2**64 - 1), struct.pack("<IQ", 10, 2**64 - 1)),
        (v.i64(-(2**63)), struct.pack("<Iq", 11, -(2**63))),
        (v.f64(0.1), struct.pack("<Id", 12, 0.1)),
        (v.strings(["", "ab"]), struct.pack("<IIQ", 9, 8, 2) + struct.pack("<QQ", 0, 2) + b"ab"),
        (v.i16s([1, -1]), struct.pack("<IIQ2h", 9, 3, 2, 1, -1)),
        (v.f32s([0.5]), struct.pack("<IIQf", 9, 6, 1, 0.5)),
        (v.booleans([True, False]), struct.pack("<IIQ2B", 9, 7, 2, 1, 0)),
        (v.u64s([]), struct.pack("<IIQ", 9, 10, 0)),
    ],
)
def test_values_have_the_bytes_of_the_specification(value, expected):
    assert encode_value(value) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: v.u8(256),
        lambda: v.u32(-1),
        lambda: v.i32(2**31),
        lambda: v.u32(True),
        lambda: v.u32(1.0),
        lambda: v.boolean(1),
        lambda: v.f32(1e39),
        lambda: v.f32(True),
        lambda: v.u8s([1, 256]),
        lambda: v.i32s([0.5]),
        lambda: v.u32s([[1]]),
        lambda: v.f32s([1e39]),
        lambda: v.f32s(["1"]),
        lambda: v.booleans([1, 0]),
        lambda: v.string("\ud800"),
        lambda: encode_value(GgufValue(ValueType.STRING, 3)),
        lambda: encode_value(GgufValue(ValueType.ARRAY, [1], None)),
        lambda: encode_value(GgufValue(ValueType.ARRAY, [[1]], ValueType.ARRAY)),
    ],
)
def test_values_that_do_not_fit_their_type_are_refused(make):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.mend


def test_infinity_and_nan_are_values():
    assert encode_value(v.f32(float("inf"))) == struct.pack("<If", 6, float("inf"))
    assert v.f32s([float("nan")]) == v.f32s([float("nan")])


def test_values_are_equal_by_type_and_bytes():
    assert v.u32(3) == v.u32(3)
    assert v.u32(3) != v.i32(3)
    assert v.f32s([1, 2]) == v.f32s(np.array([1.0, 2.0]))
    assert v.strings(["a"]) != v.strings(["b"])
    assert v.strings([]) != v.f32s([])
    assert v.u32(3) != 3


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]))))
def test_string_arrays_behave_like_lists(texts):
    held = Strings.of(texts)
    assert held == texts
    assert held == tuple(texts)
    assert list(held) == held.tolist() == texts
    assert held[:] == texts
    assert held[::-2] == texts[::-2]
    assert [held[index] for index in range(-len(texts), len(texts))] == texts + texts
    assert held.tobytes() == b"".join(struct.pack("<Q", len(text.encode())) + text.encode() for text in texts)
    with pytest.raises(IndexError):
        held[len(texts)]


def test_bytes_that_are_not_utf8_survive_in_string_arrays():
    assert Strings.of(["a\udcff"]).tobytes() == struct.pack("<Q", 2) + b"a\xff"
