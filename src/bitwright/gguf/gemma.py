"""What the Gemma models share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitwright.errors import PlanError
from bitwright.gguf import common
from bitwright.gguf.architecture import Rule
from bitwright.gguf.common import BLOCK, LAYER
from bitwright.gguf.settings import HeadDim, Model, Only, Plain, Setting, Stored
from bitwright.io.gguf_values import GgufValue

__all__ = ["EMBEDDING", "GELU", "HEAD_DIM", "SANDWICH", "AttentionScale", "plus_one"]


def plus_one(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules for weights that are stored less one: the checkpoint's ``w`` multiplies by ``1 + w``."""
    return tuple(replace(rule, change="add-one") for rule in rules)


EMBEDDING = (common.EMBEDDING[0], *plus_one(common.EMBEDDING[1:2]), common.EMBEDDING[2])
HEAD_DIM: tuple[Setting, ...] = (HeadDim(default=256),)
GELU = Only("hidden_activation", ("gelu_pytorch_tanh", "gelu"))
#: norms before and after attention and feed-forward
SANDWICH = plus_one(
    (
        Rule(gguf=BLOCK + "attn_norm", hf=LAYER + "input_layernorm"),
        Rule(gguf=BLOCK + "post_attention_norm", hf=LAYER + "post_attention_layernorm"),
        Rule(gguf=BLOCK + "ffn_norm", hf=LAYER + "pre_feedforward_layernorm"),
        Rule(gguf=BLOCK + "post_ffw_norm", hf=LAYER + "post_feedforward_layernorm"),
    )
)


@dataclass(frozen=True)
class AttentionScale(Plain):
    """``query_pre_attn_scalar``, which GGUF does not hold: llama.cpp scales by the size of a head, or, in models of ``whole_model`` blocks,
    by the width shared out among the heads.
    """

    whole_model: int

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """Nothing; PlanError for another scale."""
        expected = self._expected(model)
        found = model.number("query_pre_attn_scalar", 256)
        if found != expected:
            raise PlanError(
                f"{model.where}: query_pre_attn_scalar is {found:g}, but llama.cpp computes this architecture only with {expected}",
                mend="use another layout for this model",
            )
        return {}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """The scale that llama.cpp uses."""
        return {"query_pre_attn_scalar": self._expected(stored.model)}

    def _expected(self, model: Model) -> int:
        return model.hidden // model.heads if model.blocks == self.whole_model else model.count("head_dim", 256)
