"""8-bit floats: ``w = fp8(code) * scale``, one scale per tensor, output channel or block.

``scale = max|w| / largest`` with largest 448 (e4m3) or 57344 (e5m2), and ``code = fp8(w / scale)``, rounded to nearest and saturating
(arXiv:2209.05433). A code is the raw byte of the float8. The convention, a stored scale that multiplies, is that of compressed-tensors
and of ``weight_scale_inv`` in fine-grained FP8 checkpoints (arXiv:2412.19437, section 3.3: blocks of 128 x 128).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from bitwright.core.inputs import InputScheme
from bitwright.core.scheme import Params, ParamSpec, Scheme, TableCodec, Tile
from bitwright.core.tensor import parse_dtype
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.schemes._floats import DTYPES, LARGEST, decode_element, encode_element, finite, table

__all__ = ["SCHEME", "Float8"]

#: The smallest scale of each storage dtype; a smaller one could overflow ``w / scale``. float16: its smallest subnormal.
_SMALLEST = {"float32": 2.0**-100, "bfloat16": 2.0**-100, "float16": 2.0**-24}


@dataclass(frozen=True, slots=True)
class Shared:
    """What tensors under one scale have in common: their largest magnitude, and how many they are."""

    amax: float
    tensors: int


@dataclass(frozen=True, kw_only=True)
class Float8(Scheme):
    """float8 weights.

    element: "e4m3" (range 448, 3 mantissa bits) or "e5m2" (range 57344, 2 mantissa bits). granularity: what shares a scale,
    "tensor" (q, k and v, or gate and up, then share one), "channel" (an output row) or "block". block: rows and columns of a block;
    the last ones may be short. scale_dtype: float32, bfloat16 or float16; codes are chosen with the scale already rounded to it.
    """

    kind: ClassVar[str] = "float8"

    element: Literal["e4m3", "e5m2"] = "e4m3"
    granularity: Literal["tensor", "channel", "block"] = "channel"
    block: tuple[int, int] = (128, 128)
    scale_dtype: str = "float32"
    inputs: InputScheme | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))  # JSON knows lists alone
        if self.element not in DTYPES:
            raise PlanError(f"float8 element '{self.element}' is unknown", mend="use e4m3 or e5m2")
        if self.granularity not in ("tensor", "channel", "block"):
            raise PlanError(f"granularity '{self.granularity}' is unknown", mend="use tensor, channel or block")
        if len(self.block) != 2 or not all(isinstance(side, int) and side > 0 for side in self.block):
            raise PlanError(f"block {self.block} is not a pair of positive numbers", mend="use [128, 128]")
        if self.scale_dtype not in _SMALLEST:
            raise PlanError(f"scale_dtype '{self.scale_dtype}' is unknown", mend="use float16, bfloat16 or float32")

    @property
    def shares(self) -> bool:
        return self.granularity == "tensor"

    @property
    def tile(self) -> Tile:
        match self.granularity:
            case "tensor":
                return Tile(None, None)
            case "channel":
                return Tile(1, None)
            case _:
                return Tile(*self.block)

    @property
    def levels(self) -> int:
        return 256

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Tiles down and across; the last blocks may be short."""
        rows, columns = shape
        if rows == 0 or columns == 0:
            raise PlanError(f"a weight of shape {shape} is empty", mend="keep this tensor")
        tile_rows = self.tile.rows or rows
        return -(-rows // tile_rows), -(-columns // self.span(columns))

    def prepare(self, tensors: Sequence[torch.Tensor]) -> Shared | None:
        """The largest magnitude of all tensors where one scale serves them, else None."""
        if self.granularity != "tensor" or not tensors:
            return None
        return Shared(max(float(tensor.abs().max()) for tensor in tensors), len(tensors))

    def _amax(self, w: torch.Tensor) -> torch.Tensor:
        """The largest magnitude of every tile: ``(tile rows, tile columns)``. NumericError where it is not finite."""
        rows, columns = w.shape
        down, across = self.grid((rows, columns))
        size = w.abs()
        match self.granularity:
            case "tensor":
                return finite(size.max().view(1, 1))
            case "channel":
                return finite(size.amax(1, keepdim=True))
        height, width = self.block
        size = functional.pad(size, (0, across * width - columns, 0, down * height - rows))
        return finite(size.view(down, height, across, width).amax((1, 3)))

    def _storable(self, scale: torch.Tensor) -> torch.Tensor:
        stored = scale.clamp_min(_SMALLEST[self.scale_dtype]).to(parse_dtype(self.scale_dtype))
        if not bool(torch.isfinite(stored).all()):
            raise NumericError(
                f"a scale of {float(scale.max()):.4g} overflows {self.scale_dtype}", mend="use scale_dtype float32"
            )
        return stored

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        return self._from_amax(self._range(w, context), 1.0 if self._fixed(context) else clip)

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        amax = self._range(w, context)
        # Tensors that share a scale are searched one by one, so each must come to the same one.
        return (self._from_amax(amax, clip) for clip in (clips[:1] if self._fixed(context) else clips))

    def _fixed(self, context: Any) -> bool:
        return isinstance(context, Shared) and context.tensors > 1

    def _range(self, w: torch.Tensor, context: Any) -> torch.Tensor:
        if isinstance(context, Shared):
            return finite(torch.full((1, 1), context.amax, device=w.device))
        return self._amax(w)

    def _from_amax(self, amax: torch.Tensor, clip: float) -> Params:
        return {"scale": self._storable(amax * clip / LARGEST[self.element])}

    def _expand(self, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Scales in float32 that broadcast against the weight."""
        scale = scale.float()
        if self.granularity == "block":
            scale = scale.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]
        return scale

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        return encode_element(w / self._expand(params["scale"], *w.shape), self.element)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return decode_element(codes, self.element) * self._expand(params["scale"], *codes.shape)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """The scale that minimises the weighted squared error of these codes; one shared by several tensors stays as it is."""
        if self.granularity == "tensor":
            return params
        values = decode_element(codes, self.element)
        weighed = values if weights is None else values * weights.float()
        return self.refit_sums(self._total(weighed * w), self._total(weighed * values), params)

    def refit_sums(self, above: torch.Tensor, below: torch.Tensor, params: Params) -> Params:
        if self.granularity == "tensor":
            return params
        best = torch.where((below > 0) & (above > 0), above / below, params["scale"].float())
        return {"scale": self._storable(best)}

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over every tile of a channel-wise or block-wise scheme."""
        rows, columns = values.shape
        if self.granularity == "channel":
            return values.sum(1, keepdim=True)
        down, across = self.grid((rows, columns))
        height, width = self.block
        values = functional.pad(values, (0, across * width - columns, 0, down * height - rows))
        return values.view(down, height, across, width).sum((1, 3))

    def columns(self, params: Params, start: int, stop: int, shape: tuple[int, int]) -> Params:
        span = self.span(shape[1])
        if start % span or (stop % span and stop != shape[1]):
            raise InputError(f"columns {start}:{stop} do not lie on tile boundaries of {span}")
        return {"scale": params["scale"][:, start // span : -(-stop // span)]}

    def codec(self, params: Params, shape: tuple[int, int]) -> TableCodec:
        rows, columns = shape
        scale = params["scale"].float()
        if self.granularity == "block":
            scale = scale.repeat_interleave(self.block[0], 0)[:rows]
        values, codes = table(self.element)
        tile = torch.arange(columns) // self.span(columns)
        return TableCodec(values, scale.expand(rows, -1), tile, codes)

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        return (ParamSpec("scale", self.grid(shape), parse_dtype(self.scale_dtype)),)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return 8 + 8 * self.param_spec(shape)[0].nbytes / (shape[0] * shape[1])

    def describe(self) -> str:
        where = "x".join(map(str, self.block)) if self.granularity == "block" else self.granularity
        return f"fp8 {self.element} {where}"


SCHEME = Float8
