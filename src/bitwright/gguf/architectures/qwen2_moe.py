"""Qwen1.5-MoE and Qwen2-MoE: experts beside a shared expert with a gate; the chosen experts' weights are not rescaled."""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import (
    ATTENTION,
    BLOCK,
    DECODER,
    EMBEDDING,
    EVERY_BLOCK,
    EXPERTS,
    LAYER,
    NORMS,
    QWEN_WINDOW,
    RMS,
    SILU,
    SPELLINGS,
    experts,
)
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Key, Only, Present

_EXPERT, _SHARED = "mlp.experts.{expert}.", LAYER + "mlp.shared_expert."

ARCHITECTURE = Architecture(
    name="qwen2moe",
    model_types=("qwen2_moe",),
    model_class="Qwen2MoeForCausalLM",
    head=True,
    settings=(
        *DECODER,
        RMS,
        Rope(),
        *EXPERTS,
        Key("expert_feed_forward_length", "moe_intermediate_size"),
        Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        Only("norm_topk_prob", (False,), written=False),
        Present("qkv_bias", "blk.0.attn_q.bias"),
        *EVERY_BLOCK,
        SILU,
        QWEN_WINDOW,
    ),
    rules=(
        *EMBEDDING,
        *NORMS,
        *ATTENTION,
        *experts("mlp.gate", gate=_EXPERT + "gate_proj", up=_EXPERT + "up_proj", down=_EXPERT + "down_proj"),
        Rule(gguf=BLOCK + "ffn_gate_inp_shexp", hf=LAYER + "mlp.shared_expert_gate", plain=True, single_row=True),
        Rule(gguf=BLOCK + "ffn_gate_shexp", hf=_SHARED + "gate_proj"),
        Rule(gguf=BLOCK + "ffn_up_shexp", hf=_SHARED + "up_proj"),
        Rule(gguf=BLOCK + "ffn_down_shexp", hf=_SHARED + "down_proj"),
    ),
    spellings=SPELLINGS,
)
