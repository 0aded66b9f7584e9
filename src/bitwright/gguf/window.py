"""Sliding windows: how far back blocks see, and which of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import InputError
from bitwright.gguf.settings import Model, Plain, Stored
from bitwright.io.gguf_values import GgufValue, booleans, u32

__all__ = ["Window"]


@dataclass(frozen=True)
class Window(Plain):
    """A sliding window in some blocks.

    period: llama.cpp's default, every so manieth block sees everything. default: the width where the config is silent.
    """

    period: int
    default: int | None = None

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """Its width, and which blocks have it where that is not the usual pattern."""
        if model.get("sliding_window", self.default) is None:
            return {}
        keys = {"attention.sliding_window": u32(model.count("sliding_window", self.default))}
        pattern = self._pattern(model)
        if pattern != self._usual(model.blocks):
            keys["attention.sliding_window_pattern"] = booleans(pattern)
        return keys

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """``sliding_window`` and ``layer_types``."""
        width = stored.integer("attention.sliding_window", 0)
        blocks = stored.model.blocks
        if not width:
            return {"sliding_window": None, "layer_types": ["full_attention"] * blocks}
        pattern = stored.get("attention.sliding_window_pattern")
        if not isinstance(pattern, list) or len(pattern) != blocks:
            same = [bool(pattern)] * blocks if isinstance(pattern, bool) else None
            pattern = same or _every(stored.integer("attention.sliding_window_pattern", self.period), blocks)
        kinds = ["sliding_attention" if near else "full_attention" for near in pattern]
        return {"sliding_window": width, "layer_types": kinds}

    def _usual(self, blocks: int) -> list[bool]:
        return _every(self.period, blocks)

    def _pattern(self, model: Model) -> list[bool]:
        kinds = model.get("layer_types")
        if kinds is None:
            beside = model.get("_sliding_window_pattern", self.period)
            return _every(model.count("sliding_window_pattern", beside), model.blocks)
        known = {"sliding_attention": True, "full_attention": False}
        if (
            not isinstance(kinds, list)
            or len(kinds) != model.blocks
            or not all(isinstance(kind, str) and kind in known for kind in kinds)
        ):
            raise InputError(
                f"{model.where}: faulty 'layer_types'", mend="one of full_attention, sliding_attention for each block"
            )
        return [known[kind] for kind in kinds]


def _every(period: int, blocks: int) -> list[bool]:
    return [block % period < period - 1 for block in range(blocks)]
