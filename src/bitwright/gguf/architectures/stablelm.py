"""StableLM 2: layer norms, a quarter of a head rotated; norms per head of the 12B model are not supported."""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import ATTENTION, BLOCK, DECODER, EMBEDDING, LAYER, NORMS, SILU, SPELLINGS, SWIGLU
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only, Present

ARCHITECTURE = Architecture(
    name="stablelm",
    model_types=("stablelm",),
    model_class="StableLmForCausalLM",
    head=True,
    settings=(
        *DECODER,
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=1e-5),
        Rope(dimension=True, partial=0.25),
        Key("use_parallel_residual", "use_parallel_residual", "bool", default=False),
        Only("qk_layernorm", (False,)),
        Present("use_qkv_bias", "blk.0.attn_q.bias"),
        SILU,
    ),
    rules=(
        *EMBEDDING,
        NORMS[0],
        Rule(gguf=BLOCK + "ffn_norm", hf=LAYER + "post_attention_layernorm", optional=True),
        *ATTENTION,
        *SWIGLU,
    ),
    spellings=SPELLINGS,
)
