"""Gemma 3 (text): as Gemma 2 without soft caps, with norms on q and k, five sliding blocks to one full, these with a base of their own."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import ATTENTION, DECODER, QK_NORMS, RMS, SPELLINGS, SWIGLU, VISION
from bitwright.gguf.gemma import EMBEDDING, GELU, HEAD_DIM, SANDWICH, AttentionScale, plus_one
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only
from bitwright.gguf.window import Window

ARCHITECTURE = Architecture(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    model_class="Gemma3ForCausalLM",
    tied=True,
    settings=(
        *DECODER,
        *HEAD_DIM,
        RMS,
        Rope(theta=1e6, local=True),
        Key("final_logit_softcapping", "final_logit_softcapping", "f32", default=None),
        Window(period=6, default=4096),
        Only("attn_logit_softcapping", ()),
        Only("use_bidirectional_attention", (False,)),
        AttentionScale(whole_model=62),
        GELU,
    ),
    rules=(*EMBEDDING, *SANDWICH, *ATTENTION, *plus_one(QK_NORMS), *SWIGLU),
    spellings=SPELLINGS,
    ignored=VISION,
)
