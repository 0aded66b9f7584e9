"""Scales of a float8 KV cache, against the cache that transformers itself fills."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.small import add_text, make_model

import bitwright
from bitwright.engine.calibration import load_tokenizer
from bitwright.errors import PlanError


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    add_text(folder)
    return make_model("llama", folder / "llama", dtype=torch.float32)


def test_scales_are_the_largest_keys_and_values_over_448(llama, tmp_path):
    from transformers import DynamicCache

    text = llama.parent / "text.txt"
    out = tmp_path / "out"
    bitwright.quantize(
        llama, out, method="rtn", bits=8, group_size="channel", kv_cache="fp8",
        calibration={"text": str(text), "samples": 2, "length": 32, "shuffle": False}, overwrite=True,
    )  # fmt: skip
    stored = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    assert config["kv_cache_scheme"]["type"] == "float"
    ids = load_tokenizer(llama)(text.read_text(), add_special_tokens=False)["input_ids"][:64]
    cache = DynamicCache()
    with torch.no_grad():
        bitwright.load(out)(input_ids=torch.tensor(ids).view(2, 32), past_key_values=cache, use_cache=True)
    for block, layer in enumerate(cache.layers):
        for part, filled in (("k", layer.keys), ("v", layer.values)):
            scale = stored[f"model.layers.{block}.self_attn.{part}_scale"]
            assert scale.shape == (1,)
            torch.testing.assert_close(scale * 448, filled.abs().max().view(1), rtol=2e-5, atol=0)


@pytest.mark.parametrize(("layout", "kind"), [("gptq", "fp8"), ("compressed-tensors", "int8")])
def test_a_layout_that_cannot_store_them_says_so(llama, tmp_path, layout, kind):
    with pytest.raises(PlanError, match="cannot store it"):
        bitwright.quantize(llama, tmp_path / "out", method="rtn", group_size=32, layout=layout, kv_cache=kind)
