"""Microscaling: small floats in groups whose scales are 8-bit floats themselves.

=========== ========= ===== ======================== ============================================
element     values    group scale of a group         above the groups
=========== ========= ===== ======================== ============================================
``mxfp4``   e2m1      32    e8m0, a power of two     nothing
``mxfp8``   e4m3      32    e8m0, a power of two     nothing
``nvfp4``   e2m1      16    e4m3                     one float32 *divisor* G, shared by fused layers
=========== ========= ===== ======================== ============================================

MX (OCP Microscaling Formats 1.0): ``w = value * 2^(s - 127)``. The exponent is that of the group's largest magnitude, less that of the
largest element (2 for e2m1, 8 for e4m3). The specification cuts the mantissa off (section 6.3); compressed-tensors rounds a mantissa
of 1.75 and more up, because 7 (in steps of the scale) would be cut to 6, and so does this.

NVFP4: ``G = 448 * 6 / max|W|``, ``s = e4m3(max|group| / 6 * G)``, ``w = value * s / G``, as compressed-tensors writes it. A group whose
scale rounds to 0 (max|group| below a 2^19th of max|W|) gets the scale 0.125 and decodes to zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.scheme import Params, ParamSpec, Scheme, TableCodec, Tile, tile_of_columns
from bitwright.errors import InputError, PlanError
from bitwright.schemes._floats import LARGEST, decode_e8m0, decode_element, encode_element, finite, table

__all__ = ["SCHEME", "Microscaling"]

#: element -> values, group size, exponent of the largest value
_KINDS = {"mxfp4": ("e2m1", 32, 2), "mxfp8": ("e4m3", 32, 8), "nvfp4": ("e2m1", 16, 2)}
#: e4m3 code of 0.125, which takes the place of a scale of 0
_EIGHTH = 0x20
_E4M3_LARGEST = LARGEST["e4m3"]


@dataclass(frozen=True, kw_only=True)
class Microscaling(Scheme):
    """MXFP4, MXFP8 and NVFP4 weights. element: which of them; it fixes the group size.

    Parameters: ``scale (rows, groups)`` uint8, the raw e8m0 or e4m3 byte; NVFP4 also ``global_scale (1, 1)`` float32, the divisor G.
    Loose parameters of NVFP4 hold G once per group.
    """

    kind: ClassVar[str] = "microscaling"

    element: Literal["mxfp4", "mxfp8", "nvfp4"] = "mxfp4"
    inputs: InputScheme | None = None

    def __post_init__(self) -> None:
        if self.element not in _KINDS:
            raise PlanError(f"microscaling element '{self.element}' is unknown", mend="use mxfp4, mxfp8 or nvfp4")

    @property
    def values(self) -> str:
        """The float that a code stands for: "e2m1" or "e4m3"."""
        return _KINDS[self.element][0]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return _KINDS[self.element][1]

    @property
    def shares(self) -> bool:
        return self.element == "nvfp4"

    @property
    def two_level(self) -> bool:
        return self.element == "nvfp4"

    @property
    def tile(self) -> Tile:
        return Tile(1, self.group)

    @property
    def levels(self) -> int:
        return 16 if self.values == "e2m1" else 256

    def prepare(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """NVFP4: the divisor of all tensors together, ``(1, 1)`` float32. Else None."""
        if self.element != "nvfp4" or not tensors:
            return None
        return _divisor(torch.stack([tensor.abs().max().float() for tensor in tensors]).max().view(1, 1))

    def _amax(self, w: torch.Tensor) -> torch.Tensor:
        down, across = self.grid((w.shape[0], w.shape[1]))
        return finite(w.reshape(down, across, self.group).abs().amax(-1))

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        amax = self._amax(w)
        return self._from_amax(amax, context, clip)

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        amax = self._amax(w)
        if self.element == "mxfp8":
            clips = clips[:1]  # e4m3 looks the same in every octave, so another power of two gains nothing
        elif self.element == "mxfp4" and len(clips) > 1:
            # Between powers of two there is nothing to try; the next larger one clips no value.
            clips = (clips[0], max(min(clips), 0.5), 2.0)
        return (self._from_amax(amax, context, clip) for clip in clips)

    def _from_amax(self, amax: torch.Tensor, context: Any, clip: float) -> Params:
        if self.element != "nvfp4":
            return {"scale": self._exponents(amax * clip)}
        divisor = context if isinstance(context, torch.Tensor) else _divisor(amax.max().view(1, 1))
        return _nvfp4(amax * clip / LARGEST["e2m1"], divisor)

    def _exponents(self, amax: torch.Tensor) -> torch.Tensor:
        """e8m0 bytes for groups of this largest magnitude."""
        mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1)
        exponent = exponent - 1 + (mantissa >= 0.875).to(exponent.dtype)
        stored = (exponent - _KINDS[self.element][2] + 127).clamp(0, 254)
        return torch.where(amax > 0, stored, 0).to(torch.uint8)

    def finish(self, params: Params, shape: tuple[int, int]) -> Params:
        """One divisor for the whole weight; scales fitted under several ones are expressed anew under the smallest."""
        if self.element != "nvfp4":
            return params
        divisor = params["global_scale"]
        smallest = divisor.min().view(1, 1)
        if bool((divisor == smallest).all()):
            return {"scale": params["scale"], "global_scale": smallest}
        stored = _nvfp4(self._step(params), smallest)
        return {"scale": stored["scale"], "global_scale": smallest}

    def _step(self, params: Params) -> torch.Tensor:
        """The scale of each group: ``(rows, groups)`` float32."""
        if self.element == "nvfp4":
            return decode_element(params["scale"], "e4m3") / params["global_scale"]
        return decode_e8m0(params["scale"])

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        values = w.reshape(w.shape[0], -1, self.group) / self._step(params).unsqueeze(-1)
        return encode_element(values, self.values).view(w.shape)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        values = decode_element(codes, self.values).view(codes.shape[0], -1, self.group)
        return (values * self._step(params).unsqueeze(-1)).view(codes.shape)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """The storable scale nearest to the least-squares one of these codes."""
        values = decode_element(codes, self.values)
        weighed = values if weights is None else values * weights.float()
        above, below = (x.view(w.shape[0], -1, self.group).sum(-1) for x in (weighed * w, weighed * values))
        return self.refit_sums(above, below, params)

    def refit_sums(self, above: torch.Tensor, below: torch.Tensor, params: Params) -> Params:
        best = torch.where((below > 0) & (above > 0), above / below, self._step(params))
        if self.element == "nvfp4":
            return _nvfp4(best, params["global_scale"])
        # The error is quadratic in the scale, so the nearer power of two is the better one: from 1.5 on the larger.
        mantissa, exponent = torch.frexp(best)
        return {"scale": (exponent - 1 + (mantissa >= 0.75).to(exponent.dtype) + 127).clamp(0, 254).to(torch.uint8)}

    def columns(self, params: Params, start: int, stop: int, shape: tuple[int, int]) -> Params:
        if start % self.group or stop % self.group:
            raise InputError(f"columns {start}:{stop} do not lie on tile boundaries of {self.group}")
        part = slice(start // self.group, stop // self.group)
        return {name: value if value.shape == (1, 1) else value[:, part] for name, value in params.items()}

    def codec(self, params: Params, shape: tuple[int, int]) -> TableCodec:
        values, codes = table(self.values)
        return TableCodec(values, self._step(params), tile_of_columns(shape[1], self.group), codes)

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        scale = ParamSpec("scale", self.grid(shape), torch.uint8)
        if self.element != "nvfp4":
            return (scale,)
        return (scale, ParamSpec("global_scale", (1, 1), torch.float32))

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return self.code_bits + 8 * sum(p.nbytes for p in self.param_spec(shape)) / (shape[0] * shape[1])

    def describe(self) -> str:
        return self.element


def _divisor(amax: torch.Tensor) -> torch.Tensor:
    """G of NVFP4: 448 * 6 / amax; 1 where that overflows."""
    divisor = _E4M3_LARGEST * LARGEST["e2m1"] / finite(amax)
    return torch.where(torch.isfinite(divisor), divisor, 1.0)


def _nvfp4(step: torch.Tensor, divisor: torch.Tensor) -> Params:
    """Loose parameters for groups of these scales ``(rows, groups)``."""
    codes = encode_element(step * divisor, "e4m3")
    return {"scale": torch.where(codes == 0, _EIGHTH, codes), "global_scale": divisor.expand_as(step)}


SCHEME = Microscaling
