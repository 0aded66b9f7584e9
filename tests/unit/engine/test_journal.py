"""The journal and the activations between blocks."""

import os

import pytest
import torch

from bitwright.engine.activations import ActivationStore
from bitwright.engine.journal import Commit, Journal
from bitwright.errors import ResumeError

IDENTITY = {"recipe bits": "4", "version of torch": "2"}


@pytest.fixture
def journal(tmp_path):
    made = Journal.start(tmp_path, IDENTITY)
    for step in range(3):
        made.append(
            Commit(step, {f"t{step}": "ab"}, [{"tensor": f"t{step}", "loss": 0.5}], f"hash{step}", "torch.float32")
        )
    return made


def test_reopened_journal_equals_what_was_written(journal, tmp_path):
    again = Journal.reopen(tmp_path, IDENTITY)
    assert again.commits == journal.commits
    assert not again.torn


def test_every_cut_gives_a_prefix(journal, tmp_path):
    """Whatever number of bytes reached the disk, the commits that are whole are kept, in order, and no others."""
    file = tmp_path / "journal.jsonl"
    data = file.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == 10]
    near = {end + shift for end in ends for shift in (-1, 0, 1)} & set(range(len(data)))
    for size in sorted(near | set(range(0, len(data), 7))):
        file.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)  # the line's end itself is not needed
        if whole == 0:
            with pytest.raises(ResumeError, match="damaged from its beginning"):
                Journal.reopen(tmp_path, IDENTITY)
            continue
        again = Journal.reopen(tmp_path, IDENTITY)
        assert again.commits == journal.commits[: whole - 1]
        assert again.torn == (size not in {*ends, *(end + 1 for end in ends)})


def test_flipped_bit_drops_the_entry_and_those_after_it(journal, tmp_path):
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"hash1", b"hash9")
    file.write_bytes(b"".join(lines))
    again = Journal.reopen(tmp_path, IDENTITY)
    assert again.torn
    assert again.commits == journal.commits[:1]
    again.append(Commit(1))
    assert [commit.step for commit in Journal.reopen(tmp_path, IDENTITY).commits] == [0, 1]


def test_changed_identity_is_listed(journal, tmp_path):
    with pytest.raises(ResumeError) as caught:
        Journal.reopen(tmp_path, {"recipe bits": "3", "model file x": "1"})
    assert "recipe bits: was 4, is 3" in caught.value.message
    assert "version of torch: was 2, is absent" in caught.value.message
    assert "model file x: was absent, is 1" in caught.value.message


@pytest.mark.parametrize("cap", [0, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_come_back_in_memory_and_from_the_disk(cap, dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 3, 4, generator=generator).to(dtype) for n in (2, 5, 1)]
    store = ActivationStore(tmp_path, cap_bytes=cap, total_bytes=100)
    writer = store.writer(7)
    for tensor in tensors:
        writer.append(tensor)
    digest = writer.finish()
    store.adopt(writer)
    fresh = ActivationStore(tmp_path, cap_bytes=cap, total_bytes=100)
    assert fresh.restore(7, digest)
    for held in (store, fresh):
        assert len(held) == 3
        assert all(torch.equal(a, b) for a, b in zip(held, tensors, strict=True))
    assert not fresh.restore(6, digest)
    assert not fresh.restore(7, "0" * 64)


def test_no_damage_to_activations_goes_unnoticed(tmp_path):
    store = ActivationStore(tmp_path, cap_bytes=0, total_bytes=100)
    writer = store.writer(0)
    writer.append(torch.arange(6.0))
    digest = writer.finish()
    file = store.file(0)
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert not store.restore(0, digest), position
        file.write_bytes(data[:position])
        assert not store.restore(0, digest), position
    os.unlink(file)
    assert not store.restore(0, digest)
