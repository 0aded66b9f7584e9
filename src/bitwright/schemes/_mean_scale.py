"""What ternary and binary schemes share: a few fixed steps times one scale a tile, the scale being a mean of magnitudes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bitwright.core.scheme import Params, ParamSpec, Scheme, TableCodec, Tile, tile_of_columns
from bitwright.core.tensor import parse_dtype
from bitwright.errors import NumericError, PlanError

__all__ = ["Granularity", "MeanScale"]

Granularity = Literal["group", "channel", "tensor"]


@dataclass(frozen=True, kw_only=True)
class MeanScale(Scheme):
    """``w = steps[code] * scale`` with ``scale = mean|w|`` of the tile.

    granularity: "group" (``group_size`` columns), "channel" (a row) or "tensor"; scale_dtype: float16, bfloat16 or float32. A tile of
    zeros has scale 0 and decodes to zeros.
    """

    granularity: Granularity = "group"
    group_size: int = 64
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.granularity not in ("group", "channel", "tensor"):
            raise PlanError(f"granularity '{self.granularity}' is unknown", mend="use group, channel or tensor")
        if self.granularity == "group" and self.group_size < 1:
            raise PlanError(f"group_size {self.group_size} is not positive", mend="use 64, or granularity channel")
        if self.scale_dtype not in ("float16", "bfloat16", "float32"):
            raise PlanError(f"scale_dtype '{self.scale_dtype}' is unknown", mend="use float16, bfloat16 or float32")

    @property
    @abstractmethod
    def steps(self) -> tuple[float, ...]:
        """What the codes stand for, over the scale; ascending."""

    @property
    def levels(self) -> int:
        return len(self.steps)

    @property
    def tile(self) -> Tile:
        match self.granularity:
            case "group":
                return Tile(1, self.group_size)
            case "channel":
                return Tile(1, None)
            case _:
                return Tile(None, None)

    def _tiles(self, w: torch.Tensor) -> torch.Tensor:
        """``(tile rows, tile columns, elements)`` view of a weight."""
        down, across = self.grid((w.shape[0], w.shape[1]))
        return w.reshape(1, 1, -1) if self.granularity == "tensor" else w.reshape(down, across, -1)

    def _storable(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales in their storage dtype; NumericError on overflow."""
        stored = scale.to(parse_dtype(self.scale_dtype))
        if not bool(torch.isfinite(stored).all()):
            raise NumericError(
                f"a scale of {float(scale.max()):.4g} overflows {self.scale_dtype}",
                mend="use scale_dtype bfloat16 or float32 with a layout that allows it",
            )
        return stored

    def _mean(self, w: torch.Tensor) -> torch.Tensor:
        """``mean|w|`` of every tile, summed in float64: ``(tile rows, tile columns)`` float32."""
        return self._tiles(w).abs().mean(-1, dtype=torch.float64).float()

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        return {"scale": self._storable(self._mean(w) * clip)}

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        steps = torch.tensor(self.steps)
        borders = ((steps[1:] + steps[:-1]) / 2).tolist()
        tiles, scale = self._tiles(w), params["scale"].float().unsqueeze(-1)
        codes = torch.zeros(tiles.shape, dtype=torch.uint8)
        for border in borders:
            # Compared without a division: a tile of zeros has scale 0.
            codes += tiles > border * scale
        return codes.view(w.shape)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        values = self._tiles(torch.tensor(self.steps)[codes.long()])
        return (values * params["scale"].float().unsqueeze(-1)).view(codes.shape)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """The scale that minimises ``sum_i weights_i (w_i - step_i scale)^2``: least squares, weighed."""
        steps = self._tiles(torch.tensor(self.steps)[codes.long()])
        weighed = steps if weights is None else steps * self._tiles(weights.float().expand(w.shape))
        return self.refit_sums((weighed * self._tiles(w)).sum(-1), (weighed * steps).sum(-1), params)

    def refit_sums(self, above: torch.Tensor, below: torch.Tensor, params: Params) -> Params:
        best = torch.where((below > 0) & (above > 0), above / below, params["scale"].float())
        return {"scale": self._storable(best)}

    def codec(self, params: Params, shape: tuple[int, int]) -> TableCodec:
        """A table. A scale may be 0 (a tile of zeros): whatever code is chosen there, it decodes to 0."""
        rows, columns = shape
        scale = params["scale"].float().expand(rows, -1)
        return TableCodec(torch.tensor(self.steps), scale, tile_of_columns(columns, self.span(columns)))

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        return (ParamSpec("scale", self.grid(shape), parse_dtype(self.scale_dtype)),)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        down, across = self.grid(shape)
        return self.code_bits + down * across * 8 * parse_dtype(self.scale_dtype).itemsize / (shape[0] * shape[1])

    def describe(self) -> str:
        return f"{self.kind} {f'g{self.group_size}' if self.granularity == 'group' else self.granularity}"
