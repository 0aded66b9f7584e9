"""BERT and sentence embedding models made of it: post-norm encoder blocks, positions and token types as tables, no causal mask.

GGUF holds the encoder alone: pooler and language-model heads are left out. How token vectors become one is read from
``1_Pooling/config.json``, where sentence-transformers says it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.gguf.architecture import Architecture, Rule
from bitwright.gguf.common import BLOCK, DECODER
from bitwright.gguf.settings import Fixed, Key, Model, Only, Plain, Stored
from bitwright.io.gguf_values import GgufValue, boolean, u32
from bitwright.io.strict import load_json

_LAYER = "encoder.layer.{block}."

#: sentence-transformers' switch -> GGUF's number
_POOLING = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2, "pooling_mode_lasttoken": 3}


@dataclass(frozen=True)
class _Pooling(Plain):
    """How the vectors of a text's tokens become one; without a word from sentence-transformers the file does not say."""

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """``pooling_type``."""
        path = None if model.folder is None else model.folder / "1_Pooling" / "config.json"
        found = load_json(path) if path is not None and path.is_file() else {}
        chosen = [number for name, number in _POOLING.items() if isinstance(found, dict) and found.get(name)]
        return {"pooling_type": u32(chosen[0])} if len(chosen) == 1 else {}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """Nothing: it is no part of the config."""
        del stored
        return {}


ARCHITECTURE = Architecture(
    name="bert",
    model_types=("bert",),
    model_class="BertModel",
    settings=(
        *DECODER,
        Key("attention.layer_norm_epsilon", "layer_norm_eps", "f32", default=1e-12),
        Fixed("attention.causal", boolean(False)),
        _Pooling(),
        Only("hidden_act", ("gelu",)),
        Only("position_embedding_type", ("absolute",)),
        Only("is_decoder", (False,)),
    ),
    rules=(
        Rule(gguf="token_embd", hf="embeddings.word_embeddings"),
        Rule(gguf="position_embd", hf="embeddings.position_embeddings", plain=True),
        Rule(gguf="token_types", hf="embeddings.token_type_embeddings", plain=True),
        Rule(gguf="token_embd_norm", hf="embeddings.LayerNorm"),
        Rule(gguf=BLOCK + "attn_q", hf=_LAYER + "attention.self.query"),
        Rule(gguf=BLOCK + "attn_k", hf=_LAYER + "attention.self.key"),
        Rule(gguf=BLOCK + "attn_v", hf=_LAYER + "attention.self.value"),
        Rule(gguf=BLOCK + "attn_output", hf=_LAYER + "attention.output.dense"),
        Rule(gguf=BLOCK + "attn_output_norm", hf=_LAYER + "attention.output.LayerNorm"),
        Rule(gguf=BLOCK + "ffn_up", hf=_LAYER + "intermediate.dense"),
        Rule(gguf=BLOCK + "ffn_down", hf=_LAYER + "output.dense"),
        Rule(gguf=BLOCK + "layer_output_norm", hf=_LAYER + "output.LayerNorm"),
    ),
    spellings=({"embeddings.": "bert.embeddings.", "encoder.": "bert.encoder."},),
    ignored={
        "*pooler.dense.*": "the pooler, which embeddings do not go through in llama.cpp",
        "cls.*": "a training head, which GGUF does not hold",
        "*embeddings.position_ids": "positions 0, 1, 2 ...",
    },
)
