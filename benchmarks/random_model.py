"""Write a checkpoint of random bfloat16 weights for any config of transformers, tensor by tensor, with a real model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bitwright.core.tensor import TensorSpec
from bitwright.io.safetensors_writer import SafetensorsWriter, index_json, plan_shards

#: name -> (config class, arguments): sizes of published models, or near them
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-0.25b": (
        "LlamaConfig",
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
         "vocab_size": 32000},
    ),
    "gemma3-0.27b": (
        "Gemma3TextConfig",
        {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 256, "vocab_size": 262144, "sliding_window": 512, "tie_word_embeddings": True},
    ),
    "qwen3-0.6b": (
        "Qwen3Config",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "llama-1.1b": (
        "LlamaConfig",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
         "vocab_size": 32000},
    ),
}  # fmt: skip


def write_random(name: str, folder: Path, tokenizer: Path, *, seed: int = 0) -> Path:
    """Write model ``name`` of MODELS into ``folder``."""
    import transformers

    kind, arguments = MODELS[name]
    config = getattr(transformers, kind)(**arguments, max_position_embeddings=32768, bos_token_id=0, eos_token_id=1)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    left_out = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in left_out}
    shards = plan_shards([TensorSpec(key, shape, torch.bfloat16) for key, shape in shapes.items()], 1_000_000_000)
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder, shards) as sink:
        for key, shape in shapes.items():
            if len(shape) == 1:
                sink.write(key, torch.ones(shape, dtype=torch.bfloat16))
                continue
            for start in range(0, shape[0], 4096):
                rows = min(4096, shape[0] - start)
                sink.write(key, (torch.randn(rows, shape[1], generator=generator) * shape[1] ** -0.5).bfloat16(), start)
        sink.sync()
    index = index_json(shards)
    if index is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, folder / file)
    return folder
