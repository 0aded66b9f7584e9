"""Code books over blocks: ``w = table[code] * absmax`` with one magnitude per block of a fixed table (NF4, FP4) or of a fitted one.

Blocks are cut from the flattened row-major weight, as in bitsandbytes: ``absmax = max|w|`` of a block, ``code`` is the nearest entry to
``w * (1 / absmax)`` in float32, and a value half way between two entries takes the lower one. Sources: arXiv:2305.14314, section 3 (NF4,
double quantization); arXiv:2110.02861, section 2 (block-wise quantization, dynamic map); bitsandbytes 0.50.2, ``backends/default/ops.py``
and ``functional.py``, whose codes and magnitudes on the CPU come out bit for bit.

Double quantization stores the magnitudes in 8 bits: ``absmax = map[code] * nested_absmax + offset`` with offset the mean of all absmax and
one nested_absmax for 256 blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from torch.nn import functional

from bitwright.core.linalg import one_thread
from bitwright.core.scheme import Limits, Params, ParamSpec, Scheme, TableCodec, Tile, tile_of_columns
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.schemes._books import FINE, FP4, NF4, dynamic_codes, dynamic_map, fit_table, middles

__all__ = ["NESTED", "SCHEME", "TINY", "Codebook"]

#: Blocks that share a nested_absmax.
NESTED = 256
#: bitsandbytes divides by no smaller magnitude.
TINY = 1e-38
_BOOKS = {"nf4": NF4, "fp4": FP4}


@dataclass(frozen=True, kw_only=True)
class Codebook(Scheme):
    """A table of up to 256 values and one magnitude per block.

    book: "nf4", "fp4" (16 fixed values), "kmeans" (``2^bits`` values fitted to each weight) or "custom" (``table``: ascending, the largest
    magnitude 1). bits: width of a code. block_size: 32 to 4096, a power of two. double_quant: magnitudes in 8 bits instead of 32. dtype:
    what foreign loaders decode to; layouts set it.

    Loose parameters: ``absmax`` float32 ``grid(shape)``, and for k-means ``table`` ``(tile rows, levels)`` float32, the same in every row.
    Stored: ``absmax`` (uint8 with double quantization, beside ``nested_absmax (ceil(blocks / 256),)`` and ``offset (1,)`` float32) and
    ``table (levels,)``.
    """

    kind: ClassVar[str] = "codebook"

    book: Literal["nf4", "fp4", "kmeans", "custom"] = "nf4"
    bits: int = 4
    block_size: int = 64
    double_quant: bool = False
    table: tuple[float, ...] = ()
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", tuple(self.table))  # JSON gives a list
        if self.book not in ("nf4", "fp4", "kmeans", "custom"):
            raise PlanError(f"code book '{self.book}' is unknown", mend="use nf4, fp4, kmeans or custom")
        if not 32 <= self.block_size <= 4096 or self.block_size & (self.block_size - 1):
            raise PlanError(f"block_size {self.block_size} is not a power of two from 32 to 4096", mend="use 64")
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise PlanError(f"dtype '{self.dtype}' is unknown", mend="use float16, bfloat16 or float32")
        if (self.book == "custom") != bool(self.table):
            raise PlanError("a table belongs to book custom, and to no other", mend="give both or neither")
        if self.book == "custom":
            _check_table(self.table)
        if self.book == "kmeans" and not 2 <= self.bits <= 8:
            raise PlanError(f"k-means tables have 2 to 8 bits, not {self.bits}", mend="use 3 or 4")
        if self.book != "kmeans" and self.bits != self.code_bits:
            raise PlanError(
                f"book {self.book} has {self.code_bits} bits, not {self.bits}", mend=f"use {self.code_bits}"
            )

    @property
    def two_level(self) -> bool:
        return self.double_quant or self.book == "kmeans"

    @property
    def tile(self) -> Tile:
        """A block, where blocks do not reach over the end of a row; ``grid`` and ``by_rows`` know the other shapes."""
        return Tile(1, self.block_size)

    @property
    def levels(self) -> int:
        return 2**self.bits if self.book == "kmeans" else len(self.fixed_table or ())

    @property
    def fixed_table(self) -> tuple[float, ...] | None:
        """The table, ascending, or None where it is fitted."""
        return self.table if self.book == "custom" else _BOOKS.get(self.book)

    # --- blocks -----------------------------------------------------------------------------------------------------------

    def by_rows(self, shape: tuple[int, int]) -> bool:
        return shape[1] % self.block_size == 0

    def span(self, columns: int) -> int:
        return self.block_size if columns % self.block_size == 0 else columns

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """``(rows, blocks of a row)``, or ``(blocks, 1)`` where blocks reach over the end of a row; the last one may be short.

        >>> Codebook().grid((8, 256)), Codebook().grid((8, 96)), Codebook(block_size=512).grid((8, 256))
        ((8, 4), (12, 1), (4, 1))
        """
        rows, columns = shape
        if rows == 0 or columns == 0:
            raise PlanError(f"a weight of shape {shape} is empty", mend="keep this tensor")
        if self.by_rows(shape):
            return rows, columns // self.block_size
        return -(-rows * columns // self.block_size), 1

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """``(blocks, block_size)`` view of a weight; a short last block is filled up with zeros."""
        flat = values.reshape(-1)
        short = -len(flat) % self.block_size
        return (functional.pad(flat, (0, short)) if short else flat).view(-1, self.block_size)

    @staticmethod
    def _join(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Inverse of ``_blocks``."""
        return blocks.reshape(-1)[: shape[0] * shape[1]].view(shape)

    def sum_tiles(self, values: torch.Tensor) -> torch.Tensor:
        return self._blocks(values).sum(-1).view(self.grid((values.shape[0], values.shape[1])))

    # --- fitting ----------------------------------------------------------------------------------------------------------

    def prepare(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The table fitted to these weights, where it is not fixed."""
        return fit_table(tensors, self.block_size, self.levels) if self.book == "kmeans" else None

    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        return self.loose(self._absmax(w) * clip, self.table_for(w, context))

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        absmax, table = self._absmax(w), self.table_for(w, context)
        return (self.loose(absmax * clip, table) for clip in clips)

    def _absmax(self, w: torch.Tensor) -> torch.Tensor:
        absmax = self._blocks(w).abs().amax(1)
        if w.numel() % self.block_size:
            absmax[-1].clamp_min_(TINY)  # bitsandbytes stores no 0 for a short block
        return self.checked(absmax.view(self.grid((w.shape[0], w.shape[1]))))

    @staticmethod
    def checked(absmax: torch.Tensor) -> torch.Tensor:
        """The same magnitudes; NumericError where one is not finite."""
        if not bool(torch.isfinite(absmax).all()):
            raise NumericError("a weight is not finite", mend="the checkpoint is damaged; download it again")
        return absmax

    def table_for(self, w: torch.Tensor, context: Any) -> torch.Tensor:
        """The table to fit ``w`` with: ``(levels,)`` float32. context: what ``prepare`` gave."""
        if self.fixed_table is not None:
            return torch.tensor(self.fixed_table)
        return context if isinstance(context, torch.Tensor) else fit_table([w], self.block_size, self.levels)

    def loose(self, absmax: torch.Tensor, table: torch.Tensor) -> Params:
        """Loose parameters of these magnitudes ``(tile rows, tile columns)``."""
        if self.book != "kmeans":
            return {"absmax": absmax}
        return {"absmax": absmax, "table": table.expand(absmax.shape[0], -1)}

    def quantize(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None
    ) -> tuple[Params, torch.Tensor]:
        """Codes are chosen with the magnitudes as they were before double quantization, as bitsandbytes does."""
        loose = self.fit(w, weights=weights, context=context)
        return self.finish(loose, (w.shape[0], w.shape[1])), self.encode(w, loose)

    def finish(self, params: Params, shape: tuple[int, int]) -> Params:
        table = {"table": self.table_of(params).clone()} if self.book == "kmeans" else {}
        if not self.double_quant or "offset" in params:
            return {**params, **table}
        absmax = params["absmax"].reshape(-1)
        with one_thread():  # the mean's last bit depends on how many there are
            offset = absmax.mean()
            blocks = functional.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
            nested = blocks.abs().amax(1, keepdim=True)
            x = blocks * (1.0 / nested.clamp_min(TINY))
            cells = ((x + 1) * ((FINE - 1) / 2) + 0.5).clamp_(0, FINE - 1).int()
            codes = dynamic_codes().index_select(0, cells.view(-1)).view(cells.shape)
            codes.masked_fill_(nested == 0, 0)
        codes = codes.view(-1)[: len(absmax)].view(self.grid(shape))
        return {"absmax": codes, "nested_absmax": nested.view(-1), "offset": offset.view(1), **table}

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """The magnitude that minimises ``sum_i weights_i (w_i - table[code_i] absmax)²``: least squares, weighed."""
        steps = self._lookup(codes, self.table_of(params))
        weighed = steps if weights is None else steps * weights.float()
        return self.refit_sums(self.sum_tiles(weighed * w), self.sum_tiles(weighed * steps), params)

    def refit_sums(self, above: torch.Tensor, below: torch.Tensor, params: Params) -> Params:
        best = torch.where((below > 0) & (above > 0), above / below, self.scales(params))
        return self.loose(best, self.table_of(params))

    def choose(self, first: torch.Tensor, a: Params, b: Params) -> Params:
        return {**a, "absmax": torch.where(first, a["absmax"], b["absmax"])}

    # --- codes ------------------------------------------------------------------------------------------------------------

    def table_of(self, params: Params) -> torch.Tensor:
        """``(levels,)`` float32, ascending."""
        if self.fixed_table is not None:
            return torch.tensor(self.fixed_table)
        return params["table"].reshape(-1, self.levels)[0]

    def scales(self, params: Params) -> torch.Tensor:
        """The magnitudes of stored or loose parameters: ``(tile rows, tile columns)`` float32. Rounded ones may be zero or negative."""
        stored = params["absmax"]
        if "offset" not in params:
            return stored
        nested = params["nested_absmax"].repeat_interleave(NESTED)[: stored.numel()].view(stored.shape)
        return dynamic_map()[stored.int()] * nested + params["offset"]

    def _nonzero(self, params: Params) -> torch.Tensor:
        """The magnitudes with 0 replaced by the smallest float32: kernels divide by them."""
        scale = self.scales(params)
        return torch.where(scale == 0, 2.0**-149, scale)

    def divisor(self, params: Params) -> torch.Tensor:
        """What weights are divided by before the nearest entry is taken: the magnitudes, but none nearer to zero than TINY."""
        scale = self.scales(params)
        return torch.where(scale < 0, scale.clamp_max(-TINY), scale.clamp_min(TINY))

    @staticmethod
    def _lookup(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        divisor = self.divisor(params).reshape(-1, 1)
        x = self._blocks(w) * (1.0 / divisor)
        if w.numel() % self.block_size:
            x[-1] = self._blocks(w)[-1] / divisor[-1]  # what bitsandbytes does with a short block
        codes = torch.bucketize(x, middles(self.table_of(params)), out_int32=True).to(torch.uint8)
        return self._join(codes, w.shape)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        values = self._blocks(self._lookup(codes, self.table_of(params)))
        return self._join(values * self._nonzero(params).reshape(-1, 1), codes.shape)

    def codec(self, params: Params, shape: tuple[int, int]) -> TableCodec:
        """Where blocks reach over the end of a row every column has a scale of its own."""
        rows, columns = shape
        scale, table = self._nonzero(params), self.table_of(params)
        tile = tile_of_columns(columns, self.block_size)
        if not self.by_rows(shape):
            scale = scale.reshape(-1).repeat_interleave(self.block_size)[: rows * columns].view(rows, columns)
            tile = torch.arange(columns)
        first = torch.cat([torch.ones(1, dtype=torch.bool), table.diff() > 0])  # one of FP4's two zeros
        codes = None if bool(first.all()) else first.nonzero().view(-1).to(torch.uint8)
        return TableCodec(table[first], scale, tile, codes)

    def columns(self, params: Params, start: int, stop: int, shape: tuple[int, int]) -> Params:
        """Loose parameters: nested magnitudes cannot be cut."""
        span = self.span(shape[1])
        if start % span or stop % span:
            raise InputError(f"columns {start}:{stop} do not lie on tile boundaries of {span}")
        return self.loose(self.scales(params)[:, start // span : stop // span], self.table_of(params))

    # --- sizes ------------------------------------------------------------------------------------------------------------

    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        grid = self.grid(shape)
        table = (ParamSpec("table", (self.levels,), torch.float32),) if self.book == "kmeans" else ()
        if not self.double_quant:
            return (ParamSpec("absmax", grid, torch.float32), *table)
        nested = -(-grid[0] * grid[1] // NESTED)
        return (
            ParamSpec("absmax", grid, torch.uint8),
            ParamSpec("nested_absmax", (nested,), torch.float32),
            ParamSpec("offset", (1,), torch.float32),
            *table,
        )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return self.code_bits + sum(8 * spec.nbytes for spec in self.param_spec(shape)) / (shape[0] * shape[1])

    def limit(self, limits: Limits) -> Self:
        """Magnitudes are float32 everywhere; what a layout says of scales is the dtype that its loaders decode to."""
        name = str(limits.scale_dtype).removeprefix("torch.")
        return self if limits.scale_dtype is None else replace(self, dtype=name)  # type: ignore[arg-type]

    def describe(self) -> str:
        """
        >>> Codebook(double_quant=True).describe(), Codebook(book="kmeans", bits=3, block_size=128).describe()
        ('nf4 b64 dq', 'kmeans3 b128')
        """
        book = self.book + (str(self.code_bits) if self.fixed_table is None or self.book == "custom" else "")
        return f"{book} b{self.block_size}" + (" dq" if self.double_quant else "")


def _check_table(table: tuple[float, ...]) -> None:
    if not 2 <= len(table) <= 256 or not all(isinstance(value, int | float) for value in table):
        raise PlanError(f"a table of {len(table)} values cannot be used", mend="give 2 to 256 numbers")
    if any(not low < high for low, high in pairwise(table)):
        raise PlanError("the table is not ascending", mend="sort it, without repeats")
    if max(abs(table[0]), abs(table[-1])) != 1:
        raise PlanError("the largest magnitude of a table is 1", mend="divide the table by it")


SCHEME = Codebook
