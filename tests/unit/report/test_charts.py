"""Charts are whole SVG files, the same for the same data, whatever names they carry."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch

from bitwright.errors import InputError
from bitwright.evaluation.outliers import InputProbe, LayerInput, OutlierReport, summarize
from bitwright.report import charts

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"


def seen(block: int, label: str, *, columns: int = 32, spike: float = 1.0, scale: float = 1.0) -> LayerInput:
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(block)) * scale
    x[:, columns // 2] *= spike
    probe = InputProbe(columns, 6.0)
    probe.update(x)
    return summarize(probe, block=block, label=label, layers=(label,), top=3)


def report(*inputs: LayerInput, model: str = "tiny") -> OutlierReport:
    return OutlierReport(model, "text.txt", 64, 6.0, inputs)


def texts(svg: str) -> str:
    root = ElementTree.fromstring(svg)
    return " ".join("".join(part.itertext()) for part in root.iter(f"{SVG}text"))


def test_chart_shows_every_input_and_the_worst_channel():
    found = report(*(seen(b, label, spike=40 if b == 1 else 1) for b in range(3) for label in ("attn.qkv", "mlp.down")))
    svg = charts.outlier_chart(found)
    shown = texts(svg)
    assert "attn.qkv" in shown
    assert "mlp.down" in shown
    assert "block 1, attn.qkv" in shown
    assert "channel 16:" in shown
    for record in found.inputs:
        assert f"{record.largest:.3g}" in shown
    assert charts.outlier_chart(found) == svg


def test_large_models_stay_light():
    many = report(
        *(
            seen(b, f"layer {i}", columns=8192 if (b, i) == (0, 0) else 8, spike=500)
            for b in range(80)
            for i in range(7)
        )
    )
    assert len(charts.outlier_chart(many)) < 300_000


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$\\frac$ & $x", "a\x1b[31mb\u202e", "x" * 300, "模型"])
def test_names_from_strangers_are_harmless(name):
    svg = charts.outlier_chart(report(seen(0, name), model=name))
    assert "<script>" not in svg
    assert "\x1b" not in svg
    shown = texts(svg)
    assert name[-20:] in shown or "\\x1b" in shown


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_any_magnitude_can_be_drawn(scale):
    ElementTree.fromstring(charts.outlier_chart(report(seen(0, "a", scale=scale))))
    ElementTree.fromstring(charts.outlier_chart(report(seen(0, "a", scale=scale), seen(1, "b"))))


def test_without_matplotlib_the_mend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="matplotlib") as caught:
        charts.outlier_chart(report(seen(0, "a")))
    assert "bitwright[report]" in caught.value.mend
