"""Scales of a quantized KV cache: the largest keys and values that attention sees on the calibration text."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from bitwright.core.inputs import InputScheme
from bitwright.errors import InputError
from bitwright.model.observe import AttentionObserver

__all__ = ["KvRange"]


class KvRange:
    """Watches the attention of one block."""

    def __init__(self, scheme: InputScheme | None) -> None:
        self._scheme = scheme
        self._largest = torch.zeros(2)
        self._seen = False

    def watching(self) -> AbstractContextManager[object]:
        """While it lasts, attention is watched; does nothing where no KV cache is quantized."""
        return nullcontext() if self._scheme is None else AttentionObserver(self._on_attention)

    def _on_attention(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._seen = True
        for i, tensor in enumerate((key, value)):
            self._largest[i] = torch.maximum(self._largest[i], tensor.abs().amax().float())

    def scales(self, attention: str) -> dict[str, torch.Tensor]:
        """``attention.k_scale`` and ``attention.v_scale``, ``(1,)`` float32: real = code * scale. Raises InputError."""
        assert self._scheme is not None
        if not self._seen:
            raise InputError(
                f"{attention} does not compute its attention through scaled_dot_product_attention",
                mend="drop the kv_cache option",
            )
        found = [self._scheme.fit(-float(amax), float(amax))["input_scale"] for amax in self._largest]
        return {f"{attention}.{part}_scale": scale for part, scale in zip(("k", "v"), found, strict=True)}
