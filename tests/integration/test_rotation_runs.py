"""Rotation end to end: quantized, resumed, planned, loaded."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.small import contents, make_model

import bitwright as package
from bitwright.core.rotation import Rotation
from bitwright.engine import modelwide
from bitwright.engine.rotated import RotatedSource, Turn
from bitwright.engine.run import open_source
from bitwright.errors import NumericError, PlanError
from bitwright.transforms.rotate import Rotate

GROUP = ["--layout", "native", "--group-size", "32"]
CALIBRATED = [*GROUP, "--samples", "8", "--length", "32", "--transform", "rotate"]
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))


def _logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def _original(folder):
    import transformers

    return _logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def _distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "qwen3_moe"])
def test_rotated_and_quantized_model_computes_nearly_the_same(name, text, tmp_path):
    """8 bits, so that whatever rotation got wrong would show."""
    source = make_model(name, tmp_path / name)
    options = {"layout": "native", "group_size": 32, "bits": 8, "transforms": ["rotate"]}
    calibration = {"text": str(text), "samples": 8, "length": 32}
    expected = _original(source)
    for method, method_options in (("rtn", {}), ("gptq", {"correct_drift": False})):
        output = tmp_path / method
        result = package.quantize(
            source, output, method=method, method_options=method_options, min_expert_tokens=16, calibration=calibration,
            **options,
        )  # fmt: skip
        assert _distance(_logits(package.load(output, dtype=torch.float32)), expected) < 0.04
        assert json.loads((output / "config.json").read_text()).get("tie_word_embeddings", False) is False
        told = [note for note in json.loads((output / "bitwright.json").read_text())["notes"] if "unties" in note]
        assert len(told) == (name != "qwen3_moe")
        assert set(told) <= set(result.plan.notes)


def test_same_seed_same_bytes_another_seed_others(llama, bitwright, text, tmp_path):
    arguments = ["quantize", llama, *CALIBRATED, "--calibration", text, "--method", "search"]
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, _, err = bitwright(*arguments, "--seed", seed, "-o", tmp_path / output)
        assert code == 0, err
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first, other = (load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in ("a", "c"))
    assert not torch.equal(first, other)


def test_killed_run_resumes_with_identical_bytes(llama, forker, text, tmp_path):
    arguments = ["quantize", llama, *CALIBRATED, "--calibration", text]
    assert forker.run(*arguments, "-o", tmp_path / "whole") == 0, forker.output
    steps = forker.steps
    assert forker.run(*arguments, "-o", tmp_path / "out", kill_at=steps // 2) == -signal.SIGKILL
    assert forker.run(*arguments, "-o", tmp_path / "out", "--resume", "require") == 0, forker.output
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_plan_shows_the_head_of_its_own_and_exact_bytes(llama, bitwright, tmp_path):
    arguments = [llama, *GROUP, "--method", "rtn", "--transform", "rotate"]
    code, out, err = bitwright("plan", *arguments, "--json")
    assert code == 0, err
    planned = json.loads(out)
    (head,) = (entry for entry in planned["tensors"] if entry["name"] == "lm_head.weight")
    assert (head["action"], head["shape"], head["bytes"]) == ("keep", [256, 64], 256 * 64 * 2)
    assert any("unties" in note for note in planned["notes"])
    code, _, err = bitwright("quantize", *arguments, "-o", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == planned["weight_file_bytes"]


def test_head_of_its_own_can_be_quantized(llama, tmp_path):
    options = {"layout": "native", "group_size": 32, "bits": 8, "method": "rtn"}
    with pytest.raises(PlanError, match="head"):
        package.quantize(llama, tmp_path / "tied", head=True, **options)
    package.quantize(llama, tmp_path / "out", head=True, transforms=["rotate"], **options)
    assert _distance(_logits(package.load(tmp_path / "out", dtype=torch.float32)), _original(llama)) < 0.04


def test_plan_refuses_what_cannot_be_rotated(bitwright, tmp_path):
    source = make_model("gemma2", tmp_path / "gemma2")
    for command in (["plan"], ["quantize", "-o", tmp_path / "out"]):
        code, _, err = bitwright(*command, source, *GROUP, "--method", "rtn", "--transform", "rotate")
        assert code == 2
        assert "such as a norm" in err
    assert not (tmp_path / "out").exists()


def test_rotation_comes_before_transforms_of_blocks(llama, tmp_path):
    with pytest.raises(PlanError, match="come before"):
        package.quantize(llama, tmp_path / "out", layout="native", group_size=32, transforms=["smoothquant", "rotate"])


def test_badly_scaled_channels_do_not_hurt_after_rotation(llama, tmp_path):
    """Norm weights and the columns behind them rescaled against each other: the same model, but groups of unlike columns."""
    source = tmp_path / "scaled"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    factors = torch.exp2(torch.randint(-4, 5, (64,), generator=torch.Generator().manual_seed(0)).float()).bfloat16()
    for block in range(3):
        lead = f"model.layers.{block}"
        fed = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
               "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}  # fmt: skip
        for norm, consumers in fed.items():
            tensors[f"{lead}.{norm}.weight"] /= factors
            for consumer in consumers:
                tensors[f"{lead}.{consumer}.weight"] *= factors
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    expected = _original(llama)
    assert _distance(_original(source), expected) < 1e-5
    options = {"method": "rtn", "layout": "native", "bits": 4, "group_size": 32}
    found = {}
    for name, transforms in (("plain", []), ("rotated", ["rotate"])):
        package.quantize(source, tmp_path / name, transforms=transforms, **options)
        found[name] = _distance(_logits(package.load(tmp_path / name, dtype=torch.float32)), expected)
    package.quantize(llama, tmp_path / "unscaled", transforms=[], **options)
    unscaled = _distance(_logits(package.load(tmp_path / "unscaled", dtype=torch.float32)), expected)
    assert found["plain"] > 1.5 * found["rotated"]
    assert found["rotated"] < 1.2 * unscaled


class _Stretched(Rotation):
    """No rotation at all."""

    def apply(self, x):
        return 1.5 * super().apply(x)


def test_matrix_that_is_not_orthogonal_is_found_out(llama, tmp_path, monkeypatch):
    plain = Rotate.stream_rotation

    def stretched(self, width, **options):
        return _Stretched(width, plain(self, width, **options).stages)

    monkeypatch.setattr(Rotate, "stream_rotation", stretched)
    with pytest.raises(PlanError, match="something else"):
        package.quantize(llama, tmp_path / "out", method="rtn", layout="native", group_size=32, transforms=["rotate"])


def test_other_logits_end_the_run_before_anything_is_written(llama, tmp_path, monkeypatch):
    honest = modelwide.rotated_source

    def careless(source, transform, seed):
        """Forgets the second block's down projection."""
        rotated, notes = honest(source, transform, seed)
        turns = {n: t for n, t in rotated._turns.items() if n != "model.layers.1.mlp.down_proj.weight"}
        return RotatedSource(source, turns, rotated.config, None), notes

    monkeypatch.setattr(modelwide, "rotated_source", careless)
    with pytest.raises(NumericError, match="other logits"):
        package.quantize(llama, tmp_path / "out", method="rtn", layout="native", group_size=32, transforms=["rotate"])
    assert list(tmp_path.iterdir()) == []


def test_thread_count_does_not_change_rotated_bytes(llama):
    rotation = Rotate(kind="random").stream_rotation(64, rng=torch.Generator().manual_seed(0), keep_ones=False)
    threads = torch.get_num_threads()
    found = []
    try:
        with open_source(llama) as source:
            turn = {"model.embed_tokens.weight": Turn("model.embed_tokens.weight", columns=rotation)}
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                found.append(RotatedSource(source, turn, {}, None).read("model.embed_tokens.weight"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
