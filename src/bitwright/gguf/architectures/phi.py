"""Phi-1, Phi-1.5 and Phi-2: attention and feed-forward side by side after one norm, biases everywhere, part of a head rotated."""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import ATTENTION, BLOCK, DECODER, LAYER, NORMS, SPELLINGS
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only

ARCHITECTURE = Architecture(
    name="phi2",
    model_types=("phi",),
    model_class="PhiForCausalLM",
    head=True,
    settings=(
        *DECODER,
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=1e-5),
        Rope(dimension=True, partial=0.5),
        Only("qk_layernorm", (False,)),
        Only("hidden_act", ("gelu_new", "gelu_pytorch_tanh")),
    ),
    rules=(
        Rule(gguf="token_embd", hf="model.embed_tokens"),
        Rule(gguf="output_norm", hf="model.final_layernorm"),
        Rule(gguf="output", hf="lm_head"),
        NORMS[0],
        *ATTENTION[:3],
        Rule(gguf=BLOCK + "attn_output", hf=LAYER + "self_attn.dense"),
        Rule(gguf=BLOCK + "ffn_up", hf=LAYER + "mlp.fc1"),
        Rule(gguf=BLOCK + "ffn_down", hf=LAYER + "mlp.fc2"),
    ),
    spellings=SPELLINGS,
)
