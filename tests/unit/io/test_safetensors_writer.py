import itertools
import json
import os
import random
import struct
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitwright.core.tensor import DTYPES, TensorSpec
from bitwright.errors import InputError, ResourceError, ResumeError
from bitwright.io.planned_files import Intervals
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.safetensors_writer import SafetensorsWriter, index_json, plan_shards


def specs_of(tensors):
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_all(folder, tensors, order=None, **options):
    folder.mkdir()
    shards = plan_shards(specs_of(tensors), **options)
    with SafetensorsWriter(folder, shards) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])
        assert writer.missing() == ()
        writer.sync()
    return shards


def test_the_safetensors_library_reads_what_was_written(tmp_path, tensors):
    (shard,) = write_all(tmp_path / "out", tensors)
    assert shard.file_name == "model.safetensors"
    path = tmp_path / "out" / shard.file_name
    assert path.stat().st_size == shard.total_bytes
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(raw(loaded[name]), raw(tensor))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_survives_writing_and_reading(tmp_path, dtype):
    data = torch.arange(48, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    tensor = data.view(dtype).view(2, -1)
    write_all(tmp_path / "out", {"x": tensor})
    (tmp_path / "out" / "config.json").write_text("{}")
    with SafetensorsDir.open(tmp_path / "out") as source:
        read = source.read("x")
    assert read.dtype == dtype
    assert torch.equal(raw(read), raw(tensor))


def test_tensors_are_aligned_and_headers_padded(tmp_path, tensors):
    (shard,) = write_all(tmp_path / "out", tensors)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert (8 + length) % 8 == 0
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].itemsize == 0
    assert shard.header == data[: 8 + length]


def test_shards_keep_the_order_and_a_large_tensor_stands_alone(tmp_path):
    sizes = [10, 10, 15, 50, 5, 5, 20, 1]
    tensors = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    shards = write_all(tmp_path / "out", tensors, max_shard_bytes=30)
    assert [tuple(s.name for s in shard.specs) for shard in shards] == [
        *[("t0", "t1"), ("t2",), ("t3",), ("t4", "t5", "t6"), ("t7",)]
    ]
    assert [shard.file_name for shard in shards][::4] == [f"model-0000{i}-of-00005.safetensors" for i in (1, 5)]
    (tmp_path / "out" / "model.safetensors.index.json").write_bytes(index_json(shards))
    (tmp_path / "out" / "config.json").write_text("{}")
    with SafetensorsDir.open(tmp_path / "out") as source:
        assert list(source.tensors) == list(tensors)
        assert source.total_bytes == sum(sizes) == json.loads(index_json(shards))["metadata"]["total_size"]
        assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_one_shard_needs_no_index_and_no_tensors_make_a_valid_file(tmp_path):
    shards = write_all(tmp_path / "out", {})
    assert index_json(shards) is None
    assert load_file(tmp_path / "out" / "model.safetensors") == {}


