import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.gguf_bytes import array, info, scalar, string, text, u32
from tests.gguf_bytes import gguf as build

from bitwright.blocks.types import TYPES
from bitwright.errors import InputError
from bitwright.io import gguf_values as v
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import NUMBERS, GgufValue, Strings, ValueType, encode_value
from bitwright.io.gguf_writer import GgufEntry, plan_gguf


def stored(folder, data, name="m.gguf"):
    path = folder / name
    path.write_bytes(data)
    return path


def written(path, *, endianess=None, **options):
    """A file by the gguf package with every type of value."""
    gguf = pytest.importorskip("gguf")
    endianess = gguf.GGUFEndian.LITTLE if endianess is None else endianess
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess, **options)
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -70_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Grüße 😀")
    writer.add_array("words", ["a", "", "é" * 200])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("flags", [True, False, True])
    writer.add_key_value("shorts", [1, 2, 3], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT16)
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((3, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "experts": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "codes": np.arange(-3, 3, dtype=np.int32),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("order", ["little", "big"])
def test_files_of_the_gguf_package_are_read(tmp_path, order):
    gguf = pytest.importorskip("gguf")
    tensors = written(tmp_path / "m.gguf", endianess=gguf.GGUFEndian[order.upper()])
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert (file.version, file.byte_order, file.alignment) == (3, order, 32)
        assert file.get("u8", int) == 200
        assert file.get("i8", int) == -3
        assert file.get("u16", int) == 60000
        assert file.get("i16", int) == -300
        assert file.get("u32", int) == 4_000_000_000
        assert file.get("i32", int) == -70_000
        assert file.get("u64", int) == 2**63
        assert file.get("i64", int) == -(2**40)
        assert file.get("f32", float) == np.float32(0.1)
        assert file.get("f64", float) == 0.1
        assert file.get("yes", bool) is True
        assert file.get("text", str) == "Grüße 😀"
        assert file.get("words", list) == ["a", "", "é" * 200]
        assert file.get("floats", np.ndarray).tolist() == [0.5, -1.5]
        assert file.get("flags", np.ndarray).tolist() == [True, False, True]
        shorts = file.get("shorts", np.ndarray)
        assert (shorts.dtype, shorts.tolist()) == (np.uint16, [1, 2, 3])
        assert list(file.tensors) == list(tensors)
        for name, tensor in tensors.items():
            assert file.tensors[name].shape == tensor.shape
            assert file.raw(name).tobytes() == tensor.tobytes()
        for name in ("matrix", "half", "experts"):
            columns = tensors[name].shape[-1]
            assert np.array_equal(file.read(name), tensors[name].reshape(-1, columns).astype(np.float32))
        assert np.array_equal(file.read("experts", (2, 5)), tensors["experts"].reshape(6, 4)[2:5])
        with pytest.raises(InputError, match=r"m\.gguf, tensor 'codes': I32 holds integers"):
            file.read("codes")


def test_the_header_of_a_rewritten_file_has_the_same_bytes(tmp_path):
    written(tmp_path / "m.gguf")
    with GgufFile.open(tmp_path / "m.gguf") as file:
        entries = [GgufEntry(tensor.name, tensor.shape, tensor.block) for tensor in file.tensors.values()]
        (part,) = plan_gguf(file.values, entries)
    assert (tmp_path / "m.gguf").read_bytes().startswith(part.header)
    assert part.total_bytes == (tmp_path / "m.gguf").stat().st_size


def test_a_rewritten_big_endian_file_says_the_same_in_little_endian(tmp_path):
    gguf = pytest.importorskip("gguf")
    written(tmp_path / "little.gguf")
    written(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with GgufFile.open(tmp_path / "big.gguf") as big, GgufFile.open(tmp_path / "little.gguf") as little:
        assert plan_gguf(big.values, []) == plan_gguf(little.values, [])


_NUMBERS = {
    kind: (
        st.floats(width=32 if kind is ValueType.F32 else 64, allow_nan=False)
        if dtype.kind == "f"
        else st.booleans()
        if dtype.kind == "b"
        else st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    )
    for kind, dtype in NUMBERS.items()
}
_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
_VALUES = st.one_of(
    *(numbers.map(lambda x, kind=kind: GgufValue(kind, x)) for kind, numbers in _NUMBERS.items()),
    *(
        st.lists(numbers, max_size=5).map(lambda x, kind=kind: v.numbers(kind, np.array(x, NUMBERS[kind])))
        for kind, numbers in _NUMBERS.items()
    ),
    _TEXT.map(v.string),
    st.lists(_TEXT, max_size=5).map(v.strings),
)
_KEYS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda key: not key.startswith(("split.", "general.alignment"))
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=st.dictionaries(_KEYS, _VALUES, max_size=8))
def test_every_value_survives_writing_and_reading(tmp_path, values):
    (part,) = plan_gguf(values, [])
    path = stored(tmp_path, part.header)
    with GgufFile.open(path) as file:
        assert list(file.values) == list(values)
        for key, value in values.items():
            read = file.values[key]
            assert (read.type, read.element) == (value.type, value.element)
            assert encode_value(read) == encode_value(value)
            assert isinstance(read.value, type(value.value))
            if isinstance(read.value, np.ndarray):
                assert read.value.flags.aligned
                assert not read.value.flags.writeable
                assert np.array_equal(read.value, value.value)
            else:
                assert read.value == value.value


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 64, 2**16])
def test_versions_and_alignments(tmp_path, version, alignment):
    size = -(-8 // alignment) * alignment
    path = stored(
        tmp_path,
        build(
            [u32("general.alignment", alignment)],
            [info("a", [2]), info("b", [1], offset=size)],
            struct.pack("<2f", 1, 2) + bytes(size - 8) + struct.pack("<f", 3),
            version=version,
            alignment=alignment,
        ),
    )
    with GgufFile.open(path) as file:
        assert (file.version, file.alignment) == (version, alignment)
        assert file.read("a").tolist() == [[1, 2]]
        assert file.read("b").tolist() == [[3]]


def test_the_last_tensor_needs_no_padding_and_a_number_no_dimension(tmp_path):
    with GgufFile.open(stored(tmp_path, build([], [info("a", [])], struct.pack("<f", 7)))) as file:
        assert file.tensors["a"].shape == ()
        assert file.read("a").tolist() == [[7]]


def test_a_file_may_hold_no_tensor(tmp_path):
    with GgufFile.open(stored(tmp_path, build([string("a", "b")]))) as file:
        assert dict(file.tensors) == {}
        assert file.get("a", str) == "b"
        assert len(file.fingerprint()) == 1


def test_tokens_that_are_not_utf8_come_back_as_they_were(tmp_path):
    tokens = text(b"\xe2\x96") + text(b"ok")
    with GgufFile.open(stored(tmp_path, build([array("t", 8, tokens, 2)]))) as file:
        held = file.get("t", Strings)
        assert held[1] == "ok"
        assert held[0].encode("utf-8", "surrogateescape") == b"\xe2\x96"
        assert encode_value(file.values["t"]).endswith(tokens)


def test_get_says_what_is_wrong(tmp_path):
    with GgufFile.open(stored(tmp_path, build([u32("n", 3), array("f", 6, bytes(4), 1)]))) as file:
        assert file.get("none", int, 5) == 5
        assert file.get("none", str, None) is None
        with pytest.raises(InputError, match=r"m\.gguf, key 'none': missing"):
            file.get("none", int)
        for kind, words in ((str, "a string"), (bool, "a bool"), (float, "a float"), (list, "an array of strings")):
            with pytest.raises(InputError, match=f"key 'n': it is u32, not {words}"):
                file.get("n", kind)
        with pytest.raises(InputError, match="key 'f': it is array of f32, not an integer"):
            file.get("f", int)
        with pytest.raises(InputError, match="no tensor 'x'"):
            file.raw("x")


def test_rows_outside_the_tensor_are_refused(tmp_path):
    with GgufFile.open(stored(tmp_path, build([], [info("w", [2, 3])], bytes(24)))) as file:
        assert file.raw("w", (3, 3)).shape == (0, 8)
        for rows in ((0, 4), (-1, 1), (2, 1)):
            with pytest.raises(InputError, match="do not exist"):
                file.raw("w", rows)


_HALF_FIELDS = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
}
_HALF_FIELDS |= {"Q6_K": [208], "IQ4_NL": [0], "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [], "NVFP4": []}


@pytest.mark.parametrize("name", _HALF_FIELDS)
def test_blocks_of_big_endian_files_are_turned_around(tmp_path, name):
    """Where a block's float16 numbers are is written down here a second time, from ggml's structs."""
    block = TYPES[name]
    rng = np.random.default_rng(1)
    little = rng.integers(0, 256, (6, block.nbytes), np.uint8)
    big = little.copy()
    for begin in _HALF_FIELDS[name]:
        big[:, [begin, begin + 1]] = little[:, [begin + 1, begin]]
    infos = [info("w", [2 * block.values, 3], block.number, sign=">")]
    with GgufFile.open(stored(tmp_path, build([], infos, big.tobytes(), sign=">"))) as file:
        assert file.byte_order == "big"
        assert np.array_equal(file.raw("w"), little.reshape(3, -1))
        assert np.array_equal(file.raw("w", (1, 2)), little.reshape(3, -1)[1:2])


def test_blocks_that_cannot_be_turned_around_are_refused(tmp_path):
    infos = [info("w", [256], TYPES["IQ2_XXS"].number, sign=">")]
    with (
        GgufFile.open(stored(tmp_path, build([], infos, bytes(66), sign=">"))) as file,
        pytest.raises(InputError, match="tensor 'w': IQ2_XXS blocks of a big-endian file"),
    ):
        file.raw("w")


def test_changes_during_the_run_are_noticed(tmp_path):
    path = stored(tmp_path, build([], [info("w", [8])], bytes(32)))
    file = GgufFile.open(path)
    before = file.fingerprint()
    file.check_unchanged()
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match=r"tensor 'w': 28 of 32 bytes could be read"):
        file.raw("w")
    with pytest.raises(InputError, match="source changed"):
        file.check_unchanged()
    file.close()
    with pytest.raises(InputError, match="source changed"):
        file.raw("w")
    path.write_bytes(build([], [info("w", [8])], bytes(31) + b"\1"))
    with GgufFile.open(path) as other:
        assert other.fingerprint() != before


