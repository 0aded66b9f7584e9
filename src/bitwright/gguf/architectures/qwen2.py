"""Qwen2 and Qwen2.5: biases on q, k and v; rows as they are."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import (
    ATTENTION,
    DECODER,
    EMBEDDING,
    HEAD_DIM,
    NORMS,
    QWEN_WINDOW,
    RMS,
    SILU,
    SPELLINGS,
    SWIGLU,
    VISION,
)
from bitwright.gguf.rope import Rope

ARCHITECTURE = Architecture(
    name="qwen2",
    model_types=("qwen2",),
    model_class="Qwen2ForCausalLM",
    settings=(*DECODER, *HEAD_DIM, RMS, Rope(), SILU, QWEN_WINDOW),
    rules=(*EMBEDDING, *NORMS, *ATTENTION, *SWIGLU),
    spellings=SPELLINGS,
    ignored=VISION,
)
