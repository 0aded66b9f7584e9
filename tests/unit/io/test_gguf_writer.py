import itertools
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from bitwright.blocks.types import TYPES
from bitwright.errors import InputError, PlanError, ResumeError
from bitwright.io import gguf_values as v
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import GgufValue, ValueType
from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf

VALUES = {
    "general.architecture": v.string("llama"),
    "general.name": v.string("Ünï"),
    "llama.block_count": v.u32(2),
    "eps": v.f32(1e-5),
    "flag": v.boolean(False),
    "tokens": v.strings(["<s>", "", "é"]),
    "scores": v.f32s([0.5, -1]),
    "types": v.i32s([1, 2, 3]),
    "big": v.u64(2**60),
}
ENTRIES = (
    GgufEntry("embd", (7, 64), TYPES["Q8_0"]),
    GgufEntry("norm", (5,), TYPES["F32"]),
    GgufEntry("experts", (3, 2, 32), TYPES["Q4_0"]),
    GgufEntry("half", (3, 3), TYPES["F16"]),
    GgufEntry("super", (2, 256), TYPES["Q4_K"]),
)


def content(entries=ENTRIES, seed=0):
    rng = np.random.default_rng(seed)
    return {entry.name: rng.integers(0, 256, (entry.rows, entry.row_bytes), np.uint8) for entry in entries}


def write_all(folder, parts, data):
    folder.mkdir()
    with GgufWriter(folder, parts) as writer:
        for name, blocks in data.items():
            writer.write(name, blocks)
        assert writer.missing() == ()
        writer.sync()


@pytest.mark.filterwarnings("ignore")
def test_the_gguf_package_reads_what_was_written(tmp_path):
    gguf = pytest.importorskip("gguf")
    data = content()
    parts = plan_gguf(VALUES, ENTRIES)
    assert [part.file_name for part in parts] == ["model.gguf"]
    write_all(tmp_path / "out", parts, data)
    path = tmp_path / "out" / "model.gguf"
    assert path.stat().st_size == parts[0].total_bytes
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(VALUES)
    for name, value in VALUES.items():
        found = fields[name].contents()
        assert fields[name].types[0] == value.type
        if value.element is not None:
            assert fields[name].types[-1] == value.element
            assert found == list(value.value)
        else:
            assert found == value.value
    assert [tensor.name for tensor in reader.tensors] == [entry.name for entry in ENTRIES]
    for tensor, entry in zip(reader.tensors, ENTRIES, strict=True):
        assert tuple(tensor.shape.tolist()) == entry.shape[::-1]
        assert tensor.tensor_type == entry.block.number
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == data[entry.name].tobytes()
        assert parts[0].offsets[entry.name] == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)


