"""Granite 3: Llama with four multipliers, for embeddings, attention, residuals and logits."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import DECODER, LLAMA, RMS, SILU, SPELLINGS
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Present

ARCHITECTURE = Architecture(
    name="granite",
    model_types=("granite",),
    model_class="GraniteForCausalLM",
    settings=(
        *DECODER,
        RMS,
        Rope(dimension=True, kinds=("linear", "yarn", "llama3")),
        Key("attention.scale", "attention_multiplier", "f32", default=1.0),
        Key("embedding_scale", "embedding_multiplier", "f32", default=1.0),
        Key("residual_scale", "residual_multiplier", "f32", default=1.0),
        Key("logit_scale", "logits_scaling", "f32", default=1.0),
        SILU,
        Present("attention_bias", "blk.0.attn_q.bias"),
        Present("mlp_bias", "blk.0.ffn_up.bias"),
    ),
    rules=LLAMA,
    spellings=SPELLINGS,
)
