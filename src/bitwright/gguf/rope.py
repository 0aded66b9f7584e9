"""Rotary position embeddings: base, scaling and factor tensors, from the config's ``rope_parameters`` and back.

GGUF knows four scalings (``rope.scaling.type`` none, linear, yarn, longrope). What the ``llama3`` rule does to each frequency is written as
a tensor instead, ``rope_freqs.weight``, by which llama.cpp divides them; longrope has two such tensors. Sources: transformers'
``modeling_rope_utils.py`` for what the entries mean, llama.cpp's ``llama-context.cpp`` for what is done with the keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError, PlanError
from bitwright.gguf.settings import REQUIRED, Model, Plain, Stored, shortest
from bitwright.io.gguf_values import GgufValue, f32, string, u32
from bitwright.io.text import quoted

__all__ = ["Rope", "llama3_factors"]

Floats = NDArray[np.float32]
_FREQS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_DEFAULT_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True, kw_only=True)
class Rope(Plain):
    """theta: the base where the config is silent. kinds: the scalings that llama.cpp computes for this architecture. dimension: whether
    the count of rotated dimensions is written. partial: its share of a head where the config is silent. local: sliding layers have a base
    of their own. trained: always write the original context length.
    """

    theta: float = 10000.0
    kinds: tuple[str, ...] = ("linear", "yarn")
    dimension: bool = False
    partial: float = 1.0
    local: bool = False
    trained: bool = False

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """The ``rope.*`` keys."""
        rope = self._of(model)
        keys = {"rope.freq_base": f32(rope.number("rope_theta", self.theta))}
        if self.dimension:
            keys["rope.dimension_count"] = u32(self._rotated(model, rope))
        if self.local:
            keys["rope.freq_base_swa"] = f32(self._local_theta(model))
        if self.trained:
            keys["rope.scaling.original_context_length"] = u32(_trained(model, rope))
        return keys | self._scaling(model, rope)

    def generate(self, model: Model) -> Mapping[str, Floats]:
        """Factor tensors of llama3 and longrope."""
        rope = self._of(model)
        kind = _kind(rope)
        if kind not in self.kinds:
            return {}
        if kind == "llama3":
            return {
                _FREQS: llama3_factors(
                    rope, model.head_dim, rope.number("rope_theta", self.theta), _trained(model, rope)
                )
            }
        if kind == "longrope":
            half = self._rotated(model, rope) // 2
            return {_LONG: _factors(rope, "long_factor", half), _SHORT: _factors(rope, "short_factor", half)}
        return {}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """``rope_parameters``, and ``rope_theta`` for readers that know only that."""
        theta = shortest(stored.number("rope.freq_base", 10000.0))
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if self.dimension and self.partial != 1.0:
            rope["partial_rotary_factor"] = stored.integer("rope.dimension_count", 0) / stored.model.head_dim
        rope |= self._unscaled(stored, theta)
        if self.local:
            near = {"rope_type": "default", "rope_theta": shortest(stored.number("rope.freq_base_swa", 10000.0))}
            return {"rope_parameters": {"full_attention": rope, "sliding_attention": near}}
        trained = stored.integer("rope.scaling.original_context_length", stored.integer("context_length", 1))
        beside = {key: rope[key] for key in ("original_max_position_embeddings",) if self.trained and key in rope}
        if self.trained and not beside:
            beside = {"original_max_position_embeddings": trained}
        return {"rope_theta": theta, "rope_parameters": rope, **beside}

    def _of(self, model: Model) -> Model:
        """The entries that hold for full attention, old spellings included, seen like a config."""
        found = model.get("rope_parameters", model.get("rope_scaling", {}))
        if not isinstance(found, Mapping):
            raise InputError(f"{model.where}: 'rope_parameters' is no object", mend="download the config again")
        found = found.get("full_attention", found)
        if not isinstance(found, Mapping):
            raise InputError(f"{model.where}: 'rope_parameters' holds no object", mend="download the config again")
        named = {
            "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rope_pct"),
            "rope_theta": ("rope_theta", "rotary_emb_base"),
        }
        above = {
            name: value
            for name, spellings in named.items()
            if (value := next((model.get(s) for s in spellings if model.get(s) is not None), None)) is not None
        }
        old = {"rope_type": found["type"]} if "type" in found else {}
        return Model(where=model.where, config={**above, **old, **found}, aliases={})

    def _rotated(self, model: Model, rope: Model) -> int:
        return int(rope.number("partial_rotary_factor", self.partial) * model.head_dim)

    def _local_theta(self, model: Model) -> float:
        both = model.get("rope_parameters", {})
        if isinstance(both, Mapping) and isinstance(both.get("sliding_attention"), Mapping):
            near = both["sliding_attention"]
            if near.get("rope_type", "default") != "default":
                raise InputError(
                    f"{model.where}: scaled rotary embeddings in sliding layers", mend="use another layout"
                )
            return Model(where=model.where, config=near, aliases={}).number("rope_theta", 10000.0)
        return model.number("rope_local_base_freq", 10000.0)

    def _scaling(self, model: Model, rope: Model) -> dict[str, GgufValue]:
        kind = _kind(rope)
        if kind == "default":
            return {}
        if kind not in self.kinds:
            able = ", ".join(("default", *self.kinds))
            raise PlanError(
                f"{model.where}: rotary embeddings scaled by {quoted(kind)} cannot be expressed for this architecture in GGUF",
                mend=f"use another layout; possible are: {able}",
            )
        if kind == "llama3":
            return {}
        keys = {"rope.scaling.type": string(kind)}
        if kind == "linear":
            return keys | {"rope.scaling.factor": f32(_factor(rope))}
        trained = _trained(model, rope)
        keys["rope.scaling.original_context_length"] = u32(trained)
        factor = _factor(rope, model.count("max_position_embeddings") / trained)
        if kind == "longrope":
            natural = math.sqrt(1 + math.log(factor) / math.log(max(trained, 2))) if factor > 1 else 1.0
            return keys | {"rope.scaling.attn_factor": f32(rope.number("attention_factor", natural))}
        for name, usual in _DEFAULT_BETAS.items():
            if rope.number(name, usual) != usual:
                raise PlanError(
                    f"{model.where}: yarn with {name} {rope.number(name)}; llama.cpp computes it with {usual:g} alone",
                    mend="use another layout for this model",
                )
        keys["rope.scaling.factor"] = f32(factor)
        natural = _mscale(factor, 1.0)
        wanted = rope.number("attention_factor", natural)
        if rope.get("attention_factor") is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            wanted = _mscale(factor, rope.number("mscale")) / _mscale(factor, rope.number("mscale_all_dim"))
        if wanted != natural:  # llama.cpp multiplies this onto the natural one
            keys["rope.scaling.attn_factor"] = f32(wanted / natural)
        return keys

    def _unscaled(self, stored: Stored, theta: float) -> dict[str, Any]:
        if stored.has(_FREQS):
            return solve_llama3(stored.where, stored.read(_FREQS), theta, stored.integer("context_length", 1))
        kind = stored.get("rope.scaling.type", "linear")
        factor = stored.number("rope.scaling.factor", 0.0)
        trained = stored.integer("rope.scaling.original_context_length", stored.integer("context_length", 1))
        attention = stored.number("rope.scaling.attn_factor", 1.0)
        if kind == "linear":
            return {"rope_type": "linear", "factor": shortest(factor)} if factor else {}
        if kind == "longrope":
            both = {"long_factor": stored.read(_LONG), "short_factor": stored.read(_SHORT)}
            lists = {name: [shortest(float(x)) for x in values] for name, values in both.items()}
            return {
                "rope_type": kind,
                **lists,
                "original_max_position_embeddings": trained,
                "attention_factor": shortest(attention),
            }
        if kind == "yarn":
            full = {"rope_type": kind, "factor": shortest(factor), "original_max_position_embeddings": trained}
            return (
                full
                if attention == 1.0
                else {**full, "attention_factor": float(f"{attention * _mscale(factor, 1.0):.6g}")}
            )
        return {}


def _kind(rope: Model) -> str:
    kind = str(rope.get("rope_type", "default")).lower()
    return {"su": "longrope", "none": "default"}.get(kind, kind)


def _trained(model: Model, rope: Model) -> int:
    """The context length before scaling: among the rope entries, else in the config, else the context length itself."""
    beside = model.get("original_max_position_embeddings", model.get("max_position_embeddings"))
    return rope.count("original_max_position_embeddings", beside)


def _mscale(factor: float, share: float) -> float:
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(rope: Model, name: str, half: int) -> Floats:
    found = rope.get(name)
    if (
        not isinstance(found, list)
        or len(found) != half
        or not all(type(one) in (int, float) and 0 < one < 1e30 for one in found)
    ):
        raise InputError(f"{rope.where}: {quoted(name)} is not {half} numbers", mend="check the config")
    return np.asarray(found, np.float32)


def _factor(rope: Model, default: Any = REQUIRED) -> float:
    """``factor``, which must be positive."""
    found = rope.number("factor", default)
    if found <= 0:
        raise InputError(f"{rope.where}: rotary embeddings scaled by {found:g}", mend="check the config")
    return found


def llama3_factors(rope: Model, head_dim: int, theta: float, trained: int) -> Floats:
    """By what each frequency is divided: ``(head_dim / 2,)``. 1 for short waves, ``factor`` for long ones, smooth in between."""
    return _llama3(
        head_dim, theta, _factor(rope), rope.number("low_freq_factor"), rope.number("high_freq_factor"), trained
    )


def _llama3(head_dim: int, theta: float, factor: float, low: float, high: float, trained: float) -> Floats:
    # float32 throughout, as transformers computes the frequencies
    if not 1 < theta < 1e30 or not all(0 < number < 1e30 for number in (factor, low, high, trained)) or high == low:
        raise InputError("rotary embeddings with numbers that give no frequencies", mend="check the config")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float32(theta), exponents)
    waves = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(trained) / waves - np.float32(low)) / np.float32(high - low)
    between = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    return np.where(waves < trained / high, 1, np.where(waves > trained / low, factor, between)).astype(np.float32)


def _line(shortness: NDArray[np.float64], values: NDArray[np.float64], factor: float) -> list[tuple[float, float]]:
    """(high_freq_factor, trained length) through the values between: ``smooth`` is a line over one by the wavelength.

    Its slope is trained / (high - 1), and it is -1 / (high - 1) where the line begins.
    """
    smooth = (1 / values - 1 / factor) / (1 - 1 / factor)
    spread = shortness - shortness.mean()
    if not spread.any():
        return []
    slope = float((spread * smooth).sum() / (spread * spread).sum())
    begin = float(smooth.mean() - slope * shortness.mean())
    return [] if begin >= 0 else [(round(1 - 1 / begin, 3), float(round(slope / -begin)))]


def solve_llama3(where: str, factors: Floats, theta: float, context: int) -> dict[str, Any]:
    """The llama3 entries that give these factors. Only ratios matter, so ``low_freq_factor`` is 1.

    Raises InputError where no such entries do.
    """
    size = 2 * len(factors)
    factor = float(factors.max(initial=0))
    candidates: list[tuple[float, float]] = []
    if np.isfinite(factors).all() and factors.min(initial=1) > 0 and factor > 1 and 1 < theta < 1e30:
        candidates = [(4.0, 8192.0), (4.0, float(context))]
        middle = (factors > 1) & (factors < factor)
        waves = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
        if int(middle.sum()) >= 2:
            candidates += _line(1 / waves[middle], factors[middle].astype(np.float64), factor)
    for high, trained in candidates:
        if (
            high > 1
            and trained >= 1
            and np.allclose(_llama3(size, theta, factor, 1.0, high, trained), factors, rtol=1e-4, atol=0)
        ):
            return {
                "rope_type": "llama3",
                "factor": shortest(factor),
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(trained),
            }
    raise InputError(f"{where}: no llama3 scaling gives {_FREQS}", mend="such a file cannot be converted back")