def test_the_gguf_package_writes_the_same_bytes(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 5)).astype(np.float32), "b": rng.standard_normal(9).astype(np.float16)}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("n", 3)
    writer.add_array("words", ["x", "yz"])
    writer.add_bool("yes", True)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = {
        "general.architecture": v.string("llama"), "n": v.u32(3), "words": v.strings(["x", "yz"]), "yes": v.boolean(True),
    }  # fmt: skip
    entries = [GgufEntry("a", (3, 5), TYPES["F32"]), GgufEntry("b", (9,), TYPES["F16"])]
    data = {name: tensor.reshape(-1, tensor.shape[-1]).view(np.uint8) for name, tensor in tensors.items()}
    write_all(tmp_path / "out", plan_gguf(values, entries, stem="ours"), data)
    assert (tmp_path / "out" / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_bytes_do_not_depend_on_the_order_of_writes(tmp_path):
    data = content()
    parts = plan_gguf(VALUES, ENTRIES)
    write_all(tmp_path / "a", parts, data)
    (tmp_path / "b").mkdir()
    rows = [(entry.name, row) for entry in ENTRIES for row in range(entry.rows)]
    random.Random(3).shuffle(rows)
    with GgufWriter(tmp_path / "b", parts) as writer:
        threads = [
            threading.Thread(target=lambda some=rows[n::3]: [writer.write(t, data[t][r : r + 1], r) for t, r in some])
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.missing() == ()
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_are_aligned_and_padding_is_zero(tmp_path, alignment):
    values = VALUES | {"general.alignment": v.u32(alignment)}
    data = {name: np.full_like(blocks, 255) for name, blocks in content().items()}
    parts = plan_gguf(values, ENTRIES)
    write_all(tmp_path / "out", parts, data)
    stored = np.frombuffer((tmp_path / "out" / "model.gguf").read_bytes(), np.uint8).copy()
    assert len(stored) % alignment == 0
    for begin, end in parts[0].offsets.values():
        assert begin % alignment == 0
        assert (stored[begin:end] == 255).all()
        stored[begin:end] = 0
    assert not stored[len(parts[0].header) :].any()
    with GgufFile.open(tmp_path / "out" / "model.gguf") as file:
        assert file.alignment == alignment


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bound", [1, 200, 512, 700])
def test_parts_are_those_of_llama_cpp(tmp_path, bound):
    """A second reading of the rule: a part is full when the next padded size would pass the bound."""
    gguf = pytest.importorskip("gguf")
    data = content()
    parts = plan_gguf(VALUES, ENTRIES, stem="m", max_part_bytes=bound)
    sizes = [-(-entry.nbytes // 32) * 32 for entry in ENTRIES]
    expected, filled = [[]], 0
    for entry, size in zip(ENTRIES, sizes, strict=True):
        if filled + size > bound and expected[-1]:
            expected.append([])
            filled = 0
        expected[-1].append(entry.name)
        filled += size
    assert [[entry.name for entry in part.entries] for part in parts] == expected
    count = len(parts)
    assert [part.file_name for part in parts] == [f"m-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    write_all(tmp_path / "out", parts, data)
    for number, part in enumerate(parts):
        fields = gguf.GGUFReader(tmp_path / "out" / part.file_name).fields
        split = {
            name: (fields[name].types, fields[name].contents())
            for name in ("split.no", "split.count", "split.tensors.count")
        }
        assert split == {
            "split.no": ([gguf.GGUFValueType.UINT16], number),
            "split.count": ([gguf.GGUFValueType.UINT16], count),
            "split.tensors.count": ([gguf.GGUFValueType.INT32], len(ENTRIES)),
        }
        assert ("llama.block_count" in fields) == (number == 0)
    with GgufFile.open(tmp_path / "out" / parts[-1].file_name) as file:
        assert list(file.tensors) == [entry.name for entry in ENTRIES]
        assert all(np.array_equal(file.raw(name), blocks) for name, blocks in data.items())
        # written again as one file, nothing is left of the split
        assert plan_gguf(file.values, ENTRIES) == plan_gguf(VALUES, ENTRIES)


def test_every_part_has_the_alignment_of_its_tensors(tmp_path):
    parts = plan_gguf(VALUES | {"general.alignment": v.u32(256)}, ENTRIES, max_part_bytes=1)
    write_all(tmp_path / "out", parts, content())
    with GgufFile.open(tmp_path / "out" / parts[0].file_name) as file:
        assert all(np.array_equal(file.raw(name), blocks) for name, blocks in content().items())


def entry(name="w", shape=(2, 32), block="F32"):
    return GgufEntry(name, shape, TYPES[block])


@pytest.mark.parametrize(
    ("values", "entries", "options", "message"),
    [
        ({}, [entry(), entry()], {}, "tensor 'w': planned twice"),
        ({}, [entry("")], {}, "tensor '': names have 1 to 63 bytes"),
        ({}, [entry("é" * 32)], {}, "names have 1 to 63 bytes"),
        ({}, [entry(shape=(1,) * 5)], {}, "at most 4 sizes"),
        ({}, [entry(shape=(0, 4))], {}, "shape \\(0, 4\\)"),
        ({}, [entry(shape=(2, 33), block="Q8_0")], {}, "33 columns are not a multiple of the 32"),
        ({}, [entry(shape=(2**40, 2**40))], {}, "too large"),
        ({"": v.u32(1)}, [], {}, "keys have 1 to 65535 bytes"),
        ({"k": GgufValue(ValueType.U32, -1)}, [], {}, r"model\.gguf, key 'k': -1 does not fit into u32"),
        ({"general.alignment": v.u32(3)}, [], {}, "key 'general.alignment': u32 3"),
        ({"general.alignment": v.i32(32)}, [], {}, "key 'general.alignment': i32 32"),
        ({"k": v.u8s(np.zeros(2**25, np.uint8))}, [], {}, "a head of 33554496 bytes is too long"),
        ({}, [], {"stem": "../x"}, "cannot begin a file name"),
        ({}, [], {"max_part_bytes": 0}, "max_part_bytes is 0"),
        ({}, [entry(str(n), (1,)) for n in range(2**15 + 1)], {}, "at most 32768 are possible"),
    ],
)
def test_what_no_reader_takes_is_refused_at_planning(values, entries, options, message):
    with pytest.raises((InputError, PlanError), match=message) as caught:
        plan_gguf(values, entries, **options)
    assert caught.value.mend


def test_writes_that_do_not_fit_the_plan_are_refused(tmp_path):
    with GgufWriter(tmp_path, plan_gguf(VALUES, ENTRIES)) as writer:
        good = content()["embd"]
        for blocks, row in (
            (good[:, :-1], 0),
            (good.view(np.int8), 0),
            (good.reshape(-1), 0),
            (good, 1),
            (good[:1], -1),
            (good[:1], 7),
        ):
            with pytest.raises(InputError, match=r"model\.gguf, tensor 'embd'"):
                writer.write("embd", blocks, row)
        with pytest.raises(InputError, match="'other' is not in the plan"):
            writer.write("other", good)
        assert writer.missing() == tuple(entry.name for entry in ENTRIES)
    with pytest.raises(InputError, match="the writer is closed"):
        writer.write("embd", good)
    with pytest.raises(InputError, match="File exists"):
        GgufWriter(tmp_path, plan_gguf(VALUES, ENTRIES))


def test_blocks_may_be_any_view(tmp_path):
    wide = np.random.default_rng(0).integers(0, 256, (14, 136), np.uint8)
    with GgufWriter(tmp_path, plan_gguf({}, ENTRIES[:1])) as writer:
        writer.write("embd", wide[::2, ::2])
    with GgufFile.open(tmp_path / "model.gguf") as file:
        assert np.array_equal(file.raw("embd"), wide[::2, ::2])


def test_an_interrupted_run_goes_on(tmp_path):
    data, parts = content(), plan_gguf(VALUES, ENTRIES, max_part_bytes=500)
    write_all(tmp_path / "whole", parts, data)
    (tmp_path / "out").mkdir()
    with GgufWriter(tmp_path / "out", parts) as writer:
        writer.write("embd", data["embd"])
        writer.write("super", data["super"][:1])
        writer.write("super", data["super"][:1])
        assert writer.missing() == ("norm", "experts", "half", "super")
    with GgufWriter(tmp_path / "out", parts, resume=True, written=["embd"]) as writer:
        assert writer.missing() == ("norm", "experts", "half", "super")
        for name in writer.missing():
            writer.write(name, data[name])
        assert writer.missing() == ()
    for part in parts:
        assert (tmp_path / "out" / part.file_name).read_bytes() == (tmp_path / "whole" / part.file_name).read_bytes()


def test_resuming_another_plan_is_refused(tmp_path):
    parts = plan_gguf(VALUES, ENTRIES)
    with pytest.raises(ResumeError, match="missing in the partial output"):
        GgufWriter(tmp_path, parts, resume=True)
    GgufWriter(tmp_path, parts).close()
    with pytest.raises(ResumeError, match="'x' was written but is not in the plan"):
        GgufWriter(tmp_path, parts, resume=True, written=["x"])
    with pytest.raises(ResumeError, match="size or header differ"):
        GgufWriter(tmp_path, plan_gguf(VALUES | {"flag": v.boolean(True)}, ENTRIES), resume=True)
    os.truncate(tmp_path / "model.gguf", parts[0].total_bytes - 1)
    with pytest.raises(ResumeError, match="size or header differ"):
        GgufWriter(tmp_path, parts, resume=True)


def test_a_full_disk_leaves_nothing(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from bitwright.blocks.types import TYPES\n"
        "from bitwright.errors import ResourceError\n"
        "from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf\n"
        "parts = plan_gguf({}, [GgufEntry(n, (s,), TYPES['F32']) for n, s in (('a', 9), ('b', 10**6))], max_part_bytes=100)\n"
        "try:\n    GgufWriter(pathlib.Path(sys.argv[1]), parts)\n"
        "except ResourceError as error:\n    print(error)\n"
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert "model-00002-of-00002.gguf" in done.stdout
    assert re.search(r"4000\d{3} bytes needed", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_every_type_has_a_place(tmp_path):
    entries = [GgufEntry(f"t{block.number}", (2, 3 * block.values), block) for block in TYPES.values()]
    data = content(entries)
    write_all(tmp_path / "out", plan_gguf({}, entries), data)
    with GgufFile.open(tmp_path / "out" / "model.gguf") as file:
        for planned, (name, tensor) in itertools.zip_longest(entries, file.tensors.items(), fillvalue=(None, None)):
            assert (tensor.name, tensor.shape, tensor.block) == (planned.name, planned.shape, planned.block)
            assert np.array_equal(file.raw(name), data[name])
