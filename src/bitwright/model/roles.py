"""Roles of linears inside a block, so that recipes can say "the value projections" for any architecture."""

from __future__ import annotations

__all__ = ["ROLES", "role_of"]

#: role -> the last components of module names that play it in transformers' architectures
ROLES: dict[str, tuple[str, ...]] = {
    "attn_q": ("q_proj", "wq", "query", "q_lin"),
    "attn_k": ("k_proj", "wk", "key", "k_lin"),
    "attn_v": ("v_proj", "wv", "value", "v_lin"),
    "attn_qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj"),
    "attn_output": ("o_proj", "out_proj", "wo", "dense", "attn.c_proj", "attention.dense", "out_lin"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "lin1"),
    "gate_up_proj": ("gate_up_proj",),
    "down_proj": ("down_proj", "w2", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out", "lin2"),
    "expert": (),
    "head": (),
    "embedding": (),
}


def role_of(name: str, kind: str) -> frozenset[str]:
    """Every role of a module; kind: ``LinearUnit.role``.

    >>> sorted(role_of("model.layers.0.self_attn.v_proj", "linear"))
    ['attn_v']
    >>> sorted(role_of("transformer.h.0.mlp.c_proj", "linear"))
    ['down_proj']
    """
    found = {role for role, ends in ROLES.items() if any(name.endswith("." + end) for end in ends)}
    if kind in ROLES:
        found.add(kind)
    return frozenset(found)
