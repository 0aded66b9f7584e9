"""Importance matrices: what is collected, both file formats, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.blocks.types import TYPES
from bitwright.errors import InputError, PlanError
from bitwright.gguf.imatrix import ImportanceMatrix, Sums, read_imatrix, write_imatrix

MODEL = Path("examples/storylm-8m")


def matrix() -> ImportanceMatrix:
    rng = np.random.default_rng(1)
    dense = Sums(rng.random((1, 8), np.float32) * 100, np.array([50], np.float32))
    experts = Sums(rng.random((3, 4), np.float32), np.array([7, 0, 9], np.float32))
    return ImportanceMatrix({"blk.0.attn_q.weight": dense, "blk.0.ffn_up_exps.weight": experts}, ("books.txt",), 4, 128)


def test_the_gguf_form_comes_back_and_is_read_by_the_public_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "imatrix.gguf"
    write_imatrix(matrix(), path)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("books.txt",), 4, 128)
    for name, sums in matrix().entries.items():
        assert np.array_equal(found.entries[name].squares, sums.squares)
        assert np.array_equal(found.entries[name].counts, sums.counts)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    shapes = {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
    # ggml counts the fastest axis first
    assert shapes["blk.0.ffn_up_exps.weight.in_sum2"] == (4, 3)
    assert shapes["blk.0.ffn_up_exps.weight.counts"] == (1, 3)


def test_the_older_form_is_read_from_bytes_written_out_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    values = [3.0, 6.0, 9.0, 12.0]
    record = struct.pack("<i", 3) + b"abc" + struct.pack("<ii4f", 3, 4, *values)
    path.write_bytes(struct.pack("<i", 1) + record + struct.pack("<ii", 10, 5) + b"texts")
    found = read_imatrix(path)
    assert (found.chunks, found.datasets) == (10, ("texts",))
    weights = found.weights("abc", 4)
    assert weights is not None
    assert weights.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    stack = found.weights("abc", 2, 2)
    assert stack is not None
    assert stack.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    path.write_bytes(struct.pack("<i", 1) + record)  # without what newer writers add
    assert read_imatrix(path).chunks == 0


def test_both_forms_give_the_same_weights(tmp_path: Path) -> None:
    write_imatrix(matrix(), tmp_path / "a.dat")
    write_imatrix(matrix(), tmp_path / "a.gguf")
    old, new = read_imatrix(tmp_path / "a.dat"), read_imatrix(tmp_path / "a.gguf")
    for name, columns, matrices in (("blk.0.attn_q.weight", 8, 1), ("blk.0.ffn_up_exps.weight", 4, 3)):
        one, two = old.weights(name, columns, matrices), new.weights(name, columns, matrices)
        assert one is not None
        assert two is not None
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_an_expert_that_nobody_reached_is_weighed_with_ones() -> None:
    weights = matrix().weights("blk.0.ffn_up_exps.weight", 4, 3)
    assert weights is not None
    assert weights[1].tolist() == [1.0] * 4


def test_missing_entries_are_none_and_other_sizes_an_error() -> None:
    assert matrix().weights("blk.9.attn_q.weight", 8) is None
    with pytest.raises(PlanError, match="1 x 8 values"):
        matrix().weights("blk.0.attn_q.weight", 16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<i", -1),
        struct.pack("<i", 2**30),
        struct.pack("<ii", 1, 2**30),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**30),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, float("nan")) + b"\0" * 16,
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, -4.0) + b"\0" * 16,
    ],
    ids=["empty", "negative", "many", "long name", "long values", "nan", "below zero"],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"imatrix\.dat"):
        read_imatrix(path)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    from bitwright.io.gguf_values import string
    from bitwright.io.gguf_writer import GgufWriter, plan_gguf

    with GgufWriter(tmp_path, plan_gguf({"general.type": string("model")}, [], stem="m")) as writer:
        writer.sync()
    with pytest.raises(InputError, match="imatrix"):
        read_imatrix(tmp_path / "m.gguf")


def test_what_is_collected_are_the_mean_squares_that_hooks_on_the_whole_model_see(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitwright import collect_imatrix

    text = tmp_path / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:20000])
    found = collect_imatrix(MODEL, text=text, samples=4, length=64, seed=0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> None:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros(x.shape[1], dtype=torch.float64)) + x.square().sum(0)

        model.get_submodule(name).register_forward_pre_hook(hook)

    names = {
        "blk.3.attn_v.weight": "model.layers.3.self_attn.v_proj",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj",
    }
    for name in names.values():
        watch(name)
    from bitwright.engine.calibration import tokens_from_texts
    from bitwright.engine.recipe import Calibration

    tokens = tokens_from_texts(
        [text.read_text()], AutoTokenizer.from_pretrained(MODEL), Calibration(text=str(text), samples=4, length=64), seed=0,
        vocab_size=8192, origin="text",
    )  # fmt: skip
    with torch.no_grad():
        for batch in tokens.batches:
            model(input_ids=batch)
    for ours, theirs in names.items():
        weights = found.weights(ours, len(sums[theirs]))
        assert weights is not None
        np.testing.assert_allclose(weights[0], (sums[theirs] / 256).numpy(), rtol=2e-2)
    assert "token_embd.weight" not in found.entries
    assert len(found.entries) == 8 * 7


@pytest.mark.parametrize("chunks", [-5, 2**40])
def test_numbers_of_chunks_that_no_file_can_state_are_refused(chunks, tmp_path):
    from bitwright.io.gguf_values import i64, string
    from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf

    values = {"general.type": string("imatrix"), "imatrix.chunk_count": i64(chunks)}
    parts = {"blk.0.attn_q.weight.in_sum2": (1, 32), "blk.0.attn_q.weight.counts": (1, 1)}
    plan = plan_gguf(values, [GgufEntry(name, shape, TYPES["F32"]) for name, shape in parts.items()], stem="m")
    with GgufWriter(tmp_path, plan) as writer:
        for name, shape in parts.items():
            writer.write(name, np.ones(shape, np.float32).view(np.uint8))
    with pytest.raises(InputError, match=r"m\.gguf claims to be made from"):
        read_imatrix(tmp_path / "m.gguf")
