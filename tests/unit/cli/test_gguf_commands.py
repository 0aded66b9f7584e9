"""The commands where GGUF files are concerned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MODEL = "examples/storylm-8m"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    import bitwright

    return bitwright.to_gguf(MODEL, tmp_path_factory.mktemp("gguf") / "plain.gguf", gguf={"type": "bf16"}).output


def test_plan_says_types_by_block_and_the_exact_size(bitwright_cli, tmp_path):
    code, out, _ = bitwright_cli("plan", MODEL, "--type", "Q4_K_M", "--json")
    assert code == 0
    planned = json.loads(out)
    types = {line["tensor"]: line["type"] for line in planned["tensors"]}
    assert types["blk.0.attn_v.weight"] == "Q6_K"
    assert types["blk.1.attn_v.weight"] == "Q4_K"
    code, _, _ = bitwright_cli("quantize", MODEL, "-o", str(tmp_path / "model.gguf"), "--type", "Q4_K_M")
    assert code == 0
    assert sum(planned["files"].values()) == (tmp_path / "model.gguf").stat().st_size
    code, out, _ = bitwright_cli("plan", MODEL, "--type", "Q4_K_M")
    assert code == 0
    assert "0-" in out or "0,3" in out


def test_inspect_shows_header_types_and_size(bitwright_cli, plain):
    code, out, _ = bitwright_cli("inspect", str(plain), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["values"]["llama.block_count"] == 8
    assert found["values"]["tokenizer.ggml.tokens"]["length"] == 8192
    assert {line["type"] for line in found["tensors"]} == {"BF16", "F32"}
    code, out, _ = bitwright_cli("inspect", str(plain))
    assert code == 0
    assert "8,392,960" in out


def test_convert_goes_there_and_back(bitwright_cli, plain, tmp_path):
    code, out, _ = bitwright_cli("convert", MODEL, "-o", str(tmp_path / "m.gguf"), "--layout", "gguf", "--type", "bf16")
    assert code == 0
    assert (tmp_path / "m.gguf").read_bytes() == plain.read_bytes()
    code, out, _ = bitwright_cli("convert", str(plain), "-o", str(tmp_path / "dense"), "--layout", "dense", "--json")
    assert code == 0
    assert json.loads(out)["dtype"] == "bfloat16"


def test_imatrix_writes_both_forms(bitwright_cli, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:20_000])
    first, second = tmp_path / "a.gguf", tmp_path / "b.dat"
    arguments = ["--text", str(text), "--samples", "4", "--length", "64"]
    assert bitwright_cli("imatrix", MODEL, "-o", str(first), *arguments)[0] == 0
    assert bitwright_cli("imatrix", str(first), "-o", str(second))[0] == 0
    assert second.stat().st_size > 1000
    code, _, err = bitwright_cli("imatrix", str(first), "-o", str(second))
    assert code == 2
    assert "exists already" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", MODEL, "-o", "OUT/x.gguf", "--type", "Q9_K"], "Q4_K_M"),
        (["quantize", MODEL, "-o", "OUT/x.gguf", "--type", "Q4_0", "--tensor-type", "nonsense"], "PATTERN=TYPE"),
        (["quantize", MODEL, "-o", "OUT/x", "--layout", "gguf"], "not called .gguf"),
        (["quantize", MODEL, "-o", "OUT/x.gguf", "--type", "IQ1_S"], "--imatrix"),
        (["quantize", MODEL, "-o", "OUT/x.gguf", "--type", "IQ3_S", "--method", "gptq"], "whole blocks"),
        (["quantize", MODEL, "-o", "OUT/x.gguf", "--type", "Q4_0", "--keep", "*"], "--tensor-type"),
        (["convert", MODEL, "-o", "OUT/x.gguf", "--layout", "gguf", "--type", "Q4_0"], "quantizes nothing"),
        (["run", "absent.gguf"], "one of -p"),
        (["imatrix", MODEL, "-o", "OUT/x.txt"], "neither"),
    ],
)
def test_wrong_wishes_are_refused_with_the_mend(bitwright_cli, tmp_path, arguments, message):
    code, _, err = bitwright_cli(*(a.replace("OUT", str(tmp_path)) for a in arguments))
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []
