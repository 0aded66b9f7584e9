"""Falcon 7B, 40B and 11B: groups of queries, each followed by its key and value, become all of q, all of k, all of v.

7B shares one key and value among all heads; 40B has a norm before the feed-forward and another before attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import BLOCK
from bitwright.gguf.orders import groups_to_parts
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Derived, Key, Model, Only, Plain, Stored
from bitwright.io.gguf_values import GgufValue, u32

_LAYER = "transformer.h.{block}."


def _adapt(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Heads of keys as the class counts them: ``num_kv_heads`` says nothing where one is shared by all."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    grouped = config.get("new_decoder_architecture", False)
    shared = not grouped and config.get("multi_query", True)
    own = config.get("num_kv_heads", config.get("n_head_kv"))
    return {**config, "num_key_value_heads": 1 if shared else own or heads}


def _two_norms(model: Model) -> bool:
    grouped = bool(model.get("new_decoder_architecture", False))
    return grouped and model.get("num_ln_in_parallel_attn", 2) == 2


def _one_norm(model: Model) -> bool:
    return not _two_norms(model)


@dataclass(frozen=True)
class _Kind(Plain):
    """Which of the three decoders it is, told by the heads and norms."""

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """The count of key heads."""
        return {"attention.head_count_kv": u32(model.kv_heads)}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """The entries that the class reads."""
        own, heads = stored.integer("attention.head_count_kv", 1), stored.model.heads
        two = stored.has("blk.0.attn_norm_2.weight")
        grouped = two or 1 < own < heads
        return {
            "num_key_value_heads": own,
            "num_kv_heads": own,
            "new_decoder_architecture": grouped,
            "multi_query": own == 1 and not grouped,
            "num_ln_in_parallel_attn": 2 if two else 1,
            "parallel_attn": True,
            "alibi": False,
            "bias": False,
        }


ARCHITECTURE = Architecture(
    name="falcon",
    model_types=("falcon", "RefinedWebModel", "RefinedWeb"),
    model_class="FalconForCausalLM",
    tied=True,
    adapt=_adapt,
    aliases={
        "num_hidden_layers": "num_hidden_layers",
        "layer_norm_eps": "layer_norm_epsilon",
        "intermediate_size": "ffn_hidden_size",
    },
    settings=(
        Key("block_count", "num_hidden_layers"),
        Key("context_length", "max_position_embeddings", default=2048),
        Key("embedding_length", "hidden_size"),
        Derived(
            "feed_forward_length",
            lambda model: u32(model.count("intermediate_size", 4 * model.hidden)),
            "intermediate_size",
        ),
        Key("attention.head_count", "num_attention_heads"),
        _Kind(),
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=1e-5),
        Rope(kinds=("linear", "yarn")),
        Only("alibi", (False,)),
        Only("parallel_attn", (True,)),
        Only("bias", (False,)),
        Only("activation", ("gelu",)),
    ),
    rules=(
        Rule(gguf="token_embd", hf="transformer.word_embeddings"),
        Rule(gguf="output_norm", hf="transformer.ln_f"),
        Rule(gguf="output", hf="lm_head", optional=True),
        Rule(gguf=BLOCK + "attn_norm", hf=_LAYER + "input_layernorm", when=_one_norm),
        Rule(gguf=BLOCK + "attn_norm", hf=_LAYER + "ln_mlp", when=_two_norms),
        Rule(gguf=BLOCK + "attn_norm_2", hf=_LAYER + "ln_attn", when=_two_norms),
        Rule(gguf=BLOCK + "attn_qkv", hf=_LAYER + "self_attention.query_key_value", order=groups_to_parts),
        Rule(gguf=BLOCK + "attn_output", hf=_LAYER + "self_attention.dense"),
        Rule(gguf=BLOCK + "ffn_up", hf=_LAYER + "mlp.dense_h_to_4h"),
        Rule(gguf=BLOCK + "ffn_down", hf=_LAYER + "mlp.dense_4h_to_h"),
    ),
)
