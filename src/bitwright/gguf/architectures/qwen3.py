"""Qwen3: norms on q and k, a head size of its own, no biases."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import (
    ATTENTION,
    DECODER,
    EMBEDDING,
    HEAD_DIM,
    NORMS,
    QK_NORMS,
    QWEN_WINDOW,
    RMS,
    SILU,
    SPELLINGS,
    SWIGLU,
    VISION,
)
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Present

ARCHITECTURE = Architecture(
    name="qwen3",
    model_types=("qwen3",),
    model_class="Qwen3ForCausalLM",
    settings=(*DECODER, *HEAD_DIM, RMS, Rope(), SILU, QWEN_WINDOW, Present("attention_bias", "blk.0.attn_q.bias")),
    rules=(*EMBEDDING, *NORMS, *ATTENTION, *QK_NORMS, *SWIGLU),
    spellings=SPELLINGS,
    ignored=VISION,
)
