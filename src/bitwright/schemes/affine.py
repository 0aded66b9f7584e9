"""Affine integers: ``w = (code - zero) * scale``, symmetric or asymmetric, per tensor, channel or group.

Symmetric codes have ``zero = 2^(bits-1)``. Two conventions of symmetric range exist in the field:

* ``full``: codes ``0 .. 2^bits - 1`` stand for ``-2^(bits-1) .. 2^(bits-1) - 1`` and
  ``scale = 2 max|w| / (2^bits - 1)`` (GPTQ checkpoints, compressed-tensors);
* ``narrow``: the most negative code is unused, ``scale = max|w| / (2^(bits-1) - 1)`` (int8 matmul kernels, TensorRT).

Asymmetric: ``scale = (max - min) / (2^bits - 1)`` with ``min <= 0 <= max`` and ``zero = round(-min / scale)``
(arXiv:1712.05877, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.scheme import AffineCodec, Params, ParamSpec, Scheme, Tile, tile_of_columns
from bitwright.core.tensor import parse_dtype
from bitwright.errors import NumericError, PlanError

__all__ = ["SCHEME", "Affine"]

Granularity = Literal["group", "channel", "tensor"]

#: The smallest scale of each storage dtype. float16: its smallest subnormal; what subnormals lose in precision is less
#: than what the smallest normal number (2^-14) loses in resolution: at 8 bits it is too coarse for tiles with max|w| <
#: 0.0078. Others: 2^-100, because dividing by a smaller one could overflow.
_SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-100, torch.float32: 2.0**-100}


@dataclass(frozen=True, kw_only=True)
class Affine(Scheme):
    """Affine integers of 2, 3, 4, 5, 6 or 8 bits.

    group_size: columns per group (``granularity="group"`` only). scale_dtype: storage dtype of the scales, one of
    float16, bfloat16, float32; codes are chosen with the scale already rounded to it. zero_min: smallest allowed zero
    point of an asymmetric scheme (1 where a layout cannot store 0).
    """

    kind: ClassVar[str] = "affine"

    bits: int = 4
    symmetric: bool = True
    granularity: Granularity = "group"
    group_size: int = 128
    scale_dtype: str = "float16"
    symmetric_range: Literal["full", "narrow"] = "full"
    zero_min: int = 0
    inputs: InputScheme | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8):
            raise PlanError(f"affine schemes have 2, 3, 4, 5, 6 or 8 bits, not {self.bits}", mend="choose one of these")
        if self.granularity not in ("group", "channel", "tensor"):
            raise PlanError(f"granularity '{self.granularity}' is unknown", mend="use group, channel or tensor")
        if self.granularity == "group" and self.group_size < 1:
            raise PlanError(f"group_size {self.group_size} is not positive", mend="use 128, or granularity channel")
        if self.scale_dtype not in ("float16", "bfloat16", "float32"):
            raise PlanError(f"scale_dtype '{self.scale_dtype}' is unknown", mend="use float16, bfloat16 or float32")
        if not 0 <= self.zero_min < 2**self.bits:
            raise PlanError(f"zero_min {self.zero_min} is outside the codes", mend="use 0 or 1")

    @property
    def tile(self) -> Tile:
        match self.granularity:
            case "group":
                return Tile(1, self.group_size)
            case "channel":
                return Tile(1, None)
            case _:
                return Tile(None, None)

    @property
    def levels(self) -> int:
        return int(2**self.bits)

    @property
    def low(self) -> int:
        """Smallest code in use: 0, or 1 in the narrow symmetric range."""
        return int(self.symmetric and self.symmetric_range == "narrow")

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return int(2 ** (self.bits - 1))

    def _tiles(self, w: torch.Tensor) -> torch.Tensor:
        """``(tile rows, tile columns, elements)`` view of a weight."""
        down, across = self.grid((w.shape[0], w.shape[1]))
        return w.reshape(1, 1, -1) if self.granularity == "tensor" else w.reshape(down, across, -1)

    def _storable(self, scale: torch.Tensor) -> torch.Tensor:
        """Positive scales, no smaller than stores well, rounded to the storage dtype; NumericError on overflow."""
        dtype = parse_dtype(self.scale_dtype)
        stored = scale.clamp_min(_SMALLEST[dtype]).to(dtype)
        if not bool(torch.isfinite(stored).all()):
            worst = float(scale.max())
            raise NumericError(
                f"a scale of {worst:.4g} overflows {self.scale_dtype}",
                mend="use scale_dtype bfloat16 or float32 with a layout that allows it",
            )
        return stored

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        return self._from_range(*self._range(w), clip)

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        low, high = self._range(w)
        return (self._from_range(low, high, clip) for clip in clips)

    def _range(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest value of every tile, zero included: two ``(tile rows, tile columns)``."""
        low, high = torch.aminmax(self._tiles(w), dim=-1)
        return low.clamp_max_(0.0), high.clamp_min_(0.0)

    def _from_range(self, low: torch.Tensor, high: torch.Tensor, clip: float) -> Params:
        if self.symmetric:
            steps = self.middle - 1 if self.low else (self.levels - 1) / 2
            return {"scale": self._storable(torch.maximum(-low, high) * (clip / steps))}
        low, high = low * clip, high * clip
        if self.zero_min:
            # zero >= zero_min needs low <= -zero_min * scale: widen the range below rather than clip the top.
            steps = self.levels - 1
            low = torch.minimum(low, -high * (self.zero_min / (steps - self.zero_min)))
        scale = self._storable((high - low) / (self.levels - 1))
        zero = torch.round(-low / scale.float()).clamp_(self.zero_min, self.levels - 1)
        return {"scale": scale, "zero": zero.to(torch.uint8)}

    def _expand(self, value: torch.Tensor) -> torch.Tensor:
        """Per-tile parameters as ``(tile rows, tile columns, 1)`` float32 against ``_tiles``."""
        return value.float().unsqueeze(-1)

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        shape = (w.shape[0], w.shape[1])
        codes = self._tiles(w) / self._expand(params["scale"])
        codes += self._expand(params["zero"]) if "zero" in params else float(self.middle)
        return codes.round_().clamp_(self.low, self.levels - 1).to(torch.uint8).view(shape)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        shape = (codes.shape[0], codes.shape[1])
        values = self._tiles(codes.float())
        values = values - (self._expand(params["zero"]) if "zero" in params else float(self.middle))
        return (values * self._expand(params["scale"])).view(shape)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """The scale that minimises ``sum_i weights_i (w_i - (code_i - zero) scale)^2``: least squares, weighed."""
        shape = (w.shape[0], w.shape[1])
        steps = self._tiles(codes.float())
        steps = steps - (self._expand(params["zero"]) if "zero" in params else float(self.middle))
        weighed = steps if weights is None else steps * self._tiles(weights.float().expand(shape))
        return self.refit_sums((weighed * self._tiles(w)).sum(-1), (weighed * steps).sum(-1), params)

    def refit_sums(self, above: torch.Tensor, below: torch.Tensor, params: Params) -> Params:
        best = torch.where((below > 0) & (above > 0), above / below, params["scale"].float())
        return {**params, "scale": self._storable(best)}

    def codec(self, params: Params, shape: tuple[int, int]) -> AffineCodec:
        rows, columns = shape
        scale = params["scale"].float().expand(rows, -1)
        zero = params["zero"].float().expand(rows, -1) if "zero" in params else torch.full_like(scale, self.middle)
        return AffineCodec(scale, zero, tile_of_columns(columns, self.span(columns)), self.low, self.levels - 1)

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        grid = self.grid(shape)
        scale = ParamSpec("scale", grid, parse_dtype(self.scale_dtype))
        return (scale,) if self.symmetric else (scale, ParamSpec("zero", grid, torch.uint8))

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        down, across = self.grid(shape)
        per_tile = 8 * parse_dtype(self.scale_dtype).itemsize + (0 if self.symmetric else self.bits)
        return self.bits + down * across * per_tile / (shape[0] * shape[1])

    def describe(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        where = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"int{self.bits} {kind} {where}"


SCHEME = Affine
