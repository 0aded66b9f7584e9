"""Gemma 2: norms before and after attention and feed-forward, stored plus one; soft caps; every other block has a sliding window."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import ATTENTION, DECODER, RMS, SPELLINGS, SWIGLU
from bitwright.gguf.gemma import EMBEDDING, GELU, HEAD_DIM, SANDWICH, AttentionScale
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key
from bitwright.gguf.window import Window

ARCHITECTURE = Architecture(
    name="gemma2",
    model_types=("gemma2",),
    model_class="Gemma2ForCausalLM",
    tied=True,
    settings=(
        *DECODER,
        *HEAD_DIM,
        RMS,
        Rope(),
        Key("attn_logit_softcapping", "attn_logit_softcapping", "f32", default=50.0),
        Key("final_logit_softcapping", "final_logit_softcapping", "f32", default=30.0),
        Window(period=2, default=4096),
        AttentionScale(whole_model=46),
        GELU,
    ),
    rules=(*EMBEDDING, *SANDWICH, *ATTENTION, *SWIGLU),
    spellings=SPELLINGS,
)
