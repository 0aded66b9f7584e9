"""Tiny models of every architecture that GGUF is written for, with the variants that take another road."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright.blocks.codec import quantize
from bitwright.blocks.types import TYPES
from bitwright.gguf.export import Export, describe
from bitwright.io.gguf_values import u32
from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf
from bitwright.io.safetensors_dir import SafetensorsDir
from tests.small import add_tokenizer
from tests.zoo import _COMMON, _LLAMA, VOCAB

_SMALL: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 16, "sliding_window": 8, "pad_token_id": 0, "query_pre_attn_scalar": 16}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_FACTORS: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _rope(kind: str, **entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **entries}}


#: name -> (config class, arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA}),
    "llama-tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-linear": ("LlamaConfig", {**_LLAMA, **_rope("linear", factor=4.0)}),
    "llama-yarn": ("LlamaConfig", {**_LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    "llama-yarn-factor": (
        "LlamaConfig",
        {**_LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.25)},
    ),
    "llama-llama3": ("LlamaConfig", {**_LLAMA, "head_dim": 64, "rope_parameters": _LLAMA3}),
    "llama-longrope": ("LlamaConfig", {**_LLAMA, "rope_parameters": {**_FACTORS, "factor": 8.0}}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": None}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**_LLAMA}),
    "qwen2-tied": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2Config", {**_LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 32}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_LLAMA, **_MOE, "shared_expert_intermediate_size": 96}),
    "qwen2-moe-tied": (
        "Qwen2MoeConfig",
        {**_LLAMA, **_MOE, "shared_expert_intermediate_size": 96, "tie_word_embeddings": True},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**_LLAMA, **_MOE, "head_dim": 16, "norm_topk_prob": True}),
    "gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 32, "pad_token_id": 0}),
    "gemma2": ("Gemma2Config", {**_GEMMA}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 7}),
    "gemma3-pattern": (
        "Gemma3TextConfig",
        {**_GEMMA, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "phi3": ("Phi3Config", {**_LLAMA}),
    "phi3-longrope-short": (
        "Phi3Config",
        {**_LLAMA, "max_position_embeddings": 1024, "original_max_position_embeddings": 512,
         "rope_parameters": {**_FACTORS, "original_max_position_embeddings": 512}},
    ),
    "phi3-longrope-long": ("Phi3Config", {**_LLAMA, "original_max_position_embeddings": 16, "rope_parameters": _FACTORS}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 4,
                            "bos_token_id": 0, "eos_token_id": 1}),
    "gpt-neox": ("GPTNeoXConfig", {**_SMALL}),
    "gpt-neox-serial": ("GPTNeoXConfig", {**_SMALL, "use_parallel_residual": False, "rotary_pct": 1.0}),
    "falcon-40b": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-7b": ("FalconConfig", {**_FALCON, "multi_query": True}),
    "falcon-11b": (
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-heads": ("FalconConfig", {**_FALCON, "multi_query": False}),
    "olmo2": ("Olmo2Config", {**_LLAMA}),
    "granite": (
        "GraniteConfig",
        {**_LLAMA, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "smollm3": ("SmolLM3Config", {**_LLAMA, "num_hidden_layers": 5}),
    "starcoder2": ("Starcoder2Config", {**_LLAMA}),
    "stablelm": ("StableLmConfig", {**_LLAMA, "use_qkv_bias": True}),
    "olmo": ("OlmoConfig", {**_LLAMA, "clip_qkv": 0.5}),
    "cohere": ("CohereConfig", {**_LLAMA, "logit_scale": 0.25}),
    "phi": ("PhiConfig", {**_SMALL}),
    "bert": ("BertConfig", {**_SMALL, "type_vocab_size": 2}),
}  # fmt: skip


def make(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, scale: float = 3.0) -> Path:
    """A random model with a byte tokenizer; matrices are scaled up so that layers matter beside the residual stream."""
    import transformers

    class_name, arguments = MODELS[name]
    config = getattr(transformers, class_name)(**arguments)
    torch.manual_seed(sum(name.encode()))
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
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
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "bert":
        from tests.gguf_tokenizers import write_wordpiece

        write_wordpiece(folder, vocab=VOCAB)
    else:
        add_tokenizer(folder)
    return folder


def write_gguf(folder: Path, out: Path, *, pre: str | None = None) -> Export:
    """The model in ``folder`` as ``out`` (``....gguf``), every tensor in F32."""
    with SafetensorsDir.open(folder) as source:
        export = describe(source, pre=pre)
        values = {**export.values, "general.file_type": u32(0)}
        parts = plan_gguf(
            values, [GgufEntry(road.name, road.shape, TYPES["F32"]) for road in export.roads], stem=out.stem
        )
        with GgufWriter(out.parent, parts) as writer:
            for road in export.roads:
                writer.write(road.name, quantize(road.read(source), "F32"))
            assert not writer.missing()
    return export


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def mean_divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean KL of next-token distributions, in nats, ``(tokens, vocabulary)`` each."""
    first, second = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (wanted, found))
    value = float((first.exp() * (first - second)).sum(-1).mean())
    assert math.isfinite(value)
    return value
