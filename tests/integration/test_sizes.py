"""What `plan` promises, to the byte, and what stands on stdout."""

import json

import pytest
from tests.small import STORY, STORY_TEXT, left_over

LAYOUTS = {
    "gptq": ["--layout", "gptq"],
    "gptq_v2": ["--layout", "gptq", "--layout-option", "checkpoint_format=gptq_v2"],
    "compressed-tensors": ["--layout", "compressed-tensors"],
    "native": ["--layout", "native"],
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("symmetric", ["--symmetric", "--asymmetric"])
def test_planned_bytes_are_the_files_sizes(layout, sharded, symmetric, bitwright, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: rtn\nmax_shard_bytes: {3_000_000 if sharded else 10**9}\n")
    options = ["--recipe", recipe, *LAYOUTS[layout], symmetric]
    code, out, _ = bitwright("plan", STORY, *options, "--json")
    assert code == 0
    plan = json.loads(out)
    assert bitwright("quantize", STORY, "-o", tmp_path / "out", *options)[0] == 0
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert plan["files"] == files
    assert plan["weight_file_bytes"] == sum(files.values())
    assert (len(files) > 1) == sharded
    # A header's length and text, then the data: the file format's own arithmetic.
    data = sum(tensor["stored_bytes"] for tensor in plan["tensors"])
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in (tmp_path / "out").glob("*.safetensors"))
    assert data + headers == sum(files.values())


def test_json_is_all_there_is_on_stdout(llama, text, bitwright, tmp_path):
    options = ["--layout", "native", "--group-size", "32", "--calibration", text, "--samples", "4", "--length", "32"]
    code, out, err = bitwright("quantize", llama, "-o", tmp_path / "out", *options, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["output"] == str(tmp_path / "out")
    assert found["weight_file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "[4/4] block 2" in err
    for command in (["plan", llama, *options[:4]], ["inspect", tmp_path / "out"], ["inspect", llama]):
        code, out, _ = bitwright(*command, "--json")
        assert code == 0
        assert isinstance(json.loads(out), dict)
    evaluation = ["eval", tmp_path / "out", "--against", llama, "--text", text, "--length", "64", "--windows", "2"]
    code, out, _ = bitwright(*evaluation, "--json")
    assert code == 0
    assert json.loads(out)["candidates"][0]["quality"]["kl"]["mean"] >= 0


def test_tables_go_to_stdout_and_progress_to_stderr(llama, bitwright, tmp_path):
    code, out, err = bitwright("quantize", llama, "-o", tmp_path / "out", "--method", "rtn", "--group-size", "32")
    assert code == 0
    assert "[1/4] outside the blocks" in err
    assert "[1/4]" not in out
    assert "bits per parameter" in out
    code, out, err = bitwright("inspect", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "int4 sym g32" in out


def test_failed_json_command_prints_no_json(bitwright, tmp_path):
    code, out, err = bitwright("plan", tmp_path / "absent", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "mend: " in err


def test_planning_writes_nothing(llama, bitwright, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bitwright("plan", llama, "--group-size", "32")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_bits_per_weight_of_a_symmetric_group_scheme(bitwright):
    """4 bits a code and 16 bits of scale for 128 of them: 4.125, plus each layer's eight bytes of shape in this layout."""
    code, out, _ = bitwright("plan", STORY, "--layout", "gptq", "--method", "rtn", "--json")
    assert code == 0
    plan = json.loads(out)
    quantized = [t for t in plan["tensors"] if t["action"] == "quantize"]
    weights = sum(t["shape"][0] * t["shape"][1] for t in quantized)
    assert len(quantized) == 8 * 7
    # gptq: qweight and qzeros at 4 bits, scales at 16 bits, g_idx of 4 bytes a column.
    columns = sum(t["shape"][1] for t in quantized)
    expected = weights / 2 + weights / 128 / 2 + weights / 128 * 2 + 4 * columns
    assert sum(t["stored_bytes"] for t in quantized) == expected
    assert plan["quantized_bits_per_weight"] == pytest.approx(8 * expected / weights)


def test_story_model_survives_the_default_recipe(bitwright, tmp_path):
    """The defaults, with a calibration text and few tokens, on a trained model: its perplexity hardly moves.

    transformers computes a perplexity of 77.5 on 32 windows of 128 tokens of this text.
    """
    options = ["--calibration", STORY_TEXT, "--samples", "8", "--length", "128", "--max-memory", "100MB"]
    code, out, _ = bitwright("quantize", STORY, "-o", tmp_path / "out", *options, "--json")
    assert code == 0
    quality = json.loads(out)["quality"]
    assert 50 < quality["perplexity_source"] < 120
    assert quality["perplexity_quantized"] < 1.1 * quality["perplexity_source"]
    assert quality["kl_mean"] < 0.1
    assert left_over(tmp_path / "out") == ["out"]
