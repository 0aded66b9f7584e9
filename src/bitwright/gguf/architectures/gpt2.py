"""GPT-2: learned positions, matrices stored transposed (Conv1D), q, k, v in one."""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import BLOCK
from bitwright.gguf.settings import Derived, Key, Only
from bitwright.io.gguf_values import u32

_LAYER = "transformer.h.{block}."

ARCHITECTURE = Architecture(
    name="gpt2",
    model_types=("gpt2",),
    model_class="GPT2LMHeadModel",
    tied=True,
    aliases={
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    settings=(
        Key("block_count", "num_hidden_layers"),
        Key("context_length", "max_position_embeddings"),
        Key("embedding_length", "hidden_size"),
        Derived(
            "feed_forward_length",
            lambda model: u32(model.count("intermediate_size", 4 * model.hidden)),
            "intermediate_size",
        ),
        Key("attention.head_count", "num_attention_heads"),
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=1e-5),
        Only("hidden_act", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")),
        Only("scale_attn_weights", (True,)),
        Only("scale_attn_by_inverse_layer_idx", (False,)),
    ),
    rules=(
        Rule(gguf="token_embd", hf="transformer.wte"),
        Rule(gguf="position_embd", hf="transformer.wpe", plain=True),
        Rule(gguf="output_norm", hf="transformer.ln_f"),
        Rule(gguf="output", hf="lm_head", optional=True),
        Rule(gguf=BLOCK + "attn_norm", hf=_LAYER + "ln_1"),
        Rule(gguf=BLOCK + "attn_qkv", hf=_LAYER + "attn.c_attn", change="transpose"),
        Rule(gguf=BLOCK + "attn_output", hf=_LAYER + "attn.c_proj", change="transpose"),
        Rule(gguf=BLOCK + "ffn_norm", hf=_LAYER + "ln_2"),
        Rule(gguf=BLOCK + "ffn_up", hf=_LAYER + "mlp.c_fc", change="transpose"),
        Rule(gguf=BLOCK + "ffn_down", hf=_LAYER + "mlp.c_proj", change="transpose"),
    ),
    spellings=({"transformer.": ""},),
)
