"""Llama and everything that computes like it: Llama 1 to 3, Mistral, and derivatives with biases.

Rows of q and k go from halves of a head to neighbouring pairs.
"""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import DECODER, HEAD_DIM, LLAMA, NO_WINDOW, RMS, SILU, SPELLINGS, VISION
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Present

ARCHITECTURE = Architecture(
    name="llama",
    model_types=("llama", "mistral"),
    model_class="LlamaForCausalLM",
    settings=(
        *DECODER,
        *HEAD_DIM,
        RMS,
        Rope(dimension=True, kinds=("linear", "yarn", "llama3", "longrope")),
        SILU,
        Present("attention_bias", "blk.0.attn_q.bias"),
        Present("mlp_bias", "blk.0.ffn_up.bias"),
        NO_WINDOW,
    ),
    rules=LLAMA,
    spellings=SPELLINGS,
    ignored=VISION,
)