def test_bytes_do_not_depend_on_order_rows_or_threads(tmp_path, tensors):
    options = {"max_shard_bytes": 300}
    shards = write_all(tmp_path / "a", tensors, **options)
    write_all(tmp_path / "b", tensors, order=list(tensors)[::-1], **options)
    (tmp_path / "c").mkdir()
    parts = [(name, t[i : i + 1], i) for name, t in tensors.items() if t.ndim for i in range(len(t))]
    parts += [("scalar", tensors["scalar"], 0)]
    random.Random(1).shuffle(parts)
    with SafetensorsWriter(tmp_path / "c", shards) as writer:

        def work(mine):
            for name, tensor, row in mine:
                writer.write(name, tensor, row=row)

        threads = [threading.Thread(target=work, args=(parts[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.missing() == ()
    for shard in shards:
        a, b, c = ((tmp_path / folder / shard.file_name).read_bytes() for folder in "abc")
        assert a == b == c


def test_strided_tensors_and_parameters_are_written_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"turned": base.T, "every_second": base[:, ::2], "parameter": torch.nn.Parameter(base)}
    write_all(tmp_path / "out", tensors)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_writes_that_do_not_fit_the_plan_are_refused_and_change_nothing(tmp_path):
    shards = plan_shards([TensorSpec("w", (4, 3), torch.float32), TensorSpec("s", (), torch.int64)])
    with SafetensorsWriter(tmp_path, shards) as writer:
        before = (tmp_path / "model.safetensors").read_bytes()
        for name, tensor, row in [
            ("w", torch.zeros(4, 3, dtype=torch.float16), 0),
            ("w", torch.zeros(4, 4), 0),
            ("w", torch.zeros(12), 0),
            ("w", torch.zeros(5, 3), 0),
            ("w", torch.zeros(4, 3), 1),
            ("w", torch.zeros(1, 3), -1),
            ("w", torch.zeros(4, 3).to_sparse(), 0),
            ("s", torch.tensor(1), 1),
            ("s", torch.tensor([1]), 0),
            ("other", torch.zeros(1), 0),
        ]:
            with pytest.raises(InputError, match=f"tensor '{name}'"):
                writer.write(name, tensor, row=row)
        assert (tmp_path / "model.safetensors").read_bytes() == before
        assert writer.missing() == ("s", "w") or writer.missing() == ("w", "s")
    with pytest.raises(InputError, match="closed"):
        writer.write("w", torch.zeros(4, 3))


def test_missing_counts_bytes_once(tmp_path):
    with SafetensorsWriter(tmp_path, plan_shards([TensorSpec("w", (4, 3), torch.float32)])) as writer:
        for _ in range(2):
            writer.write("w", torch.ones(2, 3))
        assert writer.missing() == ("w",)
        writer.write("w", torch.ones(1, 3), row=3)
        assert writer.missing() == ("w",)
        writer.write("w", torch.ones(2, 3), row=1)
        assert writer.missing() == ()


def test_intervals_equal_a_set_of_integers():
    rng = random.Random(3)
    for _ in range(300):
        intervals, covered = Intervals(), set()
        for _ in range(rng.randrange(12)):
            begin = rng.randrange(20)
            end = min(20, begin + rng.randrange(8))
            intervals.add(begin, end)
            covered |= set(range(begin, end))
            merged = list(itertools.chain(*map(range, intervals._begins, intervals._ends)))
            assert merged == sorted(covered)
            assert all(e < b for e, b in zip(intervals._ends, intervals._begins[1:], strict=False))
            assert intervals.covers(20) == (len(covered) == 20)


def test_resume_keeps_what_was_written(tmp_path, tensors):
    shards = plan_shards(specs_of(tensors), max_shard_bytes=300)
    with SafetensorsWriter(tmp_path, shards) as writer:
        writer.write("full", tensors["full"])
    with SafetensorsWriter(tmp_path, shards, resume=True, written=["full"]) as writer:
        assert set(writer.missing()) == set(tensors) - {"full", "empty"}
        for name in writer.missing():
            writer.write(name, tensors[name])
        assert writer.missing() == ()
    write_all(tmp_path / "whole", tensors, max_shard_bytes=300)
    for shard in shards:
        assert (tmp_path / shard.file_name).read_bytes() == (tmp_path / "whole" / shard.file_name).read_bytes()


def test_resume_refuses_other_files(tmp_path):
    shards = plan_shards([TensorSpec("w", (4, 3), torch.float32)])
    with pytest.raises(ResumeError, match="missing in the partial output"):
        SafetensorsWriter(tmp_path, shards, resume=True)
    SafetensorsWriter(tmp_path, shards).close()
    with pytest.raises(InputError, match="File exists"):
        SafetensorsWriter(tmp_path, shards)
    with pytest.raises(ResumeError, match="'v' was written"):
        SafetensorsWriter(tmp_path, shards, resume=True, written=["v"])
    with pytest.raises(ResumeError, match="differ"):
        SafetensorsWriter(tmp_path, plan_shards([TensorSpec("w", (4, 3), torch.int32)]), resume=True)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(ResumeError, match="differ"):
        SafetensorsWriter(tmp_path, shards, resume=True)


def test_plans_refuse_names_that_clash():
    spec = TensorSpec("a", (1,), torch.uint8)
    for specs in ([spec, spec], [TensorSpec("__metadata__", (1,), torch.uint8)]):
        with pytest.raises(InputError, match="unique"):
            plan_shards(specs)
    with pytest.raises(InputError, match="max_shard_bytes"):
        plan_shards([spec], max_shard_bytes=0)


def in_child_with_file_limit(script, folder, limit):
    prelude = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\n"
        "from bitwright.core.tensor import TensorSpec\nfrom bitwright.errors import BitwrightError\n"
        "from bitwright.io.safetensors_writer import SafetensorsWriter, plan_shards\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"folder, limit = Path({str(folder)!r}), {limit}\n"
        "def go():\n" + "".join(f"    {line}\n" for line in script.splitlines()) + "try:\n    go()\n"
        "except BitwrightError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    )
    return subprocess.run([sys.executable, "-c", prelude], capture_output=True, text=True, check=False)


def test_a_disk_that_cannot_hold_the_shards_is_a_resource_error_that_leaves_no_file(tmp_path):
    script = """specs = [TensorSpec(n, (2**20,), torch.uint8) for n in 'ab'] + [TensorSpec('c', (2**22,), torch.uint8)]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
SafetensorsWriter(folder, plan_shards(specs, max_shard_bytes=2**20))"""
    done = in_child_with_file_limit(script, tmp_path, 2**21)
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert "model-00003-of-00003.safetensors" in done.stdout
    needed = plan_shards([TensorSpec("c", (2**22,), torch.uint8)])[0].total_bytes
    assert f"{needed} bytes needed" in done.stdout
    assert "bytes free" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_during_a_write_is_a_resource_error_naming_the_tensor(tmp_path):
    script = """w = SafetensorsWriter(folder, plan_shards([TensorSpec('big', (2**20,), torch.uint8)]))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
w.write('big', torch.ones(2**20, dtype=torch.uint8))"""
    done = in_child_with_file_limit(script, tmp_path, 2**19)
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert "tensor 'big'" in done.stdout
    assert f"{2**20} bytes needed" in done.stdout


def test_file_systems_without_fallocate_get_files_of_the_same_size(tmp_path, monkeypatch, tensors):
    import ctypes

    write_all(tmp_path / "a", tensors)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    write_all(tmp_path / "b", tensors)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
