"""Affine integers whose groups are named column by column: the act-order form of GPTQ files. For reading alone.

``w[o, i] = (code[o, i] - zero[o, g_idx[i]]) * scale[o, g_idx[i]]``. A checkpoint quantized with ``desc_act=true`` and
groups holds an arbitrary ``g_idx``; one whose last group is short holds more groups than ``columns // group_size``.
``Affine`` says neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.scheme import AffineCodec, Params, ParamSpec, Scheme, Tile
from bitwright.core.tensor import parse_dtype
from bitwright.errors import InputError, PlanError

__all__ = ["SCHEME", "AffineIndexed"]


@dataclass(frozen=True, kw_only=True)
class AffineIndexed(Scheme):
    """Affine integers with a group index per column.

    bits: 2, 3, 4 or 8; group_size: columns per group, the last group may be short; scale_dtype: storage dtype of the
    scales. Parameters: ``scale (rows, groups)``, ``zero (rows, groups)`` uint8, ``g_idx (columns,)`` int32.
    """

    kind: ClassVar[str] = "affine-indexed"

    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise PlanError(
                f"indexed affine schemes have 2, 3, 4 or 8 bits, not {self.bits}", mend="choose one of these"
            )
        if self.group_size < 1:
            raise PlanError(f"group_size {self.group_size} is not positive", mend="check the file's config")
        parse_dtype(self.scale_dtype)

    @property
    def tile(self) -> Tile:
        return Tile(1, None)

    @property
    def levels(self) -> int:
        return int(2**self.bits)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and groups; the last group may be short."""
        rows, columns = shape
        if columns == 0 or rows == 0:
            raise PlanError(f"a weight of shape {shape} is empty", mend="keep this tensor")
        return rows, -(-columns // self.group_size)

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        """Raises PlanError: no file with an arbitrary group index is written."""
        del w, weights, context, clip
        raise PlanError("scheme affine-indexed is for reading GPTQ act-order files", mend="use scheme affine")

    def _columns(self, params: Params) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of every column, ``(rows, columns)`` float32."""
        index = params["g_idx"].long()
        return params["scale"].float()[:, index], params["zero"].float()[:, index]

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        scale, zero = self._columns(params)
        return (w / scale + zero).round_().clamp_(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        scale, zero = self._columns(params)
        return (codes.float() - zero) * scale

    def columns(self, params: Params, start: int, stop: int, shape: tuple[int, int]) -> Params:
        """All columns or InputError: a part of an index names groups that belong to other columns too."""
        if (start, stop) != (0, shape[1]):
            raise InputError("an indexed weight cannot be sliced by columns", mend="decode it first")
        return dict(params)

    def codec(self, params: Params, shape: tuple[int, int]) -> AffineCodec:
        del shape
        return AffineCodec(params["scale"].float(), params["zero"].float(), params["g_idx"].long(), 0, self.levels - 1)

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        grid = self.grid(shape)
        return (
            ParamSpec("scale", grid, parse_dtype(self.scale_dtype)),
            ParamSpec("zero", grid, torch.uint8),
            ParamSpec("g_idx", (shape[1],), torch.int32),
        )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        rows, groups = self.grid(shape)
        per_group = 8 * parse_dtype(self.scale_dtype).itemsize + self.bits
        return self.bits + (rows * groups * per_group + 32 * shape[1]) / (shape[0] * shape[1])

    def describe(self) -> str:
        return f"int{self.bits} asym act-order g{self.group_size}"


SCHEME = AffineIndexed
