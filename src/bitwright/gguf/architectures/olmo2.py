"""OLMo 2: norms after attention and feed-forward instead of before, and over all of q and all of k."""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import ATTENTION, BLOCK, DECODER, EMBEDDING, LAYER, QK_NORMS, RMS, SILU, SPELLINGS, SWIGLU
from bitwright.gguf.rope import Rope

ARCHITECTURE = Architecture(
    name="olmo2",
    model_types=("olmo2",),
    model_class="Olmo2ForCausalLM",
    settings=(*DECODER, RMS, Rope(), SILU),
    rules=(
        *EMBEDDING,
        *ATTENTION,
        *QK_NORMS,
        Rule(gguf=BLOCK + "post_attention_norm", hf=LAYER + "post_attention_layernorm"),
        Rule(gguf=BLOCK + "post_ffw_norm", hf=LAYER + "post_feedforward_layernorm"),
        *SWIGLU,
    ),
    spellings=SPELLINGS,
)
