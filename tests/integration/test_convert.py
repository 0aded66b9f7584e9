"""Conversions of whole checkpoints: both sides are decoded from the bytes by the formats' formulas, written out in tests/decoders.py."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import decoders
from tests.small import contents, left_over, make_model

import bitwright
from bitwright.errors import InputError, NumericError, PlanError, VerifyError
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.safetensors_writer import SafetensorsWriter

V2 = {"checkpoint_format": "gptq_v2"}
#: layout and options -> how its stored tensors are decoded
TARGETS = {
    "gptq": ({"layout": "gptq"}, decoders.gptq),
    "gptq_v2": ({"layout": "gptq", "layout_options": V2}, partial(decoders.gptq, shift=0)),
    "awq": ({"layout": "awq"}, decoders.awq),
    "compressed-tensors": ({"layout": "compressed-tensors"}, decoders.pack_quantized),
    "native": ({"layout": "native"}, decoders.native),
}
#: source -> target whose form it has, options of quantize
SOURCES = {
    "gptq": ("gptq", {"group_size": 32}),
    "gptq-channel": ("gptq", {"group_size": "channel"}),
    "gptq_v2-asymmetric": ("gptq_v2", {"group_size": 32, "symmetric": False}),
    "awq": ("awq", {"group_size": 64}),
    "awq-asymmetric": ("awq", {"group_size": 16, "symmetric": False}),
    "ct": ("compressed-tensors", {"group_size": 32}),
    "ct-asymmetric": ("compressed-tensors", {"group_size": "channel", "symmetric": False}),
    "native": ("native", {"group_size": 32, "symmetric": False}),
}
MODULES = 3 * 7


def quantize(model, output, **options):
    bitwright.quantize(model, output, method="rtn", **{"bits": 4, **options})
    return output


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def decoded(folder, decode):
    """Every quantized weight by the format's formula; the names are those of the projections."""
    tensors = tensors_of(folder)
    names = {name.rpartition("_proj.")[0] + "_proj" for name in tensors if "_proj." in name}
    return {name: decode(tensors, name) for name in sorted(names)}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A Llama in float16, the dtype of every layout's scales, so that nothing has to be rounded."""
    return make_model("llama", tmp_path_factory.mktemp("half") / "llama", dtype=torch.float16)


@pytest.fixture(scope="module")
def sources(half, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sources"), {}

    def make(name):
        if name not in made:
            target, options = SOURCES[name]
            made[name] = quantize(half, folder / name, **TARGETS[target][0], **options)
        return made[name]

    return make


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_pair_holds_the_same_numbers(source, target, sources, tmp_path):
    folder, output = sources(source), tmp_path / "out"
    options, decode = TARGETS[target]
    result = bitwright.convert(folder, output, **options)
    before, after = decoded(folder, TARGETS[SOURCES[source][0]][1]), decoded(output, decode)
    assert len(before) == MODULES
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert result.plan.rounding == 0
    kept, copied = tensors_of(folder), tensors_of(output)
    plain = [name for name in kept if "_proj." not in name]
    assert set(copied) - set(plain) == {name for name in copied if "_proj." in name}
    assert all(torch.equal(kept[name], copied[name]) for name in plain)
    assert left_over(output) == ["out"]
    config = config_of(output)
    assert {**config, "quantization_config": 0} == {**config_of(folder), "quantization_config": 0}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (output / name).read_bytes()


def test_there_and_back_gives_the_same_tensors(sources, tmp_path):
    first = sources("gptq")
    bitwright.convert(first, tmp_path / "awq", layout="awq")
    bitwright.convert(tmp_path / "awq", tmp_path / "back", layout="gptq")
    before, after = tensors_of(first), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    config = config_of(first)["quantization_config"]
    assert {**config_of(tmp_path / "back")["quantization_config"], "meta": 0} == {**config, "meta": 0}


def test_dense_output_is_a_plain_checkpoint_in_the_models_dtype(sources, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = sources("awq-asymmetric")
    bitwright.convert(folder, tmp_path / "out", layout="dense")
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    expected = {name: weight.half() for name, weight in decoded(folder, decoders.awq).items()}
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert [name for name, weight in expected.items() if not torch.equal(state[f"{name}.weight"], weight)] == []
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_dtype_of_dense_output_can_be_chosen(sources, tmp_path):
    folder = sources("gptq")
    bitwright.convert(folder, tmp_path / "out", layout="dense", dtype=torch.float32)
    tensors = tensors_of(tmp_path / "out")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    before = decoded(folder, decoders.gptq)
    assert all(torch.equal(tensors[f"{name}.weight"], weight) for name, weight in before.items())
    assert config_of(tmp_path / "out")["dtype"] == "float32"


def test_a_quantized_head_beside_tied_embeddings_is_untied(half, tmp_path):
    model = shutil.copytree(half, tmp_path / "model")
    tensors = tensors_of(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = config_of(model)
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    folder = quantize(model, tmp_path / "quantized", layout="native", group_size=32, head=True)
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "tie_word_embeddings": True}))
    bitwright.convert(folder, tmp_path / "out", layout="dense")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    head = decoders.native(tensors_of(folder), "lm_head").half()
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], head)


