"""``bitwright analyze`` from the outside."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

FEW = ("--samples", 4, "--length", 48)


def test_table_lists_every_input_and_says_what_to_do(llama, text, bitwright_cli):
    code, out, _ = bitwright_cli("analyze", llama, "--text", text, *FEW, "--top", 2)
    assert code == 0
    for block in range(3):
        assert f" {block} self_attn.q_proj, k_proj, v_proj" in out
        assert f" {block} mlp.down_proj" in out
    assert "of 12  " in out
    assert "text: text.txt, 192 tokens" in out


def test_json_is_pure_and_versioned(llama, text, bitwright_cli):
    code, out, _ = bitwright_cli("analyze", llama, "--text", text, *FEW, "--top", 2, "--threshold", 2.5, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["schema"] == "bitwright-analyze-1"
    assert found["threshold"] == 2.5
    assert len(found["inputs"]) == 12
    assert all(len(seen["channels"]) == 2 for seen in found["inputs"])
    assert sum(found["advice"].values()) == 12


def test_chart_is_drawn_beside_the_table(llama, text, tmp_path, bitwright_cli):
    pytest.importorskip("matplotlib")
    file = tmp_path / "chart.svg"
    code, out, _ = bitwright_cli("analyze", llama, "--text", text, *FEW, "--chart", file)
    assert code == 0
    assert "mlp.down_proj" in out
    assert ElementTree.parse(file).getroot().tag.endswith("svg")


@pytest.mark.parametrize("options", [
    ("--chart", "out.png"), ("--chart", "/nowhere/at/all/out.svg"), ("--threshold", -1), ("--top", -1), ("--text", "/nowhere/x.txt"),
    ("--max-memory", "much"), ("--samples", 0),
])  # fmt: skip
def test_wrong_options_are_refused_with_a_mend(llama, bitwright_cli, options):
    code, out, err = bitwright_cli("analyze", llama, *options)
    assert code == 2
    assert not out
    assert "error:" in err
