import json
import os
import random
import struct
import threading

import pytest
import torch
from safetensors.torch import save_file

from bitwright.errors import InputError
from bitwright.io.safetensors_dir import SafetensorsDir


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(raw(a), raw(b))


def write_file(folder, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + text + data)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_files_of_the_safetensors_library_are_read_bit_for_bit(model, sharded, tensors):
    for path in (model, sharded):
        with SafetensorsDir.open(path) as source:
            assert set(source.tensors) == set(tensors)
            assert source.total_bytes == sum(t.numel() * t.itemsize for t in tensors.values())
            for name, expected in tensors.items():
                assert source.tensors[name].shape == tuple(expected.shape)
                assert_same(source.read(name), expected)
    assert source.file_of("fp8").name == "model-00002-of-00002.safetensors"


def test_rows_equal_slices(model, tensors):
    with SafetensorsDir.open(model) as source:
        assert_same(source.read("embed", rows=(3, 9)), tensors["embed"][3:9])
        assert_same(source.read("full", rows=(1, 2)), tensors["full"][1:2])
        assert_same(source.read("embed", rows=(4, 4)), tensors["embed"][4:4])
        for name, rows in (("embed", (0, 17)), ("embed", (-1, 2)), ("embed", (5, 4)), ("scalar", (0, 1))):
            with pytest.raises(InputError, match=f"tensor '{name}': rows"):
                source.read(name, rows=rows)
        with pytest.raises(InputError, match="no tensor 'nothing'"):
            source.read("nothing")


def test_reads_are_fresh_and_safe_from_many_threads(sharded, tensors):
    with SafetensorsDir.open(sharded) as source:
        source.read("full").zero_()
        assert_same(source.read("full"), tensors["full"])
        wrong = []

        def work():
            for _ in range(30):
                wrong.extend(n for n, t in tensors.items() if not torch.equal(raw(source.read(n)), raw(t)))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_descriptors_are_closed(model):
    before = len(os.listdir("/proc/self/fd"))
    source = SafetensorsDir.open(model)
    source.read("full")
    del source
    with SafetensorsDir.open(model) as source:
        source.read("full")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_single_file_of_any_name_is_found_and_two_are_refused(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert SafetensorsDir.open(model).file_of("full").name == "weights.safetensors"
    save_file({"x": torch.zeros(1)}, model / "other.safetensors")
    with pytest.raises(InputError, match=r"2 weight files .*without an index"):
        SafetensorsDir.open(model)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": A}, b"x" * 7, "cut short"),
        ({"a": A}, b"x" * 9, "1 bytes after the last"),
        ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, b"x" * 12, "'b': overlaps"),
        ({"a": A, "b": A}, b"x" * 8, "overlaps"),
        ({"a": A, "b": {**A, "data_offsets": [12, 20]}}, b"x" * 20, "'b': leaves a hole"),
        ({"a": {**A, "data_offsets": [4, 12]}}, b"x" * 12, "leaves a hole"),
        ({"a": {**A, "data_offsets": [8, 0]}}, b"x" * 8, "end before they begin"),
        ({"a": {**A, "data_offsets": [-8, 0]}}, b"x" * 8, "not a pair"),
        ({"a": {**A, "data_offsets": [0, 8, 8]}}, b"x" * 8, "not a pair"),
        ({"a": {**A, "data_offsets": [0.0, 8.0]}}, b"x" * 8, "not a pair"),
        ({"a": {**A, "data_offsets": [0, 2**64]}}, b"x" * 8, "not a pair"),
        ({"a": {**A, "shape": [3]}}, b"x" * 8, "8 bytes stored, its shape needs 12"),
        ({"a": {**A, "shape": [-2]}}, b"x" * 8, "not a list of sizes"),
        ({"a": {**A, "shape": [True, 2]}}, b"x" * 8, "not a list of sizes"),
        ({"a": {**A, "shape": "2"}}, b"x" * 8, "not a list of sizes"),
        ({"a": {**A, "shape": [1] * 65 + [2]}}, b"x" * 8, "not a list of sizes"),
        ({"a": {**A, "shape": [2**62, 2**62]}}, b"x" * 8, "overflows"),
        ({"a": {**A, "shape": [2**32, 2**32, 0], "data_offsets": [0, 0]}}, b"", "overflows"),
        ({"a": {**A, "dtype": "F31"}}, b"x" * 8, "unknown dtype 'F31'"),
        ({"a": {**A, "dtype": ["F32"]}}, b"x" * 8, "unknown dtype"),
        ({"a": {**A, "extra": 1}}, b"x" * 8, "exactly"),
        ({"a": [1]}, b"x" * 8, "exactly"),
        ({"a": A, "__metadata__": {"k": 1}}, b"x" * 8, "map of strings"),
        ({"a": A, "__metadata__": []}, b"x" * 8, "map of strings"),
        ({}, b"", "no tensor"),
        (b"[]", b"", "does not begin"),
        (b" {}", b"", "does not begin"),
        (b'{"a":1,"a":1}', b"", "duplicate key 'a'"),
        (b"{" + b'"a":{' * 60 + b"}" * 61, b"", "nested"),
        (b'{"\x1b[2Ja":{}}', b"", "not valid JSON"),
        (b'{"\\u001b[2Ja":{}}', b"", "\\x1b[2Ja"),
        (b'{"a', b"", "not valid JSON"),
        (b'{"\xff":{}}', b"", "UTF-8"),
    ],
    ids=range(33),
)
def test_malformed_headers_are_refused_and_the_file_named(folder, header, data, reason):
    write_file(folder, header, data)
    with pytest.raises(InputError, match=r"model\.safetensors|no tensor") as caught:
        SafetensorsDir.open(folder)
    assert reason in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 100, 100_000_001, 2**63, 2**64 - 1])
