"""Gemma 1: norm weights are stored plus one; the head is tied."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import ATTENTION, DECODER, NORMS, RMS, SPELLINGS, SWIGLU
from bitwright.gguf.gemma import EMBEDDING, GELU, HEAD_DIM, plus_one
from bitwright.gguf.rope import Rope

ARCHITECTURE = Architecture(
    name="gemma",
    model_types=("gemma",),
    model_class="GemmaForCausalLM",
    tied=True,
    settings=(*DECODER, *HEAD_DIM, RMS, Rope(), GELU),
    rules=(*EMBEDDING, *plus_one(NORMS), *ATTENTION, *SWIGLU),
    spellings=SPELLINGS,
)
