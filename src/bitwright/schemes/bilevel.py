"""Bilevel integers: groups whose scales and zero points are themselves quantized (SpQR, arXiv:2306.03078, section 4.2).

A weight is ``w = (code - zero) * scale`` in groups of ``group_size`` columns, zero being a real number in units of codes. Scales and zero
points are *first-level* statistics. Those of one column group and ``super_group`` neighbouring rows are quantized together to
``scale_bits`` and ``zero_bits``:

    scale = scale_low + scale_code * scale_step        zero = zero_low + zero_code * zero_step

with ``low`` and ``step`` (the *second level*) in float16. ``zero_bits = 0`` makes codes symmetric: ``zero = 2^(bits-1)``, nothing
stored. A share ``outliers`` (percent) of the weights is kept apart in 16 bits (section 4.1). First-level codes are stored as one dense
bit stream, so that what is announced is what lies on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.bits import pack_words, packed_words, unpack_words
from bitwright.core.scheme import AffineCodec, Params, ParamSpec, Scheme, Tile, tile_of_columns
from bitwright.errors import InputError, NumericError, PlanError

__all__ = ["SCHEME", "Bilevel"]

#: The smallest scale: float16's smallest subnormal, so that a group of zeros has a scale that stores and divides.
_TINY = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Bilevel(Scheme):
    """Integers of 2 to 4 bits in groups whose scales and zero points are quantized to a few bits.

    bits: width of a code; group_size: columns per group; super_group: rows whose groups share a second level; scale_bits: width of a
    scale's code; zero_bits: width of a zero point's code, 0 for symmetric codes; outliers: percent of the weights kept in 16 bits.

    Loose parameters: ``scale``, ``zero`` ``(rows, groups)`` float32. Stored ones: ``scale_codes``, ``zero_codes`` int32 words (row by
    row, groups of a row side by side), ``scale_low``, ``scale_step``, ``zero_low``, ``zero_step`` float16
    ``(ceil(rows / super_group), groups)``.
    """

    kind: ClassVar[str] = "bilevel"

    bits: int = 3
    group_size: int = 16
    super_group: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    outliers: float = 1.0

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise PlanError(f"bilevel schemes have 2, 3 or 4 bits, not {self.bits}", mend="choose one of these")
        if self.group_size < 1 or self.super_group < 1:
            raise PlanError(
                f"group_size {self.group_size} and super_group {self.super_group} must be positive", mend="use 16"
            )
        if not 1 <= self.scale_bits <= 8 or not 0 <= self.zero_bits <= 8:
            raise PlanError("scale_bits must be 1 to 8 and zero_bits 0 to 8", mend="use 3")
        if not 0 <= self.outliers < 50:
            raise PlanError(f"outliers {self.outliers} is no small percentage", mend="use 0 to 5")

    @property
    def two_level(self) -> bool:
        return True

    @property
    def tile(self) -> Tile:
        return Tile(1, self.group_size)

    @property
    def levels(self) -> int:
        return int(2**self.bits)

    @property
    def middle(self) -> float:
        """Half way between the outermost codes."""
        return (self.levels - 1) / 2

    @property
    def _fixed_zero(self) -> float:
        """The zero point of symmetric codes: a whole number, so that 0 is 0."""
        return self.levels / 2

    def outlier_count(self, shape: tuple[int, int]) -> int:
        """Weights of this shape that are kept in 16 bits: ``round(outliers / 100 * rows * columns)``.

        >>> Bilevel(outliers=0.5).outlier_count((64, 100))
        32
        """
        return round(self.outliers / 100 * shape[0] * shape[1])

    # --- first level ------------------------------------------------------------------------------------------------------

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
        """Smallest and largest value of every group, zero included."""
        low, high = torch.aminmax(self._tiles(w), dim=-1)
        return low.clamp_max_(0.0), high.clamp_min_(0.0)

    def _from_range(self, low: torch.Tensor, high: torch.Tensor, clip: float) -> Params:
        if self.zero_bits == 0:
            return {"scale": (torch.maximum(-low, high) * (clip / self.middle)).clamp_min_(_TINY)}
        scale = ((high - low) * (clip / (self.levels - 1))).clamp_min_(_TINY)
        return {"scale": scale, "zero": (-low * clip / scale).clamp_(0.0, self.levels - 1)}

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """Scale and zero point that minimise ``sum_i weights_i (w_i - (code_i - zero) scale)^2``: weighted linear regression."""
        if "scale_codes" in params:
            return params
        x, y = self._tiles(codes.double()), self._tiles(w.double())
        h = torch.ones_like(x) if weights is None else self._tiles(weights.double().expand(w.shape))
        if self.zero_bits == 0:
            x = x - self._fixed_zero
            above, below = (h * x * y).sum(-1), (h * x * x).sum(-1)
            right = (above > 0) & (below > 0)
            return {"scale": torch.where(right, above / below, params["scale"].double()).float().clamp_min_(_TINY)}
        total = h.sum(-1).clamp_min_(1e-300)
        mean_x, mean_y = (h * x).sum(-1) / total, (h * y).sum(-1) / total
        dx, dy = x - mean_x.unsqueeze(-1), y - mean_y.unsqueeze(-1)
        above, below = (h * dx * dy).sum(-1), (h * dx * dx).sum(-1)
        slope = (above / below.clamp_min(1e-300)).clamp_min_(_TINY)
        zero = mean_x - mean_y / slope
        # Fewer than two codes in use determine no line.
        right = (above > 0) & (below > 1e-9 * total) & (zero >= 0) & (zero <= self.levels - 1)
        return {
            "scale": torch.where(right, slope, params["scale"].double()).float(),
            "zero": torch.where(right, zero, params["zero"].double()).float(),
        }

    # --- second level -----------------------------------------------------------------------------------------------------

    def finish(self, params: Params, shape: tuple[int, int]) -> Params:
        """Quantize scales and zero points of the whole weight. Raises NumericError for scales that overflow float16.

        Where a scale changes by rounding, the zero point moves so that the middle of the group's range stays where it was.
        """
        if "scale_codes" in params:
            return params
        stored = self._pack("scale", params["scale"], self.scale_bits)
        if self.zero_bits:
            now = self._unpack("scale", stored, shape, self.scale_bits).clamp_min(_TINY)
            zero = self.middle - (self.middle - params["zero"]) * (params["scale"] / now)
            stored |= self._pack("zero", zero.clamp_(0.0, self.levels - 1), self.zero_bits)
        return stored

    def _supers(self, values: torch.Tensor) -> torch.Tensor:
        """``(rows, groups)`` as ``(super groups, super_group, groups)``; the last row is repeated to fill the last one."""
        rows, groups = values.shape
        short = -rows % self.super_group
        if short:
            values = torch.cat([values, values[-1:].expand(short, groups)])
        return values.view(-1, self.super_group, groups)

    def _pack(self, name: str, values: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        rows = len(values)
        blocks = self._supers(values)
        low16 = blocks.amin(1).half()
        low = low16.float()
        step16 = ((blocks.amax(1) - low).clamp_min_(0.0) / (2**bits - 1)).half()
        if not bool(torch.isfinite(low16).all() and torch.isfinite(step16).all()):
            raise NumericError(f"a {name} of {float(values.max()):.4g} overflows float16", mend="use scheme affine")
        step = step16.float()
        codes = ((blocks - low.unsqueeze(1)) / step.clamp_min(_TINY).unsqueeze(1)).round_().clamp_(0, 2**bits - 1)
        flat = codes.view(-1, values.shape[1])[:rows].reshape(1, -1).to(torch.uint8)
        return {f"{name}_codes": pack_words(flat, bits)[0], f"{name}_low": low16, f"{name}_step": step16}

    def _unpack(self, name: str, params: Params, shape: tuple[int, int], bits: int) -> torch.Tensor:
        rows, groups = self.grid(shape)
        codes = unpack_words(params[f"{name}_codes"][None], bits, rows * groups).view(rows, groups).float()
        low, step = (
            params[f"{name}_{part}"].float().repeat_interleave(self.super_group, dim=0)[:rows]
            for part in ("low", "step")
        )
        return low + codes * step

    def _level(self, params: Params, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every group, ``(rows, groups)`` float32, from loose or stored parameters."""
        if "scale_codes" not in params:
            scale = params["scale"]
            return scale, params["zero"] if self.zero_bits else torch.full_like(scale, self._fixed_zero)
        scale = self._unpack("scale", params, shape, self.scale_bits).clamp_min_(_TINY)
        zero = (
            self._unpack("zero", params, shape, self.zero_bits)
            if self.zero_bits
            else torch.full_like(scale, self._fixed_zero)
        )
        return scale, zero

    # --- codes --------------------------------------------------------------------------------------------------------------

    def _tiles(self, w: torch.Tensor) -> torch.Tensor:
        """``(rows, groups, group_size)`` view."""
        self.grid((w.shape[0], w.shape[1]))
        return w.reshape(w.shape[0], -1, self.group_size)

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        scale, zero = self._level(params, (w.shape[0], w.shape[1]))
        codes = self._tiles(w) / scale.unsqueeze(-1)
        codes += zero.unsqueeze(-1)
        return codes.round_().clamp_(0, self.levels - 1).to(torch.uint8).view(w.shape)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        scale, zero = self._level(params, (codes.shape[0], codes.shape[1]))
        return ((self._tiles(codes.float()) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(codes.shape)

    def columns(self, params: Params, start: int, stop: int, shape: tuple[int, int]) -> Params:
        """The parameters of some columns, as loose ones: a bit stream cannot be cut."""
        span = self.group_size
        if start % span or stop % span:
            raise InputError(f"columns {start}:{stop} do not lie on tile boundaries of {span}")
        scale, zero = (value[:, start // span : stop // span] for value in self._level(params, shape))
        return {"scale": scale, "zero": zero} if self.zero_bits else {"scale": scale}

    def codec(self, params: Params, shape: tuple[int, int]) -> AffineCodec:
        scale, zero = self._level(params, shape)
        return AffineCodec(scale, zero, tile_of_columns(shape[1], self.group_size), 0, self.levels - 1)

    # --- sizes --------------------------------------------------------------------------------------------------------------

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        rows, groups = self.grid(shape)
        supers = (-(-rows // self.super_group), groups)
        found = []
        for name, bits in (("scale", self.scale_bits), ("zero", self.zero_bits)):
            if bits:
                found.append(ParamSpec(f"{name}_codes", (packed_words(rows * groups, bits),), torch.int32))
                found += [ParamSpec(f"{name}_{part}", supers, torch.float16) for part in ("low", "step")]
        return tuple(found)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Codes, both levels of parameters, and 32 bits an outlier (value and column) plus 32 bits a row (where it begins)."""
        rows, columns = shape
        bits = 8 * sum(spec.nbytes for spec in self.param_spec(shape))
        count = self.outlier_count(shape)
        if count:
            bits += count * (32 if columns <= 2**16 else 48) + 32 * (rows + 1)
        return self.bits + bits / (rows * columns)

    def describe(self) -> str:
        zero = f"/{self.zero_bits}" if self.zero_bits else ""
        apart = f", {self.outliers:g} % outliers" if self.outliers else ""
        return (
            f"bilevel int{self.bits} g{self.group_size}x{self.super_group}, {self.scale_bits}{zero}-bit scales{apart}"
        )


SCHEME = Bilevel
