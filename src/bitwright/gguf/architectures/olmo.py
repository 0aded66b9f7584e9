"""OLMo 1: layer norms without weights, and a clamp on q, k and v."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import DECODER, EMBEDDING, PERMUTED_ATTENTION, SILU, SPELLINGS, SWIGLU
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Fixed, Key
from bitwright.io.gguf_values import f32

ARCHITECTURE = Architecture(
    name="olmo",
    model_types=("olmo",),
    model_class="OlmoForCausalLM",
    settings=(
        *DECODER,
        Fixed("attention.layer_norm_epsilon", f32(1e-5)),
        Key("attention.clamp_kqv", "clip_qkv", "f32", default=None),
        Rope(),
        SILU,
    ),
    rules=(EMBEDDING[0], EMBEDDING[2], *PERMUTED_ATTENTION, *SWIGLU),
    spellings=SPELLINGS,
)
