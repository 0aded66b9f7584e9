"""GPT-NeoX and Pythia: q, k, v of each head in turn become all of q, all of k, all of v; a quarter of a head is rotated."""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import BLOCK, DECODER
from bitwright.gguf.orders import thirds_of_heads
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only

_LAYER = "gpt_neox.layers.{block}."

ARCHITECTURE = Architecture(
    name="gptneox",
    model_types=("gpt_neox",),
    model_class="GPTNeoXForCausalLM",
    head=True,
    settings=(
        *DECODER,
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=1e-5),
        Rope(dimension=True, partial=0.25),
        Key("use_parallel_residual", "use_parallel_residual", "bool", default=True),
        Only("hidden_act", ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
    ),
    rules=(
        Rule(gguf="token_embd", hf="gpt_neox.embed_in"),
        Rule(gguf="output_norm", hf="gpt_neox.final_layer_norm"),
        Rule(gguf="output", hf="embed_out", optional=True),
        Rule(gguf=BLOCK + "attn_norm", hf=_LAYER + "input_layernorm"),
        Rule(gguf=BLOCK + "attn_qkv", hf=_LAYER + "attention.query_key_value", order=thirds_of_heads),
        Rule(gguf=BLOCK + "attn_output", hf=_LAYER + "attention.dense"),
        Rule(gguf=BLOCK + "ffn_norm", hf=_LAYER + "post_attention_layernorm"),
        Rule(gguf=BLOCK + "ffn_up", hf=_LAYER + "mlp.dense_h_to_4h"),
        Rule(gguf=BLOCK + "ffn_down", hf=_LAYER + "mlp.dense_4h_to_h"),
    ),
)
