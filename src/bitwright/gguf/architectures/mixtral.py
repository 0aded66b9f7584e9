"""Mixtral: Llama with experts, under the same GGUF name. The chosen experts' weights are scaled to sum 1, as llama.cpp always does here."""

from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import (
    DECODER,
    EMBEDDING,
    EXPERTS,
    HEAD_DIM,
    NO_WINDOW,
    NORMS,
    PERMUTED_ATTENTION,
    RMS,
    SILU,
    SPELLINGS,
    experts,
)
from bitwright.gguf.rope import Rope

_EXPERT = "block_sparse_moe.experts.{expert}."

ARCHITECTURE = Architecture(
    name="llama",
    model_types=("mixtral",),
    model_class="MixtralForCausalLM",
    experts=True,
    aliases={"num_experts": "num_local_experts"},
    settings=(
        *DECODER,
        *HEAD_DIM,
        RMS,
        Rope(dimension=True, theta=1e6, kinds=("linear", "yarn", "llama3")),
        *EXPERTS,
        SILU,
        NO_WINDOW,
    ),
    rules=(
        *EMBEDDING,
        *NORMS,
        *PERMUTED_ATTENTION,
        *experts("block_sparse_moe.gate", gate=_EXPERT + "w1", up=_EXPERT + "w3", down=_EXPERT + "w2"),
    ),
    spellings=SPELLINGS,
)
