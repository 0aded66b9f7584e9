"""Whole roads into GGUF and back: one file, resumed, split, refused, converted integer for integer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bitwright
from bitwright.blocks.codec import decode
from bitwright.engine import gguf_write
from bitwright.errors import InputError, NumericError, PlanError, Stopped, VerifyError
from bitwright.io.gguf_file import GgufFile

MODEL = Path("examples/storylm-8m")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bitwright.to_gguf(MODEL, tmp_path_factory.mktemp("plain") / "plain.gguf", gguf={"type": "bf16"}).output


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bitwright.to_gguf(MODEL, tmp_path_factory.mktemp("q4") / "q4.gguf", gguf={"type": "Q4_0"}).output


def test_the_public_reader_finds_the_checkpoints_numbers(plain: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weights = load_file(MODEL / "model.safetensors")
    tensors = {t.name: t for t in gguf.GGUFReader(plain).tensors}
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type == gguf.GGMLQuantizationType.BF16
    stored = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    assert np.array_equal(stored, weights["model.embed_tokens.weight"].float().numpy())
    # llama.cpp rotates neighbouring pairs: row 2r + h of a head is the checkpoint's row h * half + r
    q = gguf.quants.dequantize(tensors["blk.2.attn_q.weight"].data, gguf.GGMLQuantizationType.BF16)
    source = weights["model.layers.2.self_attn.q_proj.weight"].float().numpy()
    heads = source.reshape(8, 2, 16, 256).swapaxes(1, 2).reshape(256, 256)
    assert np.array_equal(q, heads)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "q4.gguf"
    asked = iter([False, False, True])
    monkeypatch.setattr("bitwright.engine.interrupt.StopRequest.requested", lambda self: next(asked))
    with pytest.raises(Stopped, match="after 3 of 9"):
        bitwright.to_gguf(MODEL, output, gguf={"type": "Q4_0"})
    assert not output.exists()
    monkeypatch.undo()
    seen: list[str] = []
    original = gguf_write._Work.write

    def note(self: Any, target: Any) -> None:
        seen.append(target.place.name)
        original(self, target)

    monkeypatch.setattr(gguf_write._Work, "write", note)
    bitwright.to_gguf(MODEL, output, gguf={"type": "Q4_0"})
    assert output.read_bytes() == quantized.read_bytes()
    assert seen[0].startswith("blk.2.")
    assert [path.name for path in tmp_path.iterdir()] == ["q4.gguf"]


def test_another_recipe_does_not_resume_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "q4.gguf"
    monkeypatch.setattr("bitwright.engine.interrupt.StopRequest.requested", lambda self: True)
    with pytest.raises(Stopped):
        bitwright.to_gguf(MODEL, output, gguf={"type": "Q4_0"})
    monkeypatch.undo()
    with pytest.raises(InputError, match="recipe gguf: was"):
        bitwright.to_gguf(MODEL, output, gguf={"type": "Q8_0"})
    assert bitwright.to_gguf(MODEL, output, gguf={"type": "Q8_0"}, resume="never").output == output


def test_file_to_file_equals_folder_to_file_where_nothing_was_rounded(
    plain: Path, quantized: Path, tmp_path: Path
) -> None:
    again = bitwright.to_gguf(plain, tmp_path / "again.gguf", gguf={"type": "Q4_0"}).output
    with GgufFile.open(again) as one, GgufFile.open(quantized) as two:
        assert list(one.tensors) == list(two.tensors)
        assert all(np.array_equal(one.raw(name), two.raw(name)) for name in one.tensors)


def test_blocks_are_not_quantized_anew_unless_asked(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Q6_K already"):
        bitwright.to_gguf(quantized, tmp_path / "q8.gguf", gguf={"type": "Q8_0"})
    assert list(tmp_path.iterdir()) == []
    made = bitwright.to_gguf(quantized, tmp_path / "q8.gguf", gguf={"type": "Q8_0"}, requantize=True)
    assert {t.block.name for t in made.plan.targets} == {"Q8_0", "F32"}


def test_blocks_become_plain_numbers_where_these_are_asked_for(quantized: Path, tmp_path: Path) -> None:
    made = bitwright.to_gguf(quantized, tmp_path / "f32.gguf", gguf={"type": "f32"}).output
    with GgufFile.open(made) as one, GgufFile.open(quantized) as two:
        assert {tensor.block.name for tensor in one.tensors.values()} == {"F32"}
        name = "blk.4.ffn_up.weight"
        assert np.array_equal(one.read(name), two.read(name))


def test_a_calibrated_run_that_was_stopped_between_its_halves_is_not_mixed_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:20_000])
    options: dict[str, Any] = {
        "method": "gptq", "gguf": {"type": "Q4_0"}, "calibration": {"text": str(text), "samples": 4, "length": 64}
    }  # fmt: skip

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped("stopped", mend="go on")

    monkeypatch.setattr("bitwright.engine.gguf_run.write_file", stop)
    with pytest.raises(Stopped):
        bitwright.to_gguf(MODEL, tmp_path / "out.gguf", **options)
    monkeypatch.undo()
    with pytest.raises(InputError, match="recipe seed: was 0, is 1"):
        bitwright.to_gguf(MODEL, tmp_path / "out.gguf", seed=1, **options)
    seen: list[str] = []
    monkeypatch.setattr("bitwright.engine.gguf_run.quantize_folder", lambda *a, **k: seen.append("again"))
    made = bitwright.to_gguf(MODEL, tmp_path / "out.gguf", **options)
    assert seen == []
    assert made.output.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "out.gguf"}


def test_an_importance_matrix_is_no_model(tmp_path: Path) -> None:
    from bitwright.gguf.imatrix import ImportanceMatrix, Sums, write_imatrix

    entries = {"blk.0.attn_q.weight": Sums(np.ones((1, 32), np.float32), np.ones(1, np.float32))}
    write_imatrix(ImportanceMatrix(entries, ("text",), 1), tmp_path / "imatrix.gguf")
    with pytest.raises(PlanError, match="nothing would be quantized"):
        bitwright.to_gguf(tmp_path / "imatrix.gguf", tmp_path / "out.gguf", gguf={"type": "Q4_0"})
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_parts_hold_together_what_one_file_holds(quantized: Path, tmp_path: Path) -> None:
    made = bitwright.to_gguf(MODEL, tmp_path / "s.gguf", gguf={"type": "Q4_0", "max_part_bytes": 1_500_000})
    assert made.output.name == f"s-00001-of-0000{len(made.plan.parts)}.gguf"
    assert len(list(tmp_path.iterdir())) == len(made.plan.parts) > 2
    with GgufFile.open(tmp_path / made.plan.parts[1].file_name) as parts, GgufFile.open(quantized) as whole:
        assert all(np.array_equal(parts.raw(name), whole.raw(name)) for name in whole.tensors)


def test_weights_come_back_bit_for_bit_and_settings_mean_the_same(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bitwright.from_gguf(plain, tmp_path / "dense")
    ours, theirs = load_file(tmp_path / "dense" / "model.safetensors"), load_file(MODEL / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ids = torch.arange(40)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (tmp_path / "dense", MODEL))
    assert torch.equal(one, two)


def test_decoded_files_are_evaluated_like_folders(quantized: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:8000])
    found = bitwright.evaluate(quantized, against=MODEL, text=text, length=128, windows=4)
    bitwright.from_gguf(quantized, tmp_path / "dense", dtype=torch.float32)
    again = bitwright.evaluate(tmp_path / "dense", against=MODEL, text=text, length=128, windows=4)
    assert 0.0005 < found.quality.kl.mean < 0.05
    assert found.quality.kl.mean == pytest.approx(again.quality.kl.mean, rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ({"method": "rtn", "layout": "gptq", "bits": 4, "group_size": 32, "scale_dtype": "float16"}, "Q4_0"),
        ({"method": "rtn", "layout": "gptq", "bits": 4, "group_size": 128, "scale_dtype": "float16"}, "Q4_0"),
        ({"method": "rtn", "layout": "compressed-tensors", "bits": 8, "group_size": "channel", "scale_dtype": "float16"}, "Q8_0"),
    ],
    ids=["gptq-32", "gptq-128", "ct-8"],
)  # fmt: skip
def test_integer_checkpoints_become_blocks_with_the_same_numbers(
    recipe: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

    bitwright.quantize(MODEL, tmp_path / "in", **recipe)
    made = bitwright.to_gguf(tmp_path / "in", tmp_path / "out.gguf")
    opened = open_checkpoint(tmp_path / "in")
    assert isinstance(opened, DecodedSource)
    with opened.stored, GgufFile.open(made.output) as file:
        tensor = file.tensors["blk.1.ffn_down.weight"]
        assert tensor.block.name == kind
        found = decode(file.raw(tensor.name), kind, tensor.shape[1])
        assert np.array_equal(found, opened.read("model.layers.1.mlp.down_proj.weight").numpy())
        assert file.tensors["token_embd.weight"].block.name == "BF16"
        assert file.get("general.file_type", int) == {"Q4_0": 2, "Q8_0": 7}[kind]


def test_what_blocks_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    bitwright.quantize(MODEL, tmp_path / "in", method="rtn", layout="gptq", bits=3)
    with pytest.raises(PlanError, match="no counterpart among GGUF's types"):
        bitwright.to_gguf(tmp_path / "in", tmp_path / "out.gguf")
    bitwright.quantize(MODEL, tmp_path / "nf4", method="rtn", layout="bitsandbytes", scheme="codebook")
    with pytest.raises(PlanError, match="no counterpart"):
        bitwright.to_gguf(tmp_path / "nf4", tmp_path / "out.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "nf4"}


@pytest.mark.parametrize(
    ("gguf", "message"),
    [
        ({"type": "IQ2_XXS"}, "importance weights"),
        ({"type": "Q4_0", "tensor_types": ["nothing=Q8_0"]}, "matches no tensor"),
        ({"type": "Q4_0", "imatrix": "absent.gguf"}, "absent"),
    ],
)
def test_impossible_wishes_leave_nothing_behind(gguf: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        bitwright.to_gguf(MODEL, tmp_path / "out.gguf", gguf=gguf)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_only_replaced_when_asked(plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        bitwright.to_gguf(MODEL, output, gguf={"type": "bf16"})
    assert output.read_bytes() == b"mine"
    bitwright.to_gguf(MODEL, output, gguf={"type": "bf16"}, overwrite=True)
    assert output.read_bytes() == plain.read_bytes()
    with pytest.raises(InputError, match="not called"):
        bitwright.to_gguf(MODEL, tmp_path / "out.bin", gguf={"type": "bf16"})


def test_bytes_that_change_on_the_disk_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.io.gguf_writer import GgufWriter

    original = GgufWriter.write

    def flip(self: Any, name: str, data: Any, row: int = 0) -> None:
        if name == "blk.5.attn_v.weight":
            data = data.copy()
            data[3, 7] ^= 1
        original(self, name, data, row)

    monkeypatch.setattr(GgufWriter, "write", flip)
    with pytest.raises(VerifyError, match=r"blk\.5\.attn_v"):
        bitwright.to_gguf(MODEL, tmp_path / "out.gguf", gguf={"type": "Q8_0"})
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_end_with_the_tensors_name(plain: Path, tmp_path: Path) -> None:
    with GgufFile.open(plain) as file:
        tensor = file.tensors["blk.3.ffn_up.weight"]
    data = bytearray(plain.read_bytes())
    data[tensor.offset : tensor.offset + 2] = b"\xc0\x7f"
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(NumericError, match=r"blk\.3\.ffn_up\.weight"):
        bitwright.to_gguf(bad, tmp_path / "out.gguf", gguf={"type": "Q8_0"})
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_gptq_onto_blocks_loses_less_than_rounding_with_importance_weights(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = Path("examples/storylm-8m-selfgen.txt").read_text()
    text.write_text(words[:60_000])
    other = tmp_path / "other.txt"
    other.write_text(words[200_000:230_000])
    calibration = {"text": str(text), "samples": 16, "length": 256, "shuffle": False}
    found = {}
    for method in ("rtn", "gptq"):
        made = bitwright.to_gguf(
            MODEL,
            tmp_path / f"{method}.gguf",
            method=method,
            gguf={"type": "Q2_K", "imatrix": "auto"},
            calibration=calibration,
        )
        compared = bitwright.evaluate(made.output, against=MODEL, text=other, length=256, windows=12).quality
        assert compared is not None
        found[method] = (
            compared.kl.mean,
            {t.place.name: t.block.name for t in made.plan.targets},
            made.plan.file_bytes,
        )
    assert found["gptq"][1] == found["rtn"][1]
    assert found["gptq"][0] < 0.8 * found["rtn"][0]
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "other.txt", "rtn.gguf", "gptq.gguf"}


def test_a_rotated_model_is_the_same_model_in_another_file(tmp_path: Path) -> None:
    made = bitwright.to_gguf(MODEL, tmp_path / "r.gguf", transforms=["rotate"], method="rtn", gguf={"type": "Q8_0"})
    text = tmp_path / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:8000])
    compared = bitwright.evaluate(made.output, against=MODEL, text=text, length=128, windows=4).quality
    assert compared is not None
    assert compared.kl.mean < 0.002
    with GgufFile.open(made.output) as file:
        assert "output.weight" in file.tensors


def test_quantized_embeddings_feed_the_calibrated_blocks(tmp_path: Path) -> None:
    """The written model is run again and compared, which only agrees if the run used what it wrote."""
    text = tmp_path / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:20_000])
    calibration = {"text": str(text), "samples": 8, "length": 64, "shuffle": False}
    made = bitwright.quantize(
        MODEL,
        tmp_path / "out",
        layout="native",
        method="gptq",
        bits=4,
        group_size=32,
        embeddings=True,
        calibration=calibration,
    )
    assert any(line["tensor"] == "model.embed_tokens.weight" for line in made.report)


SPLIT = {"type": "Q8_0", "max_part_bytes": 4_000_000}


def test_parts_that_exist_are_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bitwright.to_gguf(MODEL, tmp_path / "s.gguf", gguf=SPLIT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("bitwright.engine.gguf_run.write_file", lambda *_a, **_k: pytest.fail("it was written"))
    monkeypatch.setattr("bitwright.engine.gguf_run.quantize_folder", lambda *_a, **_k: pytest.fail("it was calibrated"))
    for method in ("rtn", "gptq"):
        with pytest.raises(InputError, match=r"s-0000\d-of-00003\.gguf: exists already"):
            bitwright.to_gguf(MODEL, tmp_path / "s.gguf", method=method, gguf=SPLIT)
    assert len(first.plan.parts) == 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_part_of_a_split_source_is_written_over(tmp_path: Path) -> None:
    made = bitwright.to_gguf(MODEL, tmp_path / "s.gguf", gguf=SPLIT)
    parts = [tmp_path / part.file_name for part in made.plan.parts]
    before = [path.read_bytes() for path in parts]
    with pytest.raises(InputError, match="the source"):
        bitwright.to_gguf(parts[0], parts[1], gguf={"type": "f16"}, overwrite=True)
    with pytest.raises(InputError, match="the source"):
        bitwright.to_gguf(parts[0], tmp_path / "s.gguf", gguf=SPLIT, overwrite=True, requantize=True)
    assert [path.read_bytes() for path in parts] == before


def test_importance_weights_are_collected_from_pickled_weights_too(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:3000])
    (tmp_path / "in").mkdir()
    for file in MODEL.iterdir():
        if file.suffix == ".json":
            (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(MODEL / "model.safetensors"), tmp_path / "in" / "pytorch_model.bin")
    options: dict[str, Any] = {
        "gguf": {"type": "Q4_0", "imatrix": "auto"}, "calibration": {"text": str(text), "samples": 2, "length": 64}
    }  # fmt: skip
    plain = bitwright.to_gguf(MODEL, tmp_path / "plain.gguf", **options)
    made = bitwright.to_gguf(tmp_path / "in", tmp_path / "out.gguf", allow_pickle=True, **options)
    assert made.hashes == plain.hashes


def test_importance_weights_cannot_be_collected_from_a_file(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a checkpoint folder"):
        bitwright.to_gguf(plain, tmp_path / "out.gguf", gguf={"type": "Q4_0", "imatrix": "auto"})
    assert not list(tmp_path.iterdir())


def test_single_numbers_are_carried_along_and_refused_as_weights(plain: Path, tmp_path: Path) -> None:
    """Tensors without any dimension, which the container allows."""
    from bitwright.blocks.types import TYPES
    from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf

    with GgufFile.open(plain) as file:
        values = dict(file.values)
        tensors = {name: (t.shape, t.block, file.raw(name)) for name, t in file.tensors.items()}
    for name, replaced in (("odd.scale", None), ("blk.0.attn_norm.weight", "blk.0.attn_norm.weight")):
        mixed = {key: value for key, value in tensors.items() if key != replaced}
        mixed[name] = ((), TYPES["F32"], np.float32([[2.5]]).view(np.uint8))
        entries = [GgufEntry(key, shape, block) for key, (shape, block, _) in mixed.items()]
        (tmp_path / "in").mkdir(exist_ok=True)
        source = tmp_path / "in" / f"{name}.gguf"
        with GgufWriter(source.parent, plan_gguf(values, entries, stem=name)) as writer:
            for key, (_, _, raw) in mixed.items():
                writer.write(key, raw)
        made = bitwright.to_gguf(source, tmp_path / f"{name}.gguf", gguf={"type": "Q4_0"})
        with GgufFile.open(made.output) as file:
            assert file.tensors[name].shape == ()
            assert file.read(name).tolist() == [[2.5]]
    with pytest.raises(InputError, match="is a single number"):
        bitwright.from_gguf(source, tmp_path / "dense")


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_killed_between_the_renames_of_its_parts_takes_them_back(
    resume: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "out").mkdir()
    whole = bitwright.to_gguf(MODEL, tmp_path / "whole" / "s.gguf", gguf=SPLIT)
    real, renamed = os.replace, []

    def killed(first: Any, second: Any) -> None:
        if str(second).startswith(str(tmp_path / "out" / "s-")):
            renamed.append(Path(second).name)
            if len(renamed) == 2:
                raise KeyboardInterrupt
        real(first, second)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bitwright.to_gguf(MODEL, tmp_path / "out" / "s.gguf", gguf=SPLIT)
    monkeypatch.setattr(os, "replace", real)
    assert not (tmp_path / "out" / "s-00001-of-00003.gguf").exists()
    assert (tmp_path / "out" / renamed[0]).exists()
    again = bitwright.to_gguf(MODEL, tmp_path / "out" / "s.gguf", gguf=SPLIT, resume=resume)
    for part in whole.plan.parts:
        assert (
            again.output.with_name(part.file_name).read_bytes() == whole.output.with_name(part.file_name).read_bytes()
        )
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_file_that_somebody_put_in_the_place_of_a_part_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def killed(first: Any, second: Any) -> None:
        real(first, second)
        if Path(second).name == "s-00003-of-00003.gguf":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bitwright.to_gguf(MODEL, tmp_path / "s.gguf", gguf=SPLIT)
    monkeypatch.setattr(os, "replace", real)
    last = tmp_path / "s-00003-of-00003.gguf"
    last.rename(tmp_path / "kept")
    last.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        bitwright.to_gguf(MODEL, tmp_path / "s.gguf", gguf=SPLIT, resume="never")
    assert last.read_bytes() == b"mine"
