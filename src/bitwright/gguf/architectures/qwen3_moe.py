"""Qwen3-MoE: Qwen3 with experts, whose chosen weights llama.cpp always scales to sum 1."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import (
    ATTENTION,
    DECODER,
    EMBEDDING,
    EVERY_BLOCK,
    EXPERTS,
    HEAD_DIM,
    NORMS,
    QK_NORMS,
    QWEN_WINDOW,
    RMS,
    SILU,
    SPELLINGS,
    experts,
)
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only

_EXPERT = "mlp.experts.{expert}."

ARCHITECTURE = Architecture(
    name="qwen3moe",
    model_types=("qwen3_moe",),
    model_class="Qwen3MoeForCausalLM",
    settings=(
        *DECODER,
        *HEAD_DIM,
        RMS,
        Rope(),
        *EXPERTS,
        Key("expert_feed_forward_length", "moe_intermediate_size"),
        Only("norm_topk_prob", (True,), default=False, written=True),
        *EVERY_BLOCK,
        SILU,
        QWEN_WINDOW,
    ),
    rules=(
        *EMBEDDING,
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        *experts("mlp.gate", gate=_EXPERT + "gate_proj", up=_EXPERT + "up_proj", down=_EXPERT + "down_proj"),
    ),
    spellings=SPELLINGS,
)
