import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitwright.errors import InputError, ResourceError
from bitwright.io import pickled
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.unpickle import convert


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def scratch(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return scratch


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_unless_allowed(folder, name):
    torch.save({"a": torch.ones(2)}, folder / name)
    with pytest.raises(InputError, match=rf"only pickled weights \('{name}'\).*--allow-pickle"):
        SafetensorsDir.open(folder)


def test_safetensors_win_over_pickles(folder):
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert torch.equal(SafetensorsDir.open(folder).read("a"), torch.ones(2))


def test_a_bomb_is_refused_and_does_not_go_off(folder, scratch, tmp_path):
    trace = tmp_path / "trace"
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": Bomb(trace)}, file)
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*--allow-pickle"):
        SafetensorsDir.open(folder)
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        SafetensorsDir.open(folder, allow_pickle=True, scratch=scratch)
    torch.save({"a": Bomb(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="weights_only=True"):
        SafetensorsDir.open(folder, allow_pickle=True, scratch=scratch)
    assert not trace.exists()
    assert list(scratch.iterdir()) == []
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # the bomb was a live one


def test_sharded_pickles_are_converted_bit_for_bit(folder, scratch, tensors):
    tied = {"lm_head": tensors["embed"], "turned": tensors["full"].transpose(0, 2)}
    names = sorted(tensors, key=lambda name: "fp8" not in name)  # the old layout knows no float8
    first, second = {n: tensors[n] for n in names[:5]}, {n: tensors[n] for n in names[5:]} | tied
    torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(
        {"state_dict": second, "epoch": 3},
        folder / "pytorch_model-00002-of-00002.bin",
        _use_new_zipfile_serialization=False,
    )
    weight_map = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin")
    weight_map |= dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "optimizer.pt").write_bytes(b"not weights")
    with SafetensorsDir.open(folder, allow_pickle=True, scratch=scratch) as source:
        assert source.path == folder
        for name, expected in (first | second).items():
            read = source.read(name)
            assert read.dtype == expected.dtype
            assert read.shape == expected.shape
            assert torch.equal(read.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        prints = source.fingerprint()
        assert len(prints) == 4
        (copy,) = scratch.iterdir()
        assert copy.stat().st_mode & 0o777 == 0o700
        torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
        with pytest.raises(InputError, match="changed"):
            source.check_unchanged()
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "not a state dict but a list"),
        ({"a": 3}, "entry 'a': a int"),
        ({1: torch.ones(2)}, "entry '1'"),
        ({"a": torch.ones(2, 2).to_sparse()}, "not a plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.ones(1).expand(2**36)}, "would become"),
    ],
    ids=range(6),
)
def test_what_is_not_a_state_dict_is_refused(folder, content, reason):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=reason):
        convert(folder / "pytorch_model.bin", folder / "out")
    assert not (folder / "out").exists()


def test_garbage_and_truncation_are_refused(folder):
    torch.save({"a": torch.ones(1000)}, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    rng = random.Random(4)
    flipped = [bytearray(data) for _ in range(200)]
    for copy in flipped:
        copy[rng.randrange(800)] ^= 1 << rng.randrange(8)
    for content in (b"", b"garbage", data[:100], data[:-2000], *flipped):
        (folder / "pytorch_model.bin").write_bytes(content)
        try:
            convert(folder / "pytorch_model.bin", folder / "out")
        except InputError as error:
            assert "pytorch_model.bin" in error.message  # noqa: PT017 - some flips leave a sound file
        else:
            assert content in flipped
            shutil.rmtree(folder / "out")


def test_a_killed_child_is_an_input_error(folder, scratch, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nkill -SEGV $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(pickled.sys, "executable", str(fake))
    with pytest.raises(InputError, match="killed by signal 11"):
        SafetensorsDir.open(folder, allow_pickle=True, scratch=scratch)
    fake.write_text("#!/bin/sh\necho 'no \033[31m module' >&2; exit 1\n")
    with pytest.raises(InputError, match=r"could not be read \(no \\x1b\[31m module"):
        SafetensorsDir.open(folder, allow_pickle=True, scratch=scratch)
    fake.write_text('#!/bin/sh\necho \'{"error": "disk full", "mend": "free some"}\'; exit 4\n')
    with pytest.raises(ResourceError, match="disk full"):
        SafetensorsDir.open(folder, allow_pickle=True, scratch=scratch)
    assert list(scratch.iterdir()) == []


def test_modules_beside_the_pickle_are_not_imported(folder, scratch, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    for module in ("json.py", "torch.py", "resource.py"):
        (folder / module).write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.chdir(folder)
    SafetensorsDir.open(Path("."), allow_pickle=True, scratch=scratch).close()
    assert not (tmp_path / "trace").exists()


def test_a_fork_does_not_remove_the_copy(tmp_path):
    (tmp_path / "copy").mkdir()
    pickled.remove_scratch(tmp_path / "copy", os.getpid() + 1)
    assert (tmp_path / "copy").exists()
    pickled.remove_scratch(tmp_path / "copy", os.getpid())
    assert not (tmp_path / "copy").exists()
