"""Hostile and faulty input through the command line: the exit code, what the message names, and nothing left at the output."""

import json
import os
import resource
import shutil
import signal
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.small import add_tokenizer, contents, left_over, make_model

FAST = ["--layout", "native", "--group-size", "32", "--samples", "4", "--length", "32"]


@pytest.fixture
def model(llama, tmp_path):
    """A copy of the model that a test may spoil."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def refused(bitwright, tmp_path):
    """Run ``quantize`` and check that it fails with this code, these words, and nothing at or beside the output."""

    def call(expected, model, *options, words=()):
        before = contents(model) if model.is_dir() else {}
        code, out, err = bitwright("quantize", model, "-o", tmp_path / "out", *options)
        assert code == expected, err
        assert out == ""
        assert err.splitlines()[-1].startswith(("  mend: ", "error: "))
        for word in words:
            assert word in err
        assert left_over(tmp_path / "out") == []
        if before:
            assert contents(model) == before
        return err

    return call


def _edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _change_weights(model, change):
    file = model / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --- pickles, remote code, templates -----------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def test_pickled_weights_are_refused_and_never_run(model, refused, tmp_path):
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Bomb(tmp_path / "pwned")}, model / "pytorch_model.bin")
    refused(2, model, "--method", "rtn", words=["pytorch_model.bin", "--allow-pickle"])
    refused(2, model, "--method", "rtn", "--allow-pickle", words=["pytorch_model.bin"])
    assert not (tmp_path / "pwned").exists()


def test_allowed_pickle_gives_the_bytes_of_the_safetensors(model, llama, bitwright, tmp_path):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    # Without a calibration text: the converted weights are sampled from, too.
    outputs = [tmp_path / "pickled", tmp_path / "plain"]
    assert bitwright("quantize", model, "-o", outputs[0], *FAST, "--allow-pickle")[0] == 0
    assert bitwright("quantize", llama, "-o", outputs[1], *FAST)[0] == 0
    weights = [load_file(folder / "model.safetensors") for folder in outputs]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("nested", [False, True])
def test_auto_map_is_refused(nested, model, refused):
    wanted = {"AutoModelForCausalLM": "evil.Model"}
    (model / "evil.py").write_text("raise SystemExit('run')")
    _edit(model / "config.json", **({"text_config": {"auto_map": wanted}} if nested else {"auto_map": wanted}))
    for options in (["--method", "rtn"], FAST):
        refused(2, model, *options, words=["auto_map", "its own code, which is not run"])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for m in messages %}{{ m.content }", "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("{{ messages[7].content.upper() }}", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
        ("{{ range(10**9) | list }}", "cannot be rendered"),
    ],
)
def test_chat_template_that_breaks_out_or_breaks_is_refused(template, words, model, text, refused):
    add_tokenizer(model, template=template)
    refused(2, model, *FAST, "--calibration", text, "--chat-template", words=["chat template", words])


def test_chat_template_is_asked_for_but_absent(model, text, refused):
    refused(2, model, *FAST, "--calibration", text, "--chat-template", words=["has no chat template"])


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "x.bin"])
def test_index_that_points_outside_is_refused(name, model, refused, tmp_path):
    shutil.copy(model / "model.safetensors", tmp_path / "x.safetensors")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "good.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(2, model, "--method", "rtn", words=["model.safetensors.index.json", "plain name"])


def _spoil_header_json(data):
    return data[:8] + b"}" + data[9:]


def _spoil_header_length(data):
    return (2**60).to_bytes(8, "little") + data[8:]


def _spoil_offsets(data):
    return data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)


@pytest.mark.parametrize(
    "spoil",
    [_spoil_header_json, _spoil_header_length, _spoil_offsets, lambda d: d[:-1], lambda d: d[:4], lambda d: d + b"\0"],
    ids=["json", "length", "offsets", "cut", "empty", "longer"],
)
def test_malformed_weights_are_refused(spoil, model, refused):
    file = model / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    refused(2, model, "--method", "rtn", words=["model.safetensors"])


def test_missing_shard_and_missing_tensors_are_named(model, refused):
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model-00002-of-00002.safetensors").unlink()
    refused(2, model, *FAST, words=["model-00002-of-00002.safetensors", "missing"])
    # A whole file, but not with everything that the model needs: five are named.
    index.unlink()
    (model / "model-00001-of-00002.safetensors").rename(model / "model.safetensors")
    err = refused(2, model, *FAST, words=["the checkpoint lacks", "more"])
    assert err.count("model.") >= 5


def test_wrong_shape_is_refused(model, refused):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)

    _change_weights(model, change)
    refused(2, model, "--method", "rtn", words=["wrong shapes", "model.norm.weight", "(32,)", "(64,)"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1, "a": 2}', "duplicate key"),
        ("[" * 1000 + "]" * 1000, "nested"),
        ('{"model_type": NaN}', "NaN"),
        ("{", "not valid JSON"),
        ("[]", "not an object"),
    ],
)
def test_malformed_config_is_refused(content, words, model, refused):
    (model / "config.json").write_text(content)
    refused(2, model, "--method", "rtn", words=["config.json", words])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: &x [1]\nb: *x\n", "anchors and aliases"),
        ("bits: 4\nbits: 3\n", "duplicate key"),
        ("a: " + "[" * 100 + "]" * 100, "nested"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags"),
        ("- 1\n", "mapping"),
    ],
)
def test_malformed_recipe_is_refused(content, words, llama, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text(content)
    refused(2, llama, "--recipe", tmp_path / "recipe.yaml", words=["recipe.yaml", words])


# --- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--method", "rtn", "--group-size", "32"], FAST], ids=["data-free", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"])
def test_weight_that_is_not_finite_is_named_and_counted(name, value, options, model, refused):
    def change(tensors):
        tensors[name].view(-1)[3:6] = value

    _change_weights(model, change)
    refused(5, model, *options, words=[f"{name}: 3 values are NaN or infinite"])


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"]
)
def test_weight_that_is_not_finite_stops_a_calibrated_run(name, model, text, refused):
    def change(tensors):
        tensors[name].view(-1)[-1] = float("nan")

    _change_weights(model, change)
    refused(5, model, *FAST, "--calibration", text, words=[f"{name}: 1 values are NaN or infinite"])


def test_weight_of_many_pieces_counts_them_all(model, refused, monkeypatch):
    monkeypatch.setattr("bitwright.engine.tensors.CHUNK_ELEMENTS", 256)
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][::2, 0] = float("nan")

    _change_weights(model, change)
    refused(5, model, "--method", "rtn", "--group-size", "32", words=[f"{name}: 64 values are NaN or infinite"])


def test_always_zero_inputs_are_counted(model, text, bitwright, tmp_path):
    """Five rows of up_proj are zero, so five inputs of down_proj are zero for every token."""

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][10:15] = 0

    _change_weights(model, change)
    code, _, err = bitwright("quantize", model, "-o", tmp_path / "out", *FAST, "--calibration", text)
    assert code == 0
    assert "5 input columns of 1 layers were always zero" in err
    report = json.loads((tmp_path / "out" / "bitwright.json").read_text())["tensors"]
    dead = {line["tensor"]: line["dead_columns"] for line in report if line["dead_columns"]}
    assert dead == {"model.layers.1.mlp.down_proj.weight": 5}


@pytest.mark.parametrize("symmetric", ["--symmetric", "--asymmetric"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_zero_and_tiny_and_constant_groups_come_back(method, symmetric, model, text, bitwright, tmp_path):
    import bitwright as library

    def change(tensors):
        for block in range(3):
            weight = tensors[f"model.layers.{block}.self_attn.o_proj.weight"]
            weight[0:8] = 0
            weight[8:16] = 2.0**-120
            weight[16:24] = 0.75

    _change_weights(model, change)
    # Correcting the drift of the residual stream moves tiny weights too.
    plain = ["--method-option", "correct_drift=false"] if method == "gptq" else []
    options = [*FAST, "--calibration", text, "--method", method, *plain, symmetric]
    assert bitwright("quantize", model, "-o", tmp_path / "out", *options)[0] == 0
    loaded = library.load(tmp_path / "out")
    for block in loaded.model.layers:
        weight = block.self_attn.o_proj.weight.float()
        assert torch.isfinite(weight).all()
        assert torch.equal(weight[0:8], torch.zeros(8, 64))
        # Smaller than the smallest scale, 2^-100, allows: rounded to zero, off by no more than half a step.
        assert weight[8:16].abs().max() <= 2.0**-100
        # Half a step: 1.5 / 15 / 2 symmetric, 0.75 / 15 / 2 asymmetric; GPTQ may move away from the nearest.
        limit = 0.051 if method == "rtn" else 0.3
        assert (weight[16:24] - 0.75).abs().max() <= limit


def test_pruned_rows_stay_pruned_when_gptq_corrects_the_drift(model, text, bitwright, tmp_path):
    import bitwright as library

    def change(tensors):
        for block in range(3):
            tensors[f"model.layers.{block}.self_attn.o_proj.weight"][0:8] = 0

    _change_weights(model, change)
    assert (
        bitwright("quantize", model, "-o", tmp_path / "out", *FAST, "--calibration", text, "--method", "gptq")[0] == 0
    )
    for block in library.load(tmp_path / "out").model.layers:
        assert torch.equal(block.self_attn.o_proj.weight.float()[0:8], torch.zeros(8, 64))


def test_scale_that_overflows_float16_fails_where_the_layout_has_no_wider_one(model, refused, bitwright, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"

    def change(tensors):
        tensors[name][0, 0] = 2.0**20  # a 15th of 2^21 is twice float16's largest number

    _change_weights(model, change)
    options = ["--method", "rtn", "--group-size", "32", "--layout"]
    refused(5, model, *options, "gptq", words=[name, "overflows float16"])
    assert bitwright("quantize", model, "-o", tmp_path / "out", *options, "compressed-tensors")[0] == 0
    scale = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.o_proj.weight_scale"]
    assert scale.dtype == torch.bfloat16
    assert float(scale[0, 0]) == pytest.approx(2**21 / 15, rel=2**-8)


def test_overflow_in_bfloat16_is_repeated_in_float32(llama, text, bitwright, tmp_path, monkeypatch):
    """A block whose output overflows in bfloat16 alone runs again in float32, from its original weights."""
    from bitwright.model.blocks import BlockRunner

    genuine = BlockRunner.run
    runs, overflow_at = [], -1

    def run(block, hidden, call):
        out = genuine(block, hidden, call)
        runs.append((block.self_attn.layer_idx, hidden.dtype))
        return out * float("inf") if len(runs) - 1 == overflow_at else out

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("compute_dtype: bfloat16\n")
    options = ["--recipe", recipe, *FAST, "--calibration", text, "--samples", "8"]
    monkeypatch.setattr(BlockRunner, "run", staticmethod(run))
    assert bitwright("quantize", llama, "-o", tmp_path / "narrow", *options)[0] == 0
    assert {dtype for _, dtype in runs} == {torch.bfloat16}
    # The last run of block 1: all of its linears are quantized in place by then.
    overflow_at = [index for index, _ in runs].index(2) - 1
    runs.clear()
    code, _, err = bitwright("quantize", llama, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert err.count("overflows in torch.bfloat16; repeated in float32") == 1
    assert "block 1: the output overflows" in err
    assert runs[overflow_at : overflow_at + 2] == [(1, torch.bfloat16), (1, torch.float32)]
    monkeypatch.undo()
    recipe.write_text("compute_dtype: float32\n")
    assert bitwright("quantize", llama, "-o", tmp_path / "float", *options)[0] == 0
    found, expected = (
        {line["tensor"]: line["loss"] for line in json.loads((tmp_path / f / "bitwright.json").read_text())["tensors"]}
        for f in ("out", "float")
    )
    assert found.keys() == expected.keys()
    assert all(found[name] < 2 * expected[name] + 1e-4 for name in found)


def test_activations_that_are_not_finite_name_the_block(model, text, refused):
    """Finite weights, but 1e38 squared overflows float32 as well."""

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e38)
        tensors["model.layers.1.mlp.gate_proj.weight"].fill_(1e38)

    _change_weights(model, change)
    refused(5, model, *FAST, "--calibration", text, words=["block 1", "not finite"])


def test_gigantic_logits_do_not_break_the_report(model, text, bitwright, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"].fill_(1e6)

    _change_weights(model, change)
    code, _, err = bitwright("quantize", model, "-o", tmp_path / "out", *FAST, "--calibration", text)
    assert code == 0, err


# --- resources ---------------------------------------------------------------------------------------------------------


# What does not fit: the journal; the weights (104 kB); and of a calibrated run with much text the activations.
@pytest.mark.parametrize(
    ("calibrated", "limit"), [(True, 2_000), (True, 40_000), (True, 120_000), (False, 2_000), (False, 40_000)]
)
def test_full_disk_is_a_resource_error_and_leaves_nothing(calibrated, limit, llama, text, refused):
    options = [*FAST, "--calibration", text] if calibrated else ["--method", "rtn", "--group-size", "32"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused(4, llama, *options, "--samples", "16", "--length", "128", words=["File too large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_too_little_space_is_found_before_work(llama, refused, monkeypatch):
    monkeypatch.setattr("bitwright.io.publish.free_bytes", lambda folder: 1000)
    err = refused(4, llama, "--method", "rtn", "--group-size", "32", words=["bytes needed, 1000 bytes free"])
    assert "block" not in err


# --- tied tensors ------------------------------------------------------------------------------------------------------


def test_tied_tensor_is_stored_once_and_equal_after_loading(llama, bitwright, tmp_path):
    import bitwright as library

    assert bitwright("quantize", llama, "-o", tmp_path / "out", "--method", "rtn", "--group-size", "32")[0] == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("lm_head") for name in stored)
    loaded = library.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, load_file(llama / "model.safetensors")["model.embed_tokens.weight"])


def test_tied_tensor_stored_twice_is_dropped_where_equal(model, llama, bitwright, tmp_path):
    _change_weights(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    for folder, source in (("twice", model), ("once", llama)):
        assert bitwright("quantize", source, "-o", tmp_path / folder, "--method", "rtn", "--group-size", "32")[0] == 0
    twice, once = (load_file(tmp_path / folder / "model.safetensors") for folder in ("twice", "once"))
    assert twice.keys() == once.keys()
    assert all(torch.equal(twice[name], once[name]) for name in once)


def test_tied_tensors_that_differ_are_refused(model, refused):
    _change_weights(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(2, model, "--method", "rtn", "--group-size", "32", words=["lm_head.weight", "differs", "embed_tokens"])


# --- verification ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("position", [0.3, 0.6, 0.999])
def test_flipped_byte_is_found_before_publishing(position, calibrated, llama, text, refused, monkeypatch):
    from bitwright.engine import run

    genuine = run.verify

    def verify(folder, *rest):
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[int(len(data) * position)] ^= 1
        file.write_bytes(data)
        genuine(folder, *rest)

    monkeypatch.setattr(run, "verify", verify)
    options = [*FAST, "--calibration", text] if calibrated else ["--method", "rtn", "--group-size", "32"]
    refused(3, llama, *options, words=["differs"])


def test_output_that_is_not_quantized_fails_verification(llama, refused, monkeypatch):
    from bitwright.engine import run

    genuine = run.verify

    def verify(folder, *rest):
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        genuine(folder, *rest)

    monkeypatch.setattr(run, "verify", verify)
    refused(3, llama, "--method", "rtn", "--group-size", "32", words=["not marked as quantized"])


# --- clarity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no text"),
        (b" \n \n", "holds no text"),
        (b"Too short.", "only 10 tokens"),
        (b"\xff\xfe" * 100, "not UTF-8"),
    ],
)
def test_unusable_calibration_text_is_refused_before_the_model_is_loaded(
    content, words, llama, refused, tmp_path, monkeypatch
):
    def never(*_):
        raise AssertionError("the model was built")

    monkeypatch.setattr("bitwright.engine.run.plan_rewritten", never)
    (tmp_path / "calibration.txt").write_bytes(content)
    refused(2, llama, *FAST, "--calibration", tmp_path / "calibration.txt", words=["calibration.txt", words])


def test_calibration_file_that_does_not_exist_is_refused(llama, refused, tmp_path):
    refused(2, llama, *FAST, "--calibration", tmp_path / "absent.txt", words=["absent.txt", "No such file"])


def test_tokenizer_with_more_ids_than_the_vocabulary_is_refused(model, text, refused):
    add_tokenizer(model, extra_tokens=3)
    for options in (["--calibration", text], []):
        refused(2, model, *FAST, *options, words=["ids up to 258", "256 entries"])


@pytest.mark.parametrize("layout", ["native", "gptq", "compressed-tensors"])
def test_quantized_source_is_refused_with_its_method(layout, llama, refused, bitwright, tmp_path):
    made = tmp_path / "quantized"
    assert bitwright("quantize", llama, "-o", made, "--method", "rtn", "--group-size", "32", "--layout", layout)[0] == 0
    method = {"native": "bitwright"}.get(layout, layout)
    refused(2, made, "--method", "rtn", words=["already quantized", f"({method})"])


def test_group_size_that_does_not_divide_is_refused_with_the_mend(llama, refused):
    refused(2, llama, "--method", "rtn", "--group-size", "48", words=["layers.0", "48", "or use group_size 32"])
    refused(2, llama, "--method", "rtn", words=["64", "128"])


@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_mixed_bits_in_a_fused_layer_are_refused(layout, llama, refused, bitwright, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: rtn\ngroup_size: 32\nlayout: {layout}\noverrides:\n- {{pattern: '*.k_proj', bits: 8}}\n"
    )
    words = ["self_attn", "q_proj int4", "k_proj int8", "--layout native"]
    refused(2, llama, "--recipe", recipe, words=words)
    assert bitwright("quantize", llama, "-o", tmp_path / "mixed", "--recipe", recipe, "--layout", "native")[0] == 0


def test_output_that_exists_is_refused_before_work(llama, bitwright, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "rtn", "--group-size", "32"]
    assert bitwright("quantize", llama, "-o", out, *options)[0] == 0
    before = contents(out)
    code, _, err = bitwright("quantize", llama, "-o", out, *options, "--bits", "8")
    assert (code, contents(out)) == (2, before)
    assert "exists already" in err
    assert "--overwrite" in err
    assert bitwright("quantize", llama, "-o", out, *options, "--bits", "8", "--overwrite")[0] == 0
    assert contents(out) != before
    assert left_over(out) == ["out"]


def test_folder_that_is_no_model_is_not_overwritten(llama, bitwright, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    code, _, err = bitwright("quantize", llama, "-o", out, "--method", "rtn", "--group-size", "32", "--overwrite")
    assert code == 2
    assert "does not look like a model folder" in err
    assert contents(out).keys() == {"thesis.txt"}


def test_output_that_is_the_source_or_inside_it_is_refused(model, bitwright):
    before = contents(model)
    for output in (model, model / "quantized", model.parent):
        options = ["--method", "rtn", "--group-size", "32", "--overwrite"]
        code, _, err = bitwright("quantize", model, "-o", output, *options)
        assert code == 2
        assert "source" in err
        assert contents(model) == before


def test_output_in_a_missing_folder_is_refused(llama, bitwright, tmp_path):
    output = tmp_path / "missing" / "out"
    code, _, err = bitwright("quantize", llama, "-o", output, "--method", "rtn", "--group-size", "32")
    assert code == 2
    assert "parent folder does not exist" in err
    assert not output.parent.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_source_that_changes_during_the_run_is_refused(file, model, refused, monkeypatch, tmp_path):
    from bitwright.engine import run

    genuine, kept = run.verify, {}

    def verify(*rest):
        genuine(*rest)
        kept["before"] = (model / file).read_bytes()
        (model / file).write_bytes(kept["before"] + b" ")
        os.utime(model / file, ns=(1, 1))

    monkeypatch.setattr(run, "verify", verify)
    with pytest.raises(AssertionError):  # the source itself is not as it was
        refused(2, model, "--method", "rtn", "--group-size", "32", words=[file, "changed during the run"])
    assert left_over(tmp_path / "out") == []
    assert (model / file).read_bytes() == kept["before"] + b" "


def test_output_honours_the_umask(llama, bitwright, tmp_path):
    before = os.umask(0o027)
    try:
        assert bitwright("quantize", llama, "-o", tmp_path / "out", "--method", "rtn", "--group-size", "32")[0] == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


# --- names -------------------------------------------------------------------------------------------------------------

EVIL = "\x1b[31m<script>alert(1)</script>"


def test_escapes_in_names_are_shown_and_not_sent(bitwright, tmp_path):
    """A checkpoint without model code, so that any tensor name goes through."""
    model = tmp_path / "evil\x1b]0;x\x07<script>`[a](b)"
    model.mkdir()
    config = {"model_type": f"evil{EVIL}", "dtype": "float32", "vocab_size": 16}
    (model / "config.json").write_text(json.dumps(config))
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    tensors = {f"layers.0.{EVIL}.weight": weight, f"norm{EVIL}.weight": torch.ones(8)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = ["--method", "rtn", "--group-size", "32", "--layout", "native"]
    texts = [bitwright("plan", model, *options), bitwright("plan", model, *options, "--all")]
    texts += [bitwright("quantize", model, "-o", tmp_path / "out", *options), bitwright("inspect", tmp_path / "out")]
    texts += [bitwright("inspect", tmp_path / "out", "--all"), bitwright("inspect", model)]
    for code, out, err in texts:
        assert code == 0, err
        for character in out + err:
            assert character == "\n" or character.isprintable()
    assert "\\x1b[31m<script>" in texts[1][1]
    bad = bitwright("quantize", model, "-o", tmp_path / "bad", "--method", "gptq")
    assert bad[0] == 2
    assert "\x1b" not in bad[2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    assert "&lt;script&gt;" in card
    assert "`[a](b)" not in card
    assert all(character == "\n" or character.isprintable() for character in card)


def test_escapes_in_fallbacks_reach_the_card_escaped():
    from bitwright.report.card import model_card

    provenance = {
        "bitwright": "0", "source": {"name": EVIL, "files": {EVIL: "0"}}, "quality": {}, "notes": [f"note {EVIL}"],
        "recipe": {"method": "rtn", "bits": 4, "group_size": 32, "layout": "native", "calibration": {"text": EVIL}},
        "sizes": {"weight_file_bytes": 1, "bits_per_weight": 1.0, "quantized_bits_per_weight": 1.0},
        "fallbacks": [{"tensor": f"a|b{EVIL}", "fallback": f"why {EVIL}"}],
    }  # fmt: skip
    card = model_card(provenance, {"vllm": f"no {EVIL}", "transformers": None})
    assert "\x1b" not in card
    assert "<script" not in card
    assert "a\\|b" in card


def test_usage_errors_do_not_send_escapes_either(bitwright, tmp_path):
    for arguments in (["plan", tmp_path, "--for", EVIL], ["quantize", tmp_path / EVIL, "-o", tmp_path / "out"]):
        code, out, err = bitwright(*arguments)
        assert code == 2
        assert "\x1b" not in out + err


def test_model_kind_that_cannot_be_calibrated_is_refused(tmp_path, refused):
    import transformers

    config = transformers.T5Config(
        vocab_size=256, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0
    )
    model = tmp_path / "t5"
    transformers.T5ForConditionalGeneration(config).save_pretrained(model)
    add_tokenizer(model)
    refused(2, model, *FAST, words=["t5", "--method rtn"])


def test_big_and_small_models_of_other_seeds_differ(tmp_path, bitwright):
    """The oracle's own check: the comparison of folders that these tests rely on does see a difference."""
    for seed in (1, 2):
        model = make_model("llama", tmp_path / f"m{seed}", seed=seed)
        options = ["--method", "rtn", "--group-size", "32"]
        assert bitwright("quantize", model, "-o", tmp_path / f"o{seed}", *options)[0] == 0
    assert contents(tmp_path / "o1")["model.safetensors"] != contents(tmp_path / "o2")["model.safetensors"]
