"""``from_pretrained`` of transformers on bitwright's folders, against decoded weights in a dense model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.zoo import make

import bitwright
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

TOKENS = torch.arange(2, 40).view(1, -1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    found: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(name: str, layout: str) -> tuple[Path, Path]:
        if (name, layout) not in found:
            source = folder / name
            if not source.exists():
                make(name, source)
            out = folder / f"{name}-{layout}"
            bitwright.quantize(source, out, method="rtn", layout=layout, group_size=32, symmetric=layout != "awq")
            found[name, layout] = source, out
        return found[name, layout]

    return get


def dense(source: Path, quantized: Path, target: Path) -> Path:
    """The source with its linears replaced by what the quantized folder decodes to, bfloat16 as the source."""
    opened = open_checkpoint(quantized)
    assert isinstance(opened, DecodedSource)
    tensors = load_file(source / "model.safetensors")
    for module in opened.modules:
        tensors[module + ".weight"] = opened.read(module + ".weight").to(torch.bfloat16)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("layout", ["native", "gptq", "awq"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_from_pretrained_gives_the_decoded_model(made, tmp_path, caplog, capfd, name, layout):
    from transformers import AutoModelForCausalLM

    source, folder = made(name, layout)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager")
    wanted = AutoModelForCausalLM.from_pretrained(
        dense(source, folder, tmp_path / "dense"), dtype=torch.bfloat16, experts_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, wanted(TOKENS).logits, rtol=0, atol=0.03)
    assert any(type(module).__name__ == "QuantizedLinear" for module in model.modules())
    said = caplog.text + "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said
    assert "MISSING" not in said


def test_a_loaded_model_generates(made):
    from transformers import AutoModelForCausalLM

    _, folder = made("llama", "native")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, TOKENS.shape[1] + 4)


@pytest.mark.parametrize("first", ["bitwright", "transformers.quantizers.auto"])
def test_registration_works_in_either_order_of_imports(first):
    code = f"""
import sys
import {first}
assert {first!r} != "bitwright" or "transformers" not in sys.modules
import bitwright, transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZER_MAPPING["bitwright"].__name__ == "BitwrightQuantizer"
bitwright._autoload.install()
assert not any(type(finder).__module__ == "bitwright._autoload" for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
