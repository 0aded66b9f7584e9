"""Command-R: attention and feed-forward side by side after one norm; logits are scaled; the head is tied."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import ATTENTION, DECODER, EMBEDDING, NORMS, SILU, SPELLINGS, SWIGLU
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only

ARCHITECTURE = Architecture(
    name="command-r",
    model_types=("cohere",),
    model_class="CohereForCausalLM",
    tied=True,
    settings=(
        *DECODER,
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=1e-5),
        Rope(kinds=("linear",)),
        Key("logit_scale", "logit_scale", "f32", default=0.0625),
        Only("use_qk_norm", (False,)),
        Only("attention_bias", (False,)),
        SILU,
    ),
    rules=(*EMBEDDING, NORMS[0], *ATTENTION, *SWIGLU),
    spellings=SPELLINGS,
)
