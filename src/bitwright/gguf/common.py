"""What most architectures have in common: settings of a decoder, and the tensor names of the Llama family."""

from __future__ import annotations

from bitwright.gguf.architecture import Rule
from bitwright.gguf.orders import rope_keys, rope_queries
from bitwright.gguf.settings import HeadDim, Key, Only, Setting, Unused

__all__ = [
    "ATTENTION",
    "BLOCK",
    "DECODER",
    "EMBEDDING",
    "EVERY_BLOCK",
    "EXPERTS",
    "HEAD_DIM",
    "LAYER",
    "LLAMA",
    "NORMS",
    "NO_WINDOW",
    "PERMUTED_ATTENTION",
    "QK_NORMS",
    "QWEN_WINDOW",
    "RMS",
    "SILU",
    "SPELLINGS",
    "SWIGLU",
    "VISION",
    "experts",
]

BLOCK, LAYER = "blk.{block}.", "model.layers.{block}."

#: sizes that every decoder has; what an architecture adds comes after
DECODER: tuple[Setting, ...] = (
    Key("block_count", "num_hidden_layers"),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads", default=None),
)
#: the size of a head, where the config names it
HEAD_DIM: tuple[Setting, ...] = (HeadDim(),)
RMS = Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "f32", default=1e-6)
SILU = Only("hidden_act", ("silu", "swish"), written="silu")
_WINDOW = "llama.cpp computes no sliding window for this architecture: texts longer than {} tokens are seen whole"
NO_WINDOW = Unused("sliding_window", _WINDOW)
QWEN_WINDOW = Unused("sliding_window", _WINDOW, only="use_sliding_window")
EXPERTS: tuple[Setting, ...] = (
    Key("expert_count", "num_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
)
#: experts in every block, as llama.cpp wants them
EVERY_BLOCK = (Only("decoder_sparse_step", (1,), written=1), Only("mlp_only_layers", ([],), written=[]))

EMBEDDING = (
    Rule(gguf="token_embd", hf="model.embed_tokens"),
    Rule(gguf="output_norm", hf="model.norm"),
    Rule(gguf="output", hf="lm_head", optional=True),
)
NORMS = (
    Rule(gguf=BLOCK + "attn_norm", hf=LAYER + "input_layernorm"),
    Rule(gguf=BLOCK + "ffn_norm", hf=LAYER + "post_attention_layernorm"),
)
ATTENTION = (
    Rule(gguf=BLOCK + "attn_q", hf=LAYER + "self_attn.q_proj"),
    Rule(gguf=BLOCK + "attn_k", hf=LAYER + "self_attn.k_proj"),
    Rule(gguf=BLOCK + "attn_v", hf=LAYER + "self_attn.v_proj"),
    Rule(gguf=BLOCK + "attn_output", hf=LAYER + "self_attn.o_proj"),
)
#: q and k in the order of rotary embeddings over neighbouring rows
PERMUTED_ATTENTION = (
    Rule(gguf=BLOCK + "attn_q", hf=LAYER + "self_attn.q_proj", order=rope_queries),
    Rule(gguf=BLOCK + "attn_k", hf=LAYER + "self_attn.k_proj", order=rope_keys),
    *ATTENTION[2:],
)
QK_NORMS = (
    Rule(gguf=BLOCK + "attn_q_norm", hf=LAYER + "self_attn.q_norm"),
    Rule(gguf=BLOCK + "attn_k_norm", hf=LAYER + "self_attn.k_norm"),
)
SWIGLU = (
    Rule(gguf=BLOCK + "ffn_gate", hf=LAYER + "mlp.gate_proj"),
    Rule(gguf=BLOCK + "ffn_up", hf=LAYER + "mlp.up_proj"),
    Rule(gguf=BLOCK + "ffn_down", hf=LAYER + "mlp.down_proj"),
)
LLAMA = (*EMBEDDING, *NORMS, *PERMUTED_ATTENTION, *SWIGLU)

#: the base class saved alone, and the language models inside multimodal ones
SPELLINGS = (
    {"model.": ""},
    {"model.": "language_model.model.", "lm_head": "language_model.lm_head"},
    {"model.": "model.language_model."},
)
VISION = dict.fromkeys(
    ("*vision_tower.*", "*vision_model.*", "*multi_modal_projector.*", "visual.*", "model.visual.*"),
    "belongs to the vision part, which GGUF keeps in a file of its own",
)


def experts(router: str, *, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A router, and the experts' matrices stacked; names below a block, the last three with ``{expert}``."""
    stacked = (("ffn_gate_exps", gate), ("ffn_up_exps", up), ("ffn_down_exps", down))
    return (
        Rule(gguf=BLOCK + "ffn_gate_inp", hf=LAYER + router, plain=True),
        *(Rule(gguf=BLOCK + name, hf=LAYER + hf, suffixes=(".weight",)) for name, hf in stacked),
    )