def test_paths_that_are_no_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(InputError, match=path.name):
            GgufFile.open(path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InputError, match="not a regular file"):
        GgufFile.open(tmp_path / "pipe.gguf")


# -- split models ------------------------------------------------------------------------------------------------------


def split_keys(number, count, total=None):
    keys = [scalar("split.no", 2, "H", number), scalar("split.count", 2, "H", count)]
    return keys if total is None else [*keys, scalar("split.tensors.count", 5, "i", total)]


def split_model(folder, count=3, **changed):
    """Parts with one tensor each; ``changed``: number of a part, as text with a ``p`` before it -> its bytes, or None."""
    for number in range(count):
        keys = ([string("general.architecture", "llama")] if number == 0 else []) + split_keys(number, count, count)
        data = build(keys, [info(f"w{number}", [2])], struct.pack("<2f", number, number))
        data = changed.get(f"p{number}", data)
        if data is not None:
            stored(folder, data, f"m-{number + 1:05d}-of-{count:05d}.gguf")
    return folder / f"m-00001-of-{count:05d}.gguf"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_split_model_opens_from_any_part(tmp_path, number):
    split_model(tmp_path)
    with GgufFile.open(tmp_path / f"m-0000{number}-of-00003.gguf") as file:
        assert list(file.tensors) == ["w0", "w1", "w2"]
        assert [file.tensors[name].part for name in file.tensors] == [0, 1, 2]
        assert [file.read(name).tolist() for name in file.tensors] == [[[n, n]] for n in range(3)]
        assert file.get("general.architecture", str) == "llama"
        assert [path.name for path in file.paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
        assert len(file.fingerprint()) == 3


def test_split_models_of_the_gguf_package_are_read(tmp_path):
    tensors = written(tmp_path / "m.gguf", split_max_tensors=2)
    with GgufFile.open(tmp_path / "m-00001-of-00002.gguf") as file:
        assert list(file.tensors) == list(tensors)
        for name, tensor in tensors.items():
            assert file.raw(name).tobytes() == tensor.tobytes()


def w(name, *keys):
    return build(list(keys), [info(name, [2])], bytes(8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"p1": None}, r"m-00002-of-00003\.gguf: part 2 of 3 is missing"),
        ({"p1": w("w1")}, r"m-00002-of-00003\.gguf, key 'split.no': None, 1 is demanded"),
        ({"p1": w("w1", *split_keys(2, 3))}, r"m-00002-of-00003\.gguf, key 'split.no': 2, 1 is demanded"),
        ({"p1": w("w1", *split_keys(1, 4))}, r"m-00002-of-00003\.gguf, key 'split.count': 4, 3 is demanded"),
        ({"p2": w("w0", *split_keys(2, 3))}, r"m-00003-of-00003\.gguf, tensor 'w0': an earlier part has it too"),
        (
            {"p0": w("w0", *split_keys(0, 3, 4))},
            r"m-00001-of-00003\.gguf, key 'split.tensors.count': 4 tensors announced",
        ),
        (
            {"p0": w("w0", u32("split.count", 3))},
            r"m-00001-of-00003\.gguf, key 'split.count': it is u32, u16 is demanded",
        ),
        ({"p0": w("w0", *split_keys(1, 3))}, r"m-00001-of-00003\.gguf, keys 'split.no', 'split.count': part 1"),
        ({"p0": w("w0", *split_keys(0, 2))}, r"m-00001-of-00003\.gguf, keys 'split.no', 'split.count': part 0 .* of 2"),
        ({"p0": w("w0", *split_keys(0, 3)[1:])}, r"m-00001-of-00003\.gguf, keys .*: part None"),
        (
            {"p1": build([scalar("split.no", 2, "H", 1, ">")], [info("w1", [2], sign=">")], bytes(8), sign=">")},
            r"m-00002-of-00003\.gguf: its byte order differs",
        ),
        ({"p2": b"GGUF"}, r"m-00003-of-00003\.gguf, the first 24 bytes"),
    ],
)
def test_split_models_that_do_not_fit_together_are_refused(tmp_path, changed, message):
    with pytest.raises(InputError, match=message) as caught:
        GgufFile.open(split_model(tmp_path, **changed))
    assert caught.value.mend


def test_a_renamed_part_is_refused(tmp_path):
    split_model(tmp_path).rename(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="does not agree with the name"):
        GgufFile.open(tmp_path / "model.gguf")


def test_one_part_of_one_is_a_plain_file(tmp_path):
    path = stored(tmp_path, w("a", *split_keys(0, 1, 1)))
    with GgufFile.open(path) as file:
        assert list(file.tensors) == ["a"]
