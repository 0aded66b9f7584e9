"""Phi-3, Phi-3.5 and Phi-4: q, k, v in one matrix, gate and up in another (stored as ``ffn_up``); longrope by two factor tensors.

A window of 0 stands for none; llama.cpp 's graph takes no window into account for this architecture.
"""

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import (
    ATTENTION,
    BLOCK,
    DECODER,
    EMBEDDING,
    LAYER,
    NO_WINDOW,
    NORMS,
    RMS,
    SILU,
    SPELLINGS,
    SWIGLU,
)
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Derived
from bitwright.io.gguf_values import u32

ARCHITECTURE = Architecture(
    name="phi3",
    model_types=("phi3",),
    model_class="Phi3ForCausalLM",
    settings=(
        *DECODER,
        RMS,
        Rope(dimension=True, trained=True, kinds=("longrope",)),
        Derived("attention.sliding_window", lambda model: u32(model.integer("sliding_window", 0))),
        SILU,
        NO_WINDOW,
    ),
    rules=(
        *EMBEDDING,
        *NORMS,
        Rule(gguf=BLOCK + "attn_qkv", hf=LAYER + "self_attn.qkv_proj"),
        ATTENTION[-1],
        Rule(gguf=BLOCK + "ffn_up", hf=LAYER + "mlp.gate_up_proj"),
        SWIGLU[-1],
    ),
    spellings=SPELLINGS,
)