@pytest.fixture(scope="module")
def llama_gptq(llama, tmp_path_factory):
    """bfloat16 model, float16 scales."""
    return quantize(llama, tmp_path_factory.mktemp("bf16") / "gptq", layout="gptq", group_size=32)


def test_scales_that_the_models_dtype_does_not_hold_are_refused(llama_gptq, tmp_path):
    with pytest.raises(PlanError, match=rf"not exact in bfloat16.*{MODULES} of {MODULES} quantized modules") as found:
        bitwright.convert(llama_gptq, tmp_path / "out", layout="compressed-tensors")
    assert "--lossy" in found.value.mend
    assert left_over(tmp_path / "out") == []


def test_lossy_rounds_scales_and_tells_by_how_much(llama_gptq, tmp_path):
    result = bitwright.convert(llama_gptq, tmp_path / "out", layout="compressed-tensors", lossy=True)
    before, after = tensors_of(llama_gptq), tensors_of(tmp_path / "out")
    worst = 0.0
    for name in decoded(llama_gptq, decoders.gptq):
        scale = before[f"{name}.scales"].T
        assert torch.equal(after[f"{name}.weight_scale"], scale.bfloat16())
        worst = max(worst, float(((scale.bfloat16().double() - scale.double()) / scale.double()).abs().max()))
    assert result.plan.rounding == worst
    assert 0 < worst <= 2**-8
    told = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    assert told["conversion"]["largest_rounding"] == worst
    assert f"{worst:.1e}" in (tmp_path / "out" / "README.md").read_text()


def test_another_model_dtype_keeps_them_exact(llama_gptq, tmp_path):
    bitwright.convert(llama_gptq, tmp_path / "out", layout="compressed-tensors", dtype=torch.float16)
    before, after = decoded(llama_gptq, decoders.gptq), decoded(tmp_path / "out", decoders.pack_quantized)
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept, copied = tensors_of(llama_gptq), tensors_of(tmp_path / "out")
    assert torch.equal(copied["model.embed_tokens.weight"], kept["model.embed_tokens.weight"].half())
    assert config_of(tmp_path / "out")["dtype"] == "float16"


def test_what_no_layout_holds_is_refused_before_any_data_is_read(half, tmp_path, monkeypatch):
    folder = quantize(half, tmp_path / "three", layout="gptq", bits=3, group_size=32)

    def never(self, name, rows=None):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsDir, "read", never)
    with pytest.raises(PlanError, match=f"4 bits, not 3; {MODULES} of {MODULES} quantized modules"):
        bitwright.convert(folder, tmp_path / "out", layout="awq")


def test_the_pass_over_parameters_reads_no_codes(sources, tmp_path, monkeypatch):
    from bitwright.engine.convert import plan_folder

    seen, read = [], SafetensorsDir.read

    def watched(self, name, rows=None):
        seen.append(name)
        return read(self, name, rows)

    monkeypatch.setattr(SafetensorsDir, "read", watched)
    plan = plan_folder(sources("gptq_v2-asymmetric"), layout="compressed-tensors")
    assert len(plan.modules) == MODULES
    assert {name.rpartition(".")[2] for name in seen} == {"qzeros", "scales", "g_idx"}
    assert (
        plan.weight_file_bytes
        == bitwright.convert(sources("gptq_v2-asymmetric"), tmp_path / "out", layout="compressed-tensors")
        .output.joinpath("model.safetensors")
        .stat()
        .st_size
    )


