"""The KV cache against the tensors that transformers' caches really hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.unit.advise.test_memory_shape import MORE
from tests.zoo import ZOO
from transformers import DynamicCache, StaticCache

from bitwright.advise.activations import uncut_windows
from bitwright.advise.decoder import ModelShape
from bitwright.advise.kv_cache import kv_cache_bytes, kv_cache_note, llamacpp_cells
from bitwright.advise.shape import model_shape
from bitwright.errors import InputError


def model(name: str) -> Any:
    class_name, arguments = {**ZOO, **MORE}[name]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**arguments)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def held(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def fill(made: Any, cache: Any, *, context: int, batch: int) -> Any:
    ids = torch.randint(2, 256, (batch, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "falcon"]
)
@pytest.mark.parametrize(("context", "batch"), [(20, 1), (31, 2), (32, 1), (70, 3)])
def test_a_dynamic_cache_holds_as_many_bytes(name: str, context: int, batch: int) -> None:
    made = model(name)
    cache = fill(made, DynamicCache(config=made.config), context=context, batch=batch)
    shape = model_shape(made.config.to_dict())
    assert kv_cache_bytes(shape, context=context, batch=batch, kv="fp32") == held(cache)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("context", [20, 32, 70])
def test_windowed_layers_hold_the_whole_prompt_until_the_first_step(name: str, context: int) -> None:
    made = model(name)
    cache = fill(made, DynamicCache(config=made.config), context=context, batch=2)
    shape = model_shape(made.config.to_dict())
    kept = sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))
    assert kv_cache_bytes(shape, context=context, batch=2, kv="fp32") + uncut_windows(shape, context, 2, 4) == kept


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("context", [20, 70])
def test_a_static_cache_holds_as_many_bytes(name: str, context: int) -> None:
    made = model(name)
    cache = fill(made, StaticCache(config=made.config, max_cache_len=context), context=context, batch=2)
    shape = model_shape(made.config.to_dict())
    assert kv_cache_bytes(shape, context=context, batch=2, kv="fp32", static=True) == held(cache)


def test_an_fp8_cache_holds_one_byte_a_number_and_two_scales_a_layer() -> None:
    from transformers.cache_utils import Fp8QuantizedLayer

    made = model("llama")
    cache = fill(made, transformers.Cache(layer_class_to_replicate=Fp8QuantizedLayer), context=24, batch=2)
    found = 0
    for layer in cache.layers:
        for tensor, scale in (layer._quantized_keys, layer._quantized_values):
            found += tensor.nbytes + scale.nbytes
    assert kv_cache_bytes(model_shape(made.config.to_dict()), context=24, batch=2, kv="fp8") == found


def test_grouped_heads_are_cached_once() -> None:
    sizes = {"name": "x", "hidden": 64, "layers": 2, "heads": 8, "head_dim": 8, "intermediate": 64, "vocab": 10}
    some, every = ModelShape(kv_heads=2, **sizes), ModelShape(kv_heads=8, **sizes)
    assert kv_cache_bytes(every, context=7) == 4 * kv_cache_bytes(some, context=7)
    assert kv_cache_bytes(some, context=7) == 2 * 7 * 2 * 2 * 8 * 2


def test_ggml_blocks_hold_32_numbers() -> None:
    shape = ModelShape(name="x", hidden=64, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=64, vocab=10)
    # 64 numbers of a row of keys are two blocks of 34 bytes; 300 tokens take 512 cells.
    assert kv_cache_bytes(shape, context=300, kv="q8_0", engine="llamacpp") == 3 * 512 * 2 * 2 * 34
    assert kv_cache_bytes(shape, context=300, kv="q4_0", engine="llamacpp") == 3 * 512 * 2 * 2 * 18


def test_llamacpp_rounds_windows_and_contexts_up() -> None:
    assert llamacpp_cells(None, 2048) == 2048
    assert llamacpp_cells(1024, 8192) == 1536
    assert llamacpp_cells(4096, 2048) == 2048


def test_a_window_in_vllm_is_never_more_than_the_context() -> None:
    shape = model_shape(model("mistral").config.to_dict())
    whole = kv_cache_bytes(shape, context=64, engine="vllm")
    assert whole == 64 * 3 * 2 * 2 * 16 * 2
    assert (
        kv_cache_bytes(shape, context=100_000, engine="vllm")
        < kv_cache_bytes(shape, context=100_000, engine="transformers") * 100
    )


def test_the_note_says_what_was_assumed() -> None:
    assert "window of 32" in kv_cache_note(model_shape(model("mistral").config.to_dict()), context=64, engine="vllm")
    assert "latent" in kv_cache_note(model_shape(model("deepseek_v3").config.to_dict()), context=64, engine="vllm")


@pytest.mark.parametrize(
    ("kv", "engine"), [("q8_0", "transformers"), ("fp8", "llamacpp"), ("int3", "vllm"), ("bf16", "tensorrt")]
)
def test_formats_that_an_engine_lacks_are_refused(kv: str, engine: str) -> None:
    with pytest.raises(InputError):
        kv_cache_bytes(model_shape(model("llama").config.to_dict()), context=8, kv=kv, engine=engine)


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    shape = ModelShape(name="x", hidden=60, layers=1, heads=5, kv_heads=1, head_dim=12, intermediate=64, vocab=10)
    with pytest.raises(InputError, match="blocks of 32"):
        kv_cache_bytes(shape, context=8, kv="q8_0", engine="llamacpp")
