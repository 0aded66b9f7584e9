"""Rotary scaling against transformers' own frequencies, and back."""

import json
import math

import numpy as np
import pytest

from bitwright.errors import InputError
from bitwright.gguf.rope import Rope, llama3_factors, solve_llama3
from bitwright.gguf.settings import Model
from bitwright.io.gguf_values import f32

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def model(rope, **config):
    sizes = {"num_attention_heads": 4, "hidden_size": 512, "max_position_embeddings": 4096, **config}
    return Model(where="config.json", config={**sizes, "rope_parameters": rope}, aliases={})


@pytest.mark.parametrize(
    ("factor", "trained", "theta"), [(8.0, 8192, 500000.0), (32.0, 8192, 500000.0), (4.0, 256, 10000.0)]
)
def test_llama3_factors_are_what_transformers_divides_by(factor, trained, theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3, "factor": factor, "original_max_position_embeddings": trained, "rope_theta": theta}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(np.arange(0, 128, 2) / 128)
    found = llama3_factors(Model(where="", config=rope, aliases={}), 128, theta, trained)
    np.testing.assert_allclose(found, plain / scaled.numpy(), rtol=1e-5)
    solved = solve_llama3("x", found, theta, 131072)
    assert solved == {**LLAMA3, "factor": factor, "original_max_position_embeddings": trained}


def test_factors_of_nothing_known_are_refused():
    with pytest.raises(InputError, match="llama3"):
        solve_llama3("x", np.linspace(1, 3, 32).astype(np.float32)[::-1].copy(), 10000.0, 4096)


def test_yarn_takes_its_trained_length_from_the_config():
    found = Rope().export(model({"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=1024))
    assert found["rope.scaling.original_context_length"].value == 1024
    assert "rope.scaling.attn_factor" not in found


def test_yarn_with_an_attention_factor_is_told_relative_to_the_natural_one():
    natural = 0.1 * math.log(4) + 1
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    found = Rope().export(model({**rope, "attention_factor": 2.0}))
    assert found["rope.scaling.attn_factor"] == f32(2.0 / natural)
    found = Rope().export(model({**rope, "mscale": 1.0, "mscale_all_dim": 0.5}))
    assert found["rope.scaling.attn_factor"] == f32(1 / (0.05 * math.log(4) + 1))


def test_longrope_writes_its_factors_as_tensors():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 1024}
    rope |= {"short_factor": [1.0] * 64, "long_factor": [float(i) for i in range(1, 65)]}
    setting = Rope(dimension=True, kinds=("longrope",))
    made = setting.generate(model(rope))
    np.testing.assert_array_equal(made["rope_factors_long.weight"], np.arange(1, 65, dtype=np.float32))
    assert setting.export(model(rope))["rope.scaling.attn_factor"] == f32(math.sqrt(1 + math.log(4) / math.log(1024)))


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("llama-linear", {"rope_type": "linear", "factor": 4.0}),
        ("llama-yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("llama-yarn-factor", {"attention_factor": 1.25}),
        ("llama-llama3", {**LLAMA3, "original_max_position_embeddings": 64}),
        ("gpt-neox", {"partial_rotary_factor": 0.25}),
    ],
)
def test_entries_come_back(name, entries, zoo):
    from bitwright.gguf.to_hf import HfView
    from bitwright.io.gguf_file import GgufFile

    with GgufFile.open(zoo(name)[1]) as file:
        found = HfView(file).config["rope_parameters"]
    assert entries.items() <= found.items(), json.dumps(found)
