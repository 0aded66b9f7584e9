"""StarCoder2: layer norms with biases, a plain feed-forward, grouped queries, rotary embeddings over halves."""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import ATTENTION, BLOCK, DECODER, EMBEDDING, LAYER, NO_WINDOW, NORMS, SPELLINGS
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only

ARCHITECTURE = Architecture(
    name="starcoder2",
    model_types=("starcoder2",),
    model_class="Starcoder2ForCausalLM",
    tied=True,
    settings=(
        *DECODER,
        Key("attention.layer_norm_epsilon", "norm_epsilon", "f32", default=1e-5),
        Rope(),
        Only("hidden_act", ("gelu_pytorch_tanh", "gelu_new")),
        Only("use_bias", (True,)),
        NO_WINDOW,
    ),
    rules=(
        *EMBEDDING,
        *NORMS,
        *ATTENTION,
        Rule(gguf=BLOCK + "ffn_up", hf=LAYER + "mlp.c_fc"),
        Rule(gguf=BLOCK + "ffn_down", hf=LAYER + "mlp.c_proj"),
    ),
    spellings=SPELLINGS,
)
