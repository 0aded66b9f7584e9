"""The shape of a model from what describes it: a config, or only a number of parameters.

``model_shape`` reads a ``config.json`` (or the config made of a GGUF header); ``shape_for`` guesses a typical shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bitwright.advise.decoder import Experts, Latent, ModelShape, Vectors
from bitwright.advise.published import parse_parameters, shape_for
from bitwright.errors import InputError

__all__ = ["ModelShape", "model_shape", "parse_parameters", "shape_for"]

#: no model has more layers, heads or experts, or is wider; beyond it a config is damaged
_MANY, _WIDE = 2**14, 2**24


class _Config:
    """A config as ``model_shape`` asks it: a nested ``text_config`` laid over it, numbers checked."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        self._values: dict[str, Any] = {**config, **text} if isinstance(text, Mapping) else dict(config)

    def get(self, *names: str) -> Any:
        """The first of these entries that is there; ``null`` counts as absent."""
        return next((self._values[name] for name in names if self._values.get(name) is not None), None)

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number. InputError where it is missing or absurd."""
        value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"config.json does not say '{names[0]}'", mend="give the sizes by hand, or fetch it again")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _WIDE:
            raise InputError(f"config.json: '{names[0]}' is {value!r}", mend=f"it must be a whole number from {least}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        return default if value is None else bool(value)


def model_shape(config: Mapping[str, Any], *, source: str = "config.json") -> ModelShape:
    """The shape of the model that a ``config.json`` (or the config made of a GGUF header) describes.

    Raises InputError for configs that lack sizes and for layers that are no attention (state-space and other recurrent layers).
    """
    c = _Config(config)
    kind = str(c.get("model_type") or "?")
    hidden = c.count("hidden_size", "n_embd", "d_model")
    layers = c.count("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = c.count("num_attention_heads", "n_head", "n_heads")
    if layers > _MANY or heads > _MANY:
        raise InputError(f"config.json: {layers} layers of {heads} heads", mend="the file is damaged; fetch it again")
    base = ModelShape(
        name=kind, hidden=hidden, layers=layers, heads=heads, kv_heads=_kv_heads(c, kind, heads),
        head_dim=c.count("head_dim", "kv_channels", default=max(1, hidden // heads)),
        intermediate=c.count("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden),
        vocab=c.count("vocab_size"), tied=c.flag("tie_word_embeddings", kind in _TIED), windows=_windows(c, kind, layers),
        source=source,
    )  # fmt: skip
    return _family(c, kind, base)


#: classes that tie embedding and head where the config is silent
_TIED = frozenset(
    {"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "opt", "cohere", "cohere2", "falcon", "starcoder2", "smollm3"}
)


def _kv_heads(c: _Config, kind: str, heads: int) -> int:
    if kind in ("falcon", "RefinedWeb", "RefinedWebModel") and not c.flag("new_decoder_architecture"):
        return 1 if c.flag("multi_query", True) else heads
    return c.count("num_key_value_heads", "num_kv_heads", default=heads)


def _windows(c: _Config, kind: str, layers: int) -> tuple[int | None, ...]:
    """What each layer sees; transformers' own rule (``layer_types``), with the defaults of classes whose old configs lack it."""
    width = c.get("sliding_window")
    kinds = c.get("layer_types", "layers_block_type", "hybrid_override_pattern")
    if kinds is not None:
        return _of_types(c, kinds, layers)
    if any(c.get(name) for name in ("linear_num_key_heads", "mamba_d_state", "ssm_cfg", "state_size")):
        raise InputError(f"model type {kind}: layers that are no attention", mend="their states are not counted")
    if width is None or (kind in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe") and not c.flag("use_sliding_window")):
        return ()
    width = c.count("sliding_window")
    if kind in _PERIODS:
        period = c.count("sliding_window_pattern", "_sliding_window_pattern", default=_PERIODS[kind])
        return tuple(width if (i + 1) % period else None for i in range(layers))
    return (width,) * layers


#: classes in which every so manieth layer sees everything, where the config is silent
_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}


def _of_types(c: _Config, kinds: Any, layers: int) -> tuple[int | None, ...]:
    if not isinstance(kinds, Sequence) or isinstance(kinds, str) or len(kinds) != layers:
        raise InputError("config.json: 'layer_types' does not name every layer", mend="fetch the file again")
    strange = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention", "chunked_attention"})
    if strange:
        raise InputError(f"layers of type {', '.join(strange)} are no attention", mend="their states are not counted")
    near = [str(kind) != "full_attention" for kind in kinds]
    if not any(near):
        return ()
    width = c.count("sliding_window", "attention_chunk_size")
    return tuple(width if one else None for one in near)


