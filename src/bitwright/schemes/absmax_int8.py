"""Row-wise int8 weights of LLM.int8: ``w = q * (absmax / 127)`` with one magnitude per output row (arXiv:2208.07339, section 2.1).

As bitsandbytes 0.50 stores them: the weight is cast to float16 first, ``absmax = max|w|`` of a row, ``q = round(w * (127 / absmax))`` in
float32, half to even. Codes are ``q + 128``; -128 is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.scheme import AffineCodec, Params, ParamSpec, Scheme, Tile
from bitwright.errors import NumericError

__all__ = ["SCHEME", "AbsmaxInt8"]

_ZERO = 128


@dataclass(frozen=True, kw_only=True)
class AbsmaxInt8(Scheme):
    """int8 with a float32 magnitude per row. inputs: how the layer's inputs are quantized; LLM.int8 has int8 tokens and a threshold."""

    kind: ClassVar[str] = "absmax-int8"

    inputs: InputScheme | None = None

    @property
    def tile(self) -> Tile:
        return Tile(1, None)

    @property
    def levels(self) -> int:
        return 256

    @staticmethod
    def _half(w: torch.Tensor) -> torch.Tensor:
        """The weight rounded to float16. NumericError where it does not fit."""
        half = w.to(torch.float16).float()
        if not bool(torch.isfinite(half).all()):
            raise NumericError(
                f"a weight of {float(w.abs().max()):.4g} overflows float16, which LLM.int8 casts weights to",
                mend="keep this layer, or use scheme affine with 8 bits per channel",
            )
        return half

    def _absmax(self, w: torch.Tensor) -> torch.Tensor:
        self.grid((w.shape[0], w.shape[1]))
        return self._half(w).abs().amax(1, keepdim=True)

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        return {"absmax": self._absmax(w) * clip}

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        absmax = self._absmax(w)
        return ({"absmax": absmax * clip} for clip in clips)

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        absmax = params["absmax"]
        inverse = torch.where(absmax > 0, 127.0 / absmax, 0.0)
        # A subnormal magnitude has an infinite inverse, and 0 times that is not a number.
        steps = (self._half(w) * inverse.clamp_max(torch.finfo(torch.float32).max)).round_()
        return (steps.clamp_(-127, 127) + _ZERO).to(torch.uint8)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return (codes.float() - _ZERO) * (params["absmax"] / 127)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """The magnitude that minimises ``sum_i weights_i (w_i - q_i absmax / 127)²``: least squares, weighed."""
        steps = codes.float() - _ZERO
        weighed = steps if weights is None else steps * weights.float()
        return self.refit_sums((weighed * w).sum(1, keepdim=True), (weighed * steps).sum(1, keepdim=True), params)

    def refit_sums(self, above: torch.Tensor, below: torch.Tensor, params: Params) -> Params:
        return {"absmax": torch.where((below > 0) & (above > 0), above / below * 127, params["absmax"])}

    def codec(self, params: Params, shape: tuple[int, int]) -> AffineCodec:
        scale = params["absmax"] / 127
        scale = torch.where(scale > 0, scale, 2.0**-100)  # a row of zeros: kernels divide by the scale
        tile = torch.zeros(shape[1], dtype=torch.int64)
        return AffineCodec(scale, torch.full_like(scale, _ZERO), tile, 1, 255)

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        return (ParamSpec("absmax", self.grid(shape), torch.float32),)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return 8 + 32 / shape[1]

    def describe(self) -> str:
        return "int8 absmax row"


SCHEME = AbsmaxInt8
