"""Small randomly initialised models of many architectures, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 256
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}

#: model type -> (config class, arguments)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 32}),
    "qwen2": ("Qwen2Config", {**_LLAMA}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 16, "sliding_window": 32, "pad_token_id": 0}),
    "gemma3_text": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 16, "sliding_window": 32, "pad_token_id": 0}),
    "phi3": ("Phi3Config", {**_LLAMA}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    "opt": (
        "OPTConfig",
        {**_COMMON, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "word_embed_proj_dim": 64, "pad_token_id": 1},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**_COMMON, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "falcon": (
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "new_decoder_architecture": True, "num_kv_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "decoder_sparse_step": 1},
    ),
}  # fmt: skip


def make(name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: float = 3.0) -> Path:
    """Write model ``name`` into ``folder``. Matrices are scaled up so that layers matter beside the residual stream."""
    import transformers

    class_name, arguments = ZOO[name]
    config = getattr(transformers, class_name)(**arguments)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
            elif "bias" in parameter_name:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype)
    model.save_pretrained(folder)
    return folder