def test_asymmetric_files_whose_zero_points_are_all_in_the_middle_become_symmetric(sources, tmp_path):
    folder = shutil.copytree(sources("awq"), tmp_path / "foreign")
    config = config_of(folder)
    del config["quantization_config"]["meta"]  # what AutoAWQ writes says nothing of symmetry
    (folder / "config.json").write_text(json.dumps(config))
    result = bitwright.convert(folder, tmp_path / "out", layout="compressed-tensors")
    assert {module.source.symmetric for module in result.plan.modules} == {False}
    assert {module.target.symmetric for module in result.plan.modules} == {True}
    assert not any("zero_point" in name for name in tensors_of(tmp_path / "out"))


def test_conv1d_and_experts_go_over(tmp_path):
    for name in ("gpt2", "mixtral"):
        model = make_model(name, tmp_path / name, dtype=torch.float16)
        first = quantize(model, tmp_path / f"{name}-gptq", layout="gptq", group_size=32)
        bitwright.convert(first, tmp_path / f"{name}-awq", layout="awq")
        bitwright.convert(tmp_path / f"{name}-awq", tmp_path / f"{name}-dense", layout="dense")
        stored, original = tensors_of(tmp_path / f"{name}-dense"), tensors_of(model)
        assert {key: value.shape for key, value in stored.items()} == {k: v.shape for k, v in original.items()}
        packed = tensors_of(first)
        modules = [key.removesuffix(".qweight") for key in packed if key.endswith(".qweight")]
        assert len(modules) == (12 if name == "gpt2" else 3 * (4 + 12))
        for module in modules:
            weight = decoders.gptq(packed, module).half()
            assert torch.equal(stored[f"{module}.weight"], weight.T if name == "gpt2" else weight)
    kept = config_of(tmp_path / "mixtral-awq")["quantization_config"]["modules_to_not_convert"]
    assert any(entry.endswith("gate") for entry in kept)
    assert "lm_head" in kept


LLM_INT8 = {"bits": None, "scheme": "absmax-int8", "inputs": {"threshold": 6.0}, "layout": "bitsandbytes"}
W8A8 = {"bits": 8, "group_size": "channel", "inputs": {}, "layout": "compressed-tensors"}


def test_int8_goes_to_row_maxima_and_back(half, tmp_path):
    first = quantize(half, tmp_path / "w8a8", **W8A8)
    before = decoded(first, decoders.int_quantized)
    assert bitwright.convert(first, tmp_path / "bnb", layout="bitsandbytes").plan.notes == ()
    after = decoded(tmp_path / "bnb", decoders.bitsandbytes_int8)
    bitwright.convert(tmp_path / "bnb", tmp_path / "back", layout="compressed-tensors")
    back = decoded(tmp_path / "back", decoders.int_quantized)
    assert len(before) == MODULES
    for name, weight in before.items():
        assert torch.equal(weight, after[name])
        assert torch.equal(weight, back[name])
    assert config_of(tmp_path / "back")["quantization_config"] == config_of(first)["quantization_config"]


def test_llm_int8_in_other_layouts_tells_how_inputs_change(half, tmp_path):
    first = quantize(half, tmp_path / "bnb", **LLM_INT8)
    before = decoded(first, decoders.bitsandbytes_int8)
    with pytest.raises(PlanError, match="not exact in float16"):
        bitwright.convert(first, tmp_path / "out", layout="compressed-tensors")
    result = bitwright.convert(first, tmp_path / "ct", layout="compressed-tensors", dtype=torch.float32)
    assert all(torch.equal(before[n], w) for n, w in decoded(tmp_path / "ct", decoders.int_quantized).items())
    assert len(result.plan.notes) == 1
    assert f"inputs of {MODULES} modules were int8 token" in result.plan.notes[0]
    bitwright.convert(first, tmp_path / "dense", layout="dense", dtype=torch.float32)
    assert all(torch.equal(tensors_of(tmp_path / "dense")[f"{n}.weight"], w) for n, w in before.items())
    assert not any("SCB" in name or "weight_format" in name for name in tensors_of(tmp_path / "dense"))


