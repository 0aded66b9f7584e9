"""The block types of GGUF as a scheme: legacy (Q4_0 ... Q8_0), K-quants, IQ4_NL and IQ4_XS.

    value = a q - b,   a = d scale_g,   b = dmin min_g        (K-quants; g: groups of 16 or 32 columns in a block of 256)
    value = d (q - middle)   or   d q + m                     (legacy, blocks of 32)
    value = a T[q]                                            (IQ4: a table of 16 values)

d, dmin and m are float16, scales and mins integers of 4 to 8 bits. ``quantize`` gives ggml's own bytes; ``fit`` its parameters, weighed
where weights are given, for methods that then choose the codes. Source: ggml-quants.c (MIT). The lattice types (IQ1, IQ2, IQ3), whose codes
stand for several columns, and the ternary and microscaling blocks are quantized as whole blocks only (``bitwright.blocks``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from bitwright.blocks import codec, fields
from bitwright.blocks.fields import KINDS
from bitwright.blocks.types import BlockType, named
from bitwright.core.scheme import AffineCodec, Codec, Params, ParamSpec, Scheme, TableCodec, Tile
from bitwright.errors import PlanError

__all__ = ["SCHEME", "Ggml"]

_DTYPES: dict[type, torch.dtype] = {np.float16: torch.float16, np.uint8: torch.uint8, np.int8: torch.int8}
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
#: In place of a scale of zero in codecs: whatever is chosen decodes to the offset alone.
_TINY, _TINY_SHARE = 1e-38, 1e-12
#: The smallest float16.
_LEAST = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Ggml(Scheme):
    """type: ``Q4_0``, ``Q4_1``, ``Q5_0``, ``Q5_1``, ``Q8_0``, ``Q2_K`` ... ``Q6_K``, ``IQ4_NL`` or ``IQ4_XS``.

    >>> Ggml(type="Q4_K").levels, Ggml(type="Q4_K").span(1024), Ggml(type="Q6_K").group
    (16, 256, 16)
    """

    kind: ClassVar[str] = "ggml"
    type: str = "Q4_K"

    def __post_init__(self) -> None:
        if self.type not in KINDS:
            name = named(self.type).name
            raise PlanError(
                f"{name} is quantized as whole blocks, not column by column",
                mend="use --method rtn with importance weights, or one of: " + ", ".join(KINDS),
            )

    @property
    def block(self) -> BlockType:
        """Size and number of its blocks."""
        return named(self.type)

    @property
    def tile(self) -> Tile:
        return Tile(1, self.block.values)

    @property
    def levels(self) -> int:
        return KINDS[self.type].levels

    @property
    def group(self) -> int:
        """Columns that share one scale inside a block."""
        return KINDS[self.type].group

    # --- bytes ------------------------------------------------------------------------------------------------------------

    def split(self, blocks: torch.Tensor, shape: tuple[int, int]) -> tuple[Params, torch.Tensor]:
        """Parameters and codes of ``blocks`` ``(rows, row bytes)`` uint8."""
        found, codes = fields.split(blocks.contiguous().numpy(), self.type, shape[1])
        return {name: torch.from_numpy(value) for name, value in found.items()}, torch.from_numpy(codes)

    def join(self, params: Params, codes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Inverse of ``split``: ``(rows, row bytes)`` uint8."""
        found = {name: params[name].contiguous().numpy() for name in fields.shapes(self.type, *shape)}
        return torch.from_numpy(fields.join(found, codes.contiguous().numpy(), self.type))

    def quantize(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None
    ) -> tuple[Params, torch.Tensor]:
        del context
        shape = (w.shape[0], w.shape[1])
        self.grid(shape)
        importance = None if weights is None else weights.float().numpy()
        found = codec.quantize(w.contiguous().numpy(), self.type, importance)
        return self.split(torch.from_numpy(found), shape)

    # --- parameters and codes ---------------------------------------------------------------------------------------------

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        """ggml's own search, which covers the clipping that other schemes search for: ``clip`` changes nothing.

        Groups to which it gives no scale (they are zero, or constant) get the smallest, so that codes mean something everywhere.
        """
        del clip
        params = self.quantize(w, weights=weights, context=context)[0]
        d = torch.where(params["d"] == 0, torch.tensor(_LEAST, dtype=torch.float16), params["d"])
        if "scales" not in params:
            return {**params, "d": d}
        one = 1 + KINDS[self.type].above
        scales = torch.where(
            params["scales"] == one - 1, torch.tensor(one, dtype=params["scales"].dtype), params["scales"]
        )
        return {**params, "d": d, "scales": scales}

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        del clips
        yield self.fit(w, weights=weights, context=context)

    def _steps(self, params: Params) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``a`` and ``b`` of every group, ``(rows, groups)`` float32, in ggml's order of operations."""
        d = params["d"].float()
        if "scales" in params:
            per_block = self.block.values // self.group
            d = d.repeat_interleave(per_block, dim=1)
            a = d * (params["scales"].float() - KINDS[self.type].above)
            if "mins" not in params:
                return a, None
            return a, params["dmin"].float().repeat_interleave(per_block, dim=1) * params["mins"].float()
        return d, -params["m"].float() if "m" in params else None

    def _divisible(self, a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """``a`` without zeros: what takes their place adds nothing to ``b`` that float32 shows."""
        least = torch.full_like(a, _TINY) if b is None else (b.abs() * _TINY_SHARE).clamp_min_(_TINY)
        return torch.where(a == 0, least, a)

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(values.shape[0], -1, self.group)

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        self.grid((w.shape[0], w.shape[1]))
        a, b = self._steps(params)
        x = self._grouped(w)
        if b is not None:
            x = x + b.unsqueeze(-1)
        q = x / self._divisible(a, b).unsqueeze(-1)
        if self.type.startswith("IQ4"):
            table = torch.tensor(_IQ4, dtype=torch.float32)
            middles = (table[1:] + table[:-1]) / 2
            return torch.bucketize(q.contiguous(), middles).to(torch.uint8).view(w.shape)
        q = q.round_() + KINDS[self.type].middle
        return q.clamp_(0, self.levels - 1).to(torch.uint8).view(w.shape)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        a, b = self._steps(params)
        if self.type.startswith("IQ4"):
            q = torch.tensor(_IQ4, dtype=torch.float32)[self._grouped(codes).int()]
        else:
            q = self._grouped(codes).float() - KINDS[self.type].middle
        value = q * a.unsqueeze(-1)
        return (value if b is None else value - b.unsqueeze(-1)).view(codes.shape)

    def choose(self, first: torch.Tensor, a: Params, b: Params) -> Params:
        found = {}
        for name, value in a.items():
            wide = first.repeat_interleave(value.shape[1] // first.shape[1], dim=1)
            found[name] = torch.where(wide, value, b[name])
        return found

    def columns(self, params: Params, start: int, stop: int, shape: tuple[int, int]) -> Params:
        super().columns({}, start, stop, shape)
        blocks = shape[1] // self.block.values
        first, last = start // self.block.values, stop // self.block.values
        return {
            name: value[:, first * (value.shape[1] // blocks) : last * (value.shape[1] // blocks)]
            for name, value in params.items()
        }

    def codec(self, params: Params, shape: tuple[int, int]) -> Codec:
        a, b = self._steps(params)
        a = self._divisible(a, b)
        tile = torch.arange(shape[1]) // self.group
        if self.type.startswith("IQ4"):
            return TableCodec(torch.tensor(_IQ4, dtype=torch.float32), a, tile)
        zero = torch.full_like(a, KINDS[self.type].middle) if b is None else b / a
        return AffineCodec(a, zero, tile, 0, self.levels - 1)

    # --- sizes --------------------------------------------------------------------------------------------------------------

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        self.grid(shape)
        found = fields.shapes(self.type, *shape)
        return tuple(ParamSpec(name, size, _DTYPES[dtype]) for name, (size, dtype) in found.items())

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return self.code_bits + 8 * sum(spec.nbytes for spec in self.param_spec(shape)) / (shape[0] * shape[1])

    def describe(self) -> str:
        return self.type


SCHEME = Ggml
