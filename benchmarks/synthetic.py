"""Write a synthetic Llama checkpoint of a given size: random bfloat16 weights, in shards, in little memory.

The default is 1.1 B parameters (hidden 2048, MLP 5632, 22 layers, vocabulary 32000). The tokenizer is copied from a real model, so
that calibration text can be tokenized.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from bitwright.core.tensor import TensorSpec
from bitwright.io.safetensors_writer import SafetensorsWriter, index_json, plan_shards


def write_llama(
    folder: Path,
    *,
    hidden: int = 2048,
    mlp: int = 5632,
    layers: int = 22,
    heads: int = 32,
    kv_heads: int = 4,
    vocab: int = 32000,
    tokenizer: Path | None = None,
    shard_bytes: int = 1_000_000_000,
    seed: int = 0,
) -> Path:
    """Write the checkpoint and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        lead = f"model.layers.{i}."
        shapes |= {
            lead + "input_layernorm.weight": (hidden,),
            lead + "self_attn.q_proj.weight": (heads * head, hidden),
            lead + "self_attn.k_proj.weight": (kv_heads * head, hidden),
            lead + "self_attn.v_proj.weight": (kv_heads * head, hidden),
            lead + "self_attn.o_proj.weight": (hidden, heads * head),
            lead + "post_attention_layernorm.weight": (hidden,),
            lead + "mlp.gate_proj.weight": (mlp, hidden),
            lead + "mlp.up_proj.weight": (mlp, hidden),
            lead + "mlp.down_proj.weight": (hidden, mlp),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    shards = plan_shards([TensorSpec(n, s, torch.bfloat16) for n, s in shapes.items()], shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder, shards) as sink:
        for name, shape in shapes.items():
            if len(shape) == 1:
                sink.write(name, torch.ones(shape, dtype=torch.bfloat16))
                continue
            for start in range(0, shape[0], 2048):
                rows = min(2048, shape[0] - start)
                part = torch.randn(rows, shape[1], generator=generator) * shape[1] ** -0.5
                sink.write(name, part.bfloat16(), start)
        sink.sync()
    index = index_json(shards)
    if index is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "vocab_size": vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--tokenizer", type=Path, required=True)
    options = parser.parse_args()
    write_llama(
        options.folder, layers=options.layers, hidden=options.hidden, mlp=options.mlp, tokenizer=options.tokenizer
    )


if __name__ == "__main__":
    main()