def test_plain_checkpoints_are_refused_with_the_right_command(half, tmp_path, bitwright_cli):
    with pytest.raises(InputError, match="is not quantized") as found:
        bitwright.convert(half, tmp_path / "out", layout="awq")
    assert "bitwright quantize" in found.value.mend
    assert bitwright_cli("convert", half, "-o", tmp_path / "out", "--layout", "awq")[0] == 2


def test_embeddings_stay_in_native(half, tmp_path):
    folder = quantize(half, tmp_path / "whole", layout="native", group_size=32, embeddings=True)
    with pytest.raises(PlanError, match=f"embed_tokens: layout gptq cannot store embeddings; 1 of {MODULES + 1}"):
        bitwright.convert(folder, tmp_path / "out", layout="gptq")
    bitwright.convert(folder, tmp_path / "dense", layout="dense")
    embedding = decoders.native(tensors_of(folder), "model.embed_tokens").half()
    assert torch.equal(tensors_of(tmp_path / "dense")["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("damage", ["bytes", "error", "interrupt"])
def test_a_run_that_fails_leaves_nothing(damage, sources, tmp_path, monkeypatch):
    write = SafetensorsWriter.write
    expected = {"bytes": VerifyError, "error": NumericError, "interrupt": KeyboardInterrupt}[damage]

    def broken(self, name, tensor, row=0):
        if name.endswith("1.mlp.down_proj.qweight"):
            if damage == "interrupt":
                raise KeyboardInterrupt
            if damage == "error":
                raise NumericError("no")
            tensor = tensor.clone()
            tensor[0, 0] += 1
        write(self, name, tensor, row)

    monkeypatch.setattr(SafetensorsWriter, "write", broken)
    with pytest.raises(expected):
        bitwright.convert(sources("gptq"), tmp_path / "out", layout="awq")
    assert left_over(tmp_path / "out") == []


def test_an_output_that_exists_is_replaced_only_when_asked(sources, tmp_path):
    output = shutil.copytree(sources("ct"), tmp_path / "out")
    before = contents(output)
    with pytest.raises(InputError, match="exists already"):
        bitwright.convert(sources("gptq"), output, layout="awq")
    assert contents(output) == before
    bitwright.convert(sources("gptq"), output, layout="awq", overwrite=True)
    assert config_of(output)["quantization_config"]["quant_method"] == "awq"


def test_the_command_line_shows_the_plan_and_writes_nothing(sources, tmp_path, bitwright_cli):
    folder = sources("gptq")
    code, out, _ = bitwright_cli("convert", folder, "--layout", "awq", "--dry-run")
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in out
    assert "the same, bit for bit" in out
    code, out, _ = bitwright_cli("convert", folder, "--layout", "awq", "--dry-run", "--json")
    assert json.loads(out)["layout"] == "awq"
    assert list(tmp_path.iterdir()) == []
    assert bitwright_cli("convert", folder, "--layout", "awq")[0] == 2
    code, _, err = bitwright_cli("convert", folder, "--layout", "nonsense", "-o", tmp_path / "out")
    assert code == 2
    assert "layout 'nonsense' is unknown" in err
    code, _, err = bitwright_cli("convert", folder, "--layout", "native", "--for", "vllm", "-o", tmp_path / "out")
    assert code == 2
    assert "would not load in vllm" in err


def test_the_command_line_takes_layout_options(sources, tmp_path, bitwright_cli):
    option = ("--layout-option", "checkpoint_format=gptq_v2")
    code, out, _ = bitwright_cli("convert", sources("awq"), "-o", tmp_path / "out", "--layout", "gptq", *option)
    assert code == 0
    assert "loads in gptqmodel" in out
    assert config_of(tmp_path / "out")["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert bitwright_cli("convert", sources("awq"), "-o", tmp_path / "x", "--layout", "awq", *option)[0] == 2


def test_provenance_keeps_the_recipe_that_chose_the_codes(sources, tmp_path):
    bitwright.convert(sources("gptq"), tmp_path / "awq", layout="awq")
    bitwright.convert(tmp_path / "awq", tmp_path / "dense", layout="dense")
    told = json.loads((tmp_path / "dense" / "bitwright.json").read_text())
    assert told["recipe"]["method"] == "rtn"
    assert (told["conversion"]["from"], told["conversion"]["to"]) == ("awq", "dense")
    assert told["origin"]["conversion"]["from"] == "gptq"
    assert "method | rtn" in (tmp_path / "awq" / "README.md").read_text()
