"""Shapes against transformers: the oracle is the number of parameters of the class itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.zoo import _LLAMA, ZOO

from bitwright.advise.published import PUBLISHED
from bitwright.advise.shape import model_shape, parse_parameters, shape_for
from bitwright.errors import InputError

DEEPSEEK: dict[str, Any] = {
    **_LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 24, "q_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "deepseek_v3 without query rank": ("DeepseekV3Config", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK),
    "gpt_oss": (
        "GptOssConfig",
        {**_LLAMA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "phi": ("PhiConfig", {**_LLAMA}),
    "starcoder2": ("Starcoder2Config", {**_LLAMA}),
    "olmo2": ("Olmo2Config", {**_LLAMA}),
    "cohere": ("CohereConfig", {**_LLAMA}),
    "stablelm": ("StableLmConfig", {**_LLAMA, "use_qkv_bias": True}),
}  # fmt: skip


def meta_model(name: str) -> Any:
    class_name, arguments = {**ZOO, **MORE}[name]
    config = getattr(transformers, class_name)(**arguments)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", [*ZOO, *MORE])
def test_a_shape_has_as_many_parameters_as_the_model(name: str) -> None:
    model = meta_model(name)
    assert model_shape(model.config.to_dict()).parameters == model.num_parameters()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "deepseek_v3"])
def test_matrices_are_those_of_the_model(name: str) -> None:
    model = meta_model(name)
    left_out = ("lm_head",) if model.config.tie_word_embeddings else ()
    wanted = sorted(
        tuple(value.shape[-2:])
        for key, value in model.state_dict().items()
        for _ in range(value.shape[0] if value.dim() == 3 else 1)
        if value.dim() >= 2 and not key.startswith(left_out or ("-",))
    )
    found = sorted((m.rows, m.columns) for m in model_shape(model.config.to_dict()).matrices for _ in range(m.count))
    if name == "deepseek_v3":
        # transformers holds gate and up of an expert as one matrix.
        halves = [(r // 2, c) for r, c in wanted if (r, c) == (64, 64) for _ in range(2)]
        assert sum(r * c for r, c in found) == sum(r * c for r, c in wanted)
        assert halves
    else:
        assert found == wanted


def test_windows_follow_the_configs_own_layer_types() -> None:
    config = meta_model("gemma3_text").config
    shape = model_shape(config.to_dict())
    assert shape.windows == tuple(32 if kind == "sliding_attention" else None for kind in config.layer_types)
    assert 32 in model_shape({**config.to_dict(), "layer_types": None, "num_hidden_layers": 7}).windows
    # Qwen names a window that it does not use.
    assert (
        model_shape({**meta_model("qwen2").config.to_dict(), "sliding_window": 64, "layer_types": None}).windows == ()
    )


def test_a_nested_text_config_is_read() -> None:
    flat = meta_model("gemma3_text").config.to_dict()
    nested = {"model_type": "gemma3", "text_config": flat, "tie_word_embeddings": True}
    assert model_shape(nested).parameters == model_shape(flat).parameters


def test_published_shapes_have_the_published_number_of_parameters() -> None:
    # As the hub counts them from the files' headers.
    known = {
        "HuggingFaceTB/SmolLM2-135M": 134_515_008, "Qwen/Qwen2.5-0.5B": 494_032_768, "meta-llama/Llama-3.2-1B": 1_235_814_400,
        "mistralai/Mistral-7B-v0.3": 7_248_023_552, "meta-llama/Llama-3.1-8B": 8_030_261_248, "Qwen/Qwen2.5-32B": 32_763_876_352,
        "meta-llama/Llama-3.1-70B": 70_553_706_496,
    }  # fmt: skip
    found = {entry.repository: entry.shape.parameters for entry in PUBLISHED}
    assert {name: found[name] for name in known} == known


@pytest.mark.parametrize("text", ["8M", "30M", "300M", "1B", "5B", "9B", "13B", "20B", "50B", "100B", "600B", "1T"])
def test_a_guessed_shape_has_the_wanted_number_of_parameters(text: str) -> None:
    wanted = parse_parameters(text)
    shape = shape_for(wanted)
    assert abs(shape.parameters / wanted - 1) < 0.03
    assert shape.heads % shape.kv_heads == 0
    assert shape.source


@pytest.mark.parametrize("text", ["", "70 apples", "-1B", "1", "1e9"])
def test_what_is_no_number_of_parameters_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_parameters(text)


def test_configs_that_cannot_be_counted_are_refused() -> None:
    config = meta_model("llama").config.to_dict()
    with pytest.raises(InputError, match="hidden_size"):
        model_shape({key: value for key, value in config.items() if key != "hidden_size"})
    with pytest.raises(InputError, match="no attention"):
        model_shape({**config, "layer_types": ["linear_attention"] * 3})
    with pytest.raises(InputError):
        model_shape({**config, "num_hidden_layers": 10**9})
    with pytest.raises(InputError):
        model_shape({**config, "vocab_size": "many"})
