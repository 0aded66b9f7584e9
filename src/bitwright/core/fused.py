"""Linears that serving engines fuse into one, so that their parts must be quantized alike and share whole-tensor scales."""

from __future__ import annotations

__all__ = ["FUSED", "fused_name"]

#: fused module -> its parts (``packed_modules_mapping`` of vLLM's models; ``w1`` and ``w3`` are Mixtral's names on disk)
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
_WHOLE = {part: whole for whole, parts in FUSED.items() for part in parts}


def fused_name(module: str) -> str:
    """The name of the fused module that a linear becomes part of, else its own name.

    >>> fused_name("model.layers.0.self_attn.k_proj")
    'model.layers.0.self_attn.qkv_proj'
    >>> fused_name("model.layers.0.mlp.down_proj")
    'model.layers.0.mlp.down_proj'
    """
    parent, dot, leaf = module.rpartition(".")
    return parent + dot + _WHOLE.get(leaf, leaf)