def test_header_lengths_beyond_the_file_are_refused(folder, length):
    write_file(folder, b"{}", length=length)
    with pytest.raises(InputError, match="does not fit"):
        SafetensorsDir.open(folder)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_files_shorter_than_a_length_are_refused(folder, size):
    (folder / "model.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(InputError, match="too few"):
        SafetensorsDir.open(folder)


def test_a_header_as_long_as_100_mb_of_sparse_file_costs_no_more_than_itself(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**41)
    with pytest.raises(InputError, match="does not fit"):
        SafetensorsDir.open(folder)


def test_mutated_files_give_input_errors_or_sound_tensors(model):
    rng = random.Random(20240)
    path = model / "model.safetensors"
    original = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    opened, messages = 0, []
    for _ in range(2000):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 5))):
            position = rng.randrange(header_end)
            match rng.randrange(4):
                case 0:
                    data[position] ^= 1 << rng.randrange(8)
                case 1:
                    data[position] = rng.choice(b'0123456789[]{}",:\\-eE \0\xff')
                case 2:
                    del data[position : position + rng.randrange(1, 9)]
                case 3:
                    data[position:position] = rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(data)
        try:
            with SafetensorsDir.open(model) as source:
                for name, spec in source.tensors.items():
                    assert tuple(source.read(name).shape) == spec.shape
            opened += 1
        except InputError as error:
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    assert 0 < opened < 1000


def test_every_truncation_is_refused(model):
    path = model / "model.safetensors"
    original = path.read_bytes()
    for size in range(0, len(original), 13):
        path.write_bytes(original[:size])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            SafetensorsDir.open(model)


def test_a_file_truncated_during_the_run_is_an_input_error_naming_file_and_tensor(model):
    source = SafetensorsDir.open(model)
    source.read("full")
    os.truncate(source.file_of("full"), 1500)
    with pytest.raises(InputError, match="changed"):
        source.check_unchanged()
    last = list(source.tensors)[-1]
    os.truncate(source.file_of("full"), 100)
    with pytest.raises(InputError, match=rf"model\.safetensors, tensor '{last}': .*changed during the run"):
        source.read(last)
    source.close()


def test_a_file_replaced_before_its_first_read_is_an_input_error(model, tensors):
    source = SafetensorsDir.open(model)
    save_file(tensors, model / "new")
    os.replace(model / "new", model / "model.safetensors")
    with pytest.raises(InputError, match="source changed during the run"):
        source.read("full")
    with pytest.raises(InputError, match="source changed during the run"):
        source.check_unchanged()


def test_check_unchanged_sees_config_tokenizer_and_removal(model):
    (model / "tokenizer.json").write_text("{}")
    source = SafetensorsDir.open(model)
    source.check_unchanged()
    (model / "tokenizer.json").write_text("{ }")
    with pytest.raises(InputError, match=r"tokenizer\.json: source changed"):
        source.check_unchanged()
    (model / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        source.check_unchanged()


def test_the_fingerprint_ignores_clocks_and_sees_content(model, tensors):
    (model / "tokenizer.json").write_text("{}")
    before = SafetensorsDir.open(model).fingerprint()
    assert set(before) == {"config.json", "model.safetensors", "tokenizer.json"}
    for file in model.iterdir():
        os.utime(file, (1, 1))
    assert SafetensorsDir.open(model).fingerprint() == before
    save_file({**tensors, "full": tensors["full"] + 1}, model / "model.safetensors", metadata={"format": "pt"})
    (model / "tokenizer.json").write_text("[]")
    after = SafetensorsDir.open(model).fingerprint()
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd.safetensors", "../x.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors"),
        *("..safetensors", ".safetensors", "x.bin", "", "x.safetensors\0", "x\0.safetensors", 3, None, ["x"]),
    ],
)
def test_shard_names_that_are_not_plain_are_refused_on_their_text(sharded, name):
    index = sharded / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["full"] = name
    index.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"index\.json: tensor 'full' lies in .*plain name"):
        SafetensorsDir.open(sharded)


def test_missing_and_extra_shards_and_tensors_name_the_first_five(sharded):
    index = sharded / "model.safetensors.index.json"
    document = json.loads(index.read_text())

    def refused(change, match):
        changed = json.loads(json.dumps(document))
        change(changed["weight_map"])
        index.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=match):
            SafetensorsDir.open(sharded)

    first, second = sorted(set(document["weight_map"].values()))
    refused(lambda m: m.update(ghost="gone.safetensors"), r"1 shard \('gone.safetensors'\) missing")
    refused(lambda m: m.update({f"g{i}": first for i in range(7)}), r"7 tensors \('g0', .*'g4', …\) not in the shard")
    refused(lambda m: m.pop("full"), r"1 tensor \('full'\) in a shard but not mapped")
    refused(lambda m: m.update(full=second), r"1 tensor \('full'\) not in the shard")
    refused(dict.clear, "no weight_map")


def test_paths_that_are_no_model_are_refused(tmp_path, model):
    with pytest.raises(InputError, match=r"config\.json"):
        SafetensorsDir.open(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"config\.json"):
        SafetensorsDir.open(tmp_path)
    with pytest.raises(InputError):
        SafetensorsDir.open(model / "config.json")
    (model / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not an object"):
        SafetensorsDir.open(model)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors weights"):
        SafetensorsDir.open(model)
    os.mkfifo(model / "model.safetensors")
    with pytest.raises(InputError):
        SafetensorsDir.open(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(InputError):
        SafetensorsDir.open(model)
