"""Whole runs under a budget: sizes on disk, what is tied, what engines load, and that measured quality beats the uniform recipe."""

from __future__ import annotations

import json

import pytest
import yaml
from tests.small import STORY, STORY_TEXT, add_text, make_model, run

import bitwright
from bitwright.engine.recipe import load_recipe
from bitwright.errors import PlanError
from bitwright.gguf.mixture import quantizable
from bitwright.io.gguf_file import GgufFile


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Shared by the tests of this file, and by nothing else."""
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "budget-cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    return make_model("llama", folder / "model"), add_text(folder)


def options(text, **budget):
    return {
        "calibration": {"text": str(text), "samples": 8, "length": 64},
        "budget": {"samples": 4, "length": 64, **budget},
        "group_size": 32,
    }


def test_bits_per_weight_are_kept_and_hardly_missed(model, tmp_path):
    source, text = model
    given = options(text, bits_per_weight=3.6, candidates=["2g32", "3g32", "4g32", "8g32", "keep"])
    plan = bitwright.quantize(source, tmp_path / "out", method="rtn", layout="native", **given).plan
    layers = [entry for entry in plan.entries if entry.unit is not None and entry.unit.role == "linear"]
    stored = sum(entry.stored_bytes for entry in layers)
    weights = sum(entry.unit.shape[0] * entry.unit.shape[1] for entry in layers)
    assert 3.4 < 8 * stored / weights <= 3.6
    labels = {entry.scheme.describe() if entry.scheme else "keep" for entry in layers}
    assert len(labels) >= 2


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_files_are_no_larger_than_they_may_be(model, tmp_path, method):
    source, text = model
    largest = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    limit = int(0.45 * largest)
    out = tmp_path / "out"
    bitwright.quantize(source, out, method=method, layout="native", **options(text, bytes=limit))
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0.9 * limit < size <= limit


def test_too_small_a_file_is_refused_before_anything_is_written(model, tmp_path):
    source, text = model
    with pytest.raises(PlanError, match="bytes are not quantized, the rest takes at least"):
        bitwright.quantize(source, tmp_path / "out", method="rtn", layout="native", **options(text, bytes=40_000))
    assert not (tmp_path / "out").exists()


def test_parts_of_fused_layers_are_tied_where_engines_fuse_them(model):
    source, text = model
    made = bitwright.allocate(source, method="rtn", layout="compressed-tensors", **options(text, bits_per_weight=7.0))
    assert "model.layers.0.self_attn.qkv_proj" in made.choices
    assert "model.layers.2.mlp.gate_up_proj" in made.choices
    free = bitwright.allocate(source, method="rtn", layout="native", **options(text, bits_per_weight=7.0))
    assert "model.layers.0.self_attn.k_proj" in free.choices


def test_only_what_the_engine_loads_is_on_offer(model):
    source, text = model
    given = options(text, bits_per_weight=5.5, candidates=["2g32", "3g32", "4g32", "8g32"])
    made = bitwright.allocate(source, method="rtn", layout="gptq", target="vllm", **given)
    assert {option.label for offered in made.choices.values() for option in offered} == {"4g32", "8g32"}


def test_head_and_embeddings_take_part_where_they_are_asked_to(tmp_path):
    source = make_model("qwen2", tmp_path / "model")
    text = add_text(tmp_path)
    given = options(text, bits_per_weight=5.0, candidates=["3g32", "8g32", "keep"])
    made = bitwright.allocate(source, method="rtn", layout="native", head=True, embeddings=True, **given)
    assert {"lm_head", "model.embed_tokens"} <= set(made.choices)
    assert all(made.sensitivities[name].reference_loss > 0 for name in ("lm_head", "model.embed_tokens"))
    bitwright.quantize(source, tmp_path / "out", recipe=made.recipe)


def test_the_user_s_own_exceptions_stay(model):
    source, text = model
    own = [{"pattern": "*.layers.0.*", "keep": True}, {"role": "down_proj", "layers": "1", "bits": 8}]
    made = bitwright.allocate(
        source, method="rtn", layout="native", bits=4, overrides=own, **options(text, bits_per_weight=3.5)
    )
    assert not any(".layers.0." in name for name in made.choices)
    assert "model.layers.1.mlp.down_proj" not in made.choices
    assert [override.keep for override in made.recipe.overrides[:2]] == [True, False]


def test_nf4_and_int8_mix(model, tmp_path):
    source, text = model
    given = options(text, bits_per_weight=6.0, candidates=["nf4", "int8"])
    del given["group_size"]
    plan = bitwright.quantize(source, tmp_path / "out", method="rtn", layout="native", **given).plan
    kinds = {entry.scheme.kind for entry in plan.quantized}
    assert kinds == {"codebook", "absmax-int8"}


def test_sensitivities_are_measured_once_for_all_budgets(model, monkeypatch):
    source, text = model
    given = options(text, bits_per_weight=3.7)
    first = bitwright.allocate(source, method="rtn", layout="native", **given)
    from bitwright.advise import allocating

    monkeypatch.setattr(allocating, "measure_sensitivities", None)
    again = bitwright.allocate(source, method="rtn", layout="native", **options(text, bits_per_weight=4.7))
    assert again.sensitivities == first.sensitivities
    assert again.point.loss < first.point.loss
    assert [point.loss for point in again.curve()] == [point.loss for point in first.curve()]


def test_gguf_types_fit_the_file_that_was_asked_for(model, tmp_path):
    source, text = model
    given = options(text, bytes=100_000)
    del given["group_size"]
    out = tmp_path / "model.gguf"
    bitwright.to_gguf(source, out, gguf={"imatrix": "auto"}, **given)
    assert 0.85 * 100_000 < out.stat().st_size <= 100_000
    with GgufFile.open(out) as file:
        types = {tensor.block.name for name, tensor in file.tensors.items() if quantizable(name, tensor.shape)}
    assert len(types) >= 2


def test_the_command_writes_a_recipe_that_quantize_carries_out(model, tmp_path, capsys):
    source, text = model
    recipe = tmp_path / "mine.yaml"
    arguments = ["--bits-per-weight", "4.2", "--layout", "native", "--method", "rtn", "--calibration", text, "--curve"]
    arguments += ["--candidates", "3g32,4g32,6g32"]
    assert run("allocate", source, "-o", recipe, *arguments) == 0
    assert "predicted loss" in capsys.readouterr().out
    assert load_recipe(recipe).budget is None
    assert {override["scheme"] for override in yaml.safe_load(recipe.read_text())["overrides"]} == {"affine"}
    assert run("quantize", source, "-o", tmp_path / "out", "--recipe", recipe, "--json") == 0
    assert json.loads(capsys.readouterr().out)["quantized_bits_per_weight"] <= 4.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "1MB", "--bits-per-weight", "4"], "two budgets"),
        (["--context", "100"], "give --fit"),
        (["--candidates", "4g32"], "belong to a budget"),
        (["--bits-per-weight", "4", "--candidates", "q99"], "candidate 'q99' is unknown"),
        (["--bits-per-weight", "0.5", "--layout", "native", "--method", "rtn"], "too small"),
        (["--fit", "2MB", "--context", "100000000"], "KV cache"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(model, tmp_path, capsys, arguments, message):
    source, text = model
    assert run("quantize", source, "-o", tmp_path / "out", "--calibration", text, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_kv_cache_is_left_room_for(model, tmp_path):
    source, text = model
    arguments = ["--layout", "native", "--method", "rtn", "--calibration", text, "--group-size", "32"]
    sizes = []
    for extra in ([], ["--context", "64", "--kv", "fp16"]):
        out = tmp_path / f"out{len(sizes)}"
        assert run("quantize", source, "-o", out, "--fit", "130KB", *arguments, *extra) == 0
        sizes.append((out / "model.safetensors").stat().st_size)
    # 64 tokens x 3 layers x (key + value) x 2 heads x 16 numbers x 2 bytes
    cache = 64 * 3 * 2 * 2 * 16 * 2
    assert sizes[0] <= 130_000
    assert sizes[1] <= 130_000 - cache


def test_a_plan_says_that_a_budget_is_measured(model):
    source, _ = model
    from bitwright.engine.plan import make_plan
    from bitwright.engine.recipe import make_recipe
    from bitwright.engine.run import open_source

    with open_source(source) as opened, pytest.raises(PlanError, match="measured"):
        make_plan(make_recipe({"budget": {"bits_per_weight": 4}}), opened)


@pytest.mark.slow
def test_the_embedded_model_loses_far_less_than_with_uniform_bits(tmp_path):
    lines = STORY_TEXT.read_text(encoding="utf-8")
    held = tmp_path / "held.txt"
    held.write_text(lines[-60_000:], encoding="utf-8")
    calibration = {"text": str(STORY_TEXT), "samples": 16, "length": 256, "shuffle": False}
    common = {"method": "rtn", "layout": "native", "calibration": calibration}
    uniform = bitwright.quantize(STORY, tmp_path / "uniform", **common, bits=3, group_size=32)
    size = uniform.plan.quantized_bits_per_weight
    made = bitwright.quantize(
        STORY, tmp_path / "budget", **common, budget={"bits_per_weight": size, "samples": 4, "length": 256}
    )
    assert made.plan.weight_file_bytes <= uniform.plan.weight_file_bytes + 20_000  # the header names more schemes
    kl = [
        bitwright.evaluate(tmp_path / name, against=STORY, text=held, windows=8).quality.kl.mean
        for name in ("uniform", "budget")
    ]
    assert kl[1] < 0.75 * kl[0]