def _family(c: _Config, kind: str, base: ModelShape) -> ModelShape:
    """What differs from Llama: fused matrices, experts, norms and biases; read from transformers' classes."""
    bias, head_dim = c.flag("attention_bias"), base.head_dim
    if kind in ("gpt2", "opt", "gpt_neox", "falcon", "phi", "starcoder2", "stablelm", "RefinedWeb", "RefinedWebModel"):
        return _older(c, kind, base)
    if kind.startswith("deepseek_v"):
        return _deepseek(c, base)
    vectors = Vectors(qkv=bias, out=bias, mlp=c.flag("mlp_bias"))
    match kind:
        case "qwen2" | "qwen2_moe":
            vectors = Vectors(qkv=True)
        case "qwen3" | "qwen3_moe":
            vectors = Vectors(head_norm=2 * head_dim, qkv=bias, out=bias)
        case "gemma2":
            vectors = Vectors(norms=4, qkv=bias, out=bias)
        case "gemma3" | "gemma3_text":
            vectors = Vectors(norms=4, head_norm=2 * head_dim, qkv=bias, out=bias)
        case "olmo":
            vectors = Vectors(norms=0, final=0, qkv=bias, out=bias)
        case "olmo2":
            vectors = Vectors(head_norm=base.query_width + base.kv_heads * head_dim, qkv=bias, out=bias)
        case "cohere" | "cohere2":
            vectors = Vectors(norms=1, qkv=bias, out=bias)
        case "gpt_oss":
            vectors = Vectors(qkv=True, out=True, other=base.heads)
    fused = kind in ("phi3", "phi4")
    shape = replace(base, vectors=vectors, fused_qkv=fused, fused_mlp=fused)
    count = c.get("num_local_experts", "num_experts", "n_routed_experts")
    return _with_experts(c, kind, shape, count) if count else shape


def _with_experts(c: _Config, kind: str, shape: ModelShape, count: Any) -> ModelShape:
    del count
    number = c.count("num_local_experts", "num_experts", "n_routed_experts")
    width = c.count("moe_intermediate_size", default=shape.intermediate)
    shared = c.count("shared_expert_intermediate_size", default=0, least=0)
    experts = Experts(
        count=number, used=c.count("num_experts_per_tok", "experts_per_token", default=min(2, number)), intermediate=width,
        shared=shared, shared_gate=kind == "qwen2_moe" and shared > 0, fused=kind == "gpt_oss",
    )  # fmt: skip
    if kind == "gpt_oss":
        # Experts and router have biases.
        extra = number * (2 * width + shape.hidden) + number
        shape = replace(shape, vectors=replace(shape.vectors, other=shape.vectors.other + extra))
    return replace(shape, experts=experts)


def _deepseek(c: _Config, base: ModelShape) -> ModelShape:
    latent = Latent(
        kv_rank=c.count("kv_lora_rank"), rope_dim=c.count("qk_rope_head_dim"), nope_dim=c.count("qk_nope_head_dim"),
        value_dim=c.count("v_head_dim"), query_rank=c.get("q_lora_rank") and c.count("q_lora_rank"),
    )  # fmt: skip
    number = c.count("n_routed_experts", "num_local_experts")
    width = c.count("moe_intermediate_size")
    # The router's correction bias of version 3 is a buffer, which checkpoints hold too.
    norms = latent.kv_rank + (latent.query_rank or 0)
    return replace(
        base, latent=latent, vectors=Vectors(other=norms),
        experts=Experts(
            count=number, used=c.count("num_experts_per_tok"), intermediate=width,
            shared=width * c.count("n_shared_experts", default=0, least=0),
            dense_layers=c.count("first_k_dense_replace", default=0, least=0),
        ),
    )  # fmt: skip


def _older(c: _Config, kind: str, base: ModelShape) -> ModelShape:
    """Two matrices in the MLP, or norms with biases."""
    bias = c.flag("use_bias", kind == "starcoder2")
    match kind:
        case "gpt2":
            vectors = Vectors(norm_bias=True, qkv=True, out=True, mlp=True)
            return replace(base, gated=False, fused_qkv=True, positions=c.count("n_positions"), vectors=vectors)
        case "opt":
            vectors = Vectors(norm_bias=True, qkv=True, out=True, mlp=True)
            # Two rows stand before position 0.
            rows = c.count("max_position_embeddings") + 2
            return replace(base, gated=False, positions=rows, vectors=vectors)
        case "gpt_neox":
            on = c.flag("attention_bias", True)
            return replace(base, gated=False, fused_qkv=True, vectors=Vectors(norm_bias=True, qkv=on, out=on, mlp=True))
        case "phi":
            vectors = Vectors(norms=1, norm_bias=True, qkv=True, out=True, mlp=True, head=True)
            return replace(base, gated=False, vectors=vectors)
        case "starcoder2":
            return replace(base, gated=False, vectors=Vectors(norm_bias=True, qkv=bias, out=bias, mlp=bias))
        case "stablelm":
            return replace(base, vectors=Vectors(norm_bias=True, qkv=c.flag("use_qkv_bias")))
    new = c.flag("new_decoder_architecture")
    on = c.flag("bias")
    norms = c.count("num_ln_in_parallel_attn", default=2) if new else 1 if c.flag("parallel_attn", True) else 2
    return replace(
        base,
        gated=False,
        fused_qkv=True,
        copies_kv=new,
        vectors=Vectors(norms=norms, norm_bias=True, qkv=on, out=on, mlp=on),
    )
