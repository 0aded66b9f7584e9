"""The Scheme contract: which numbers exist.

A scheme turns a weight ``(rows, columns)`` into integer codes and parameters and back. It knows nothing of models, files or
error feedback. Methods work over any scheme through ``span``, ``fit``, ``encode``, ``decode`` and ``codec``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError

__all__ = ["AffineCodec", "Codec", "Limits", "ParamSpec", "Params", "Scheme", "TableCodec", "Tile", "group_count"]

#: Fitted parameters by name, for example ``{"scale": (rows, groups), "zero": (rows, groups)}``.
Params = Mapping[str, torch.Tensor]
#: A parameter's name, shape and dtype: the same record as a stored tensor's.
ParamSpec = TensorSpec


@dataclass(frozen=True, slots=True)
class Tile:
    """The block of a weight that shares parameters. None means "all of them" in that direction.

    ``Tile(1, 128)``: group of 128 columns; ``Tile(1, None)``: per output channel; ``Tile(None, None)``: per tensor.
    """

    rows: int | None
    columns: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a layout demands of a scheme, known before anything is fitted. None means "no demand"."""

    scale_dtype: torch.dtype | None = None
    zero_min: int | None = None


@dataclass(frozen=True, slots=True)
class AffineCodec:
    """Columns as affine steps: ``value = (code - zero) * scale`` with ``low <= code <= high``.

    scale, zero: ``(rows, tiles)`` float32; tile: ``(columns,)`` int64, the tile that each column belongs to.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    tile: torch.Tensor
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class TableCodec:
    """Columns as a lookup: ``value = table[index] * scale``, table ascending, ``code = codes[index]``.

    table: ``(levels,)`` float32; scale: ``(rows, tiles)`` float32, not zero; tile: ``(columns,)`` int64; codes: ``(levels,)`` uint8, the
    scheme's code of each table entry, or None where that is its index.
    """

    table: torch.Tensor
    scale: torch.Tensor
    tile: torch.Tensor
    codes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.table) < 2 or not bool(torch.isfinite(self.table).all()):
            raise InputError("a table needs at least two finite values", mend="check the scheme's codebook")


Codec = AffineCodec | TableCodec


def group_count(shape: tuple[int, int], *, group_size: int) -> int:
    """How many groups a weight has in all.

    >>> group_count((8, 16), group_size=4)
    32
    """
    rows, columns = shape
    if group_size <= 0 or columns % group_size:
        raise PlanError(
            f"in_features {columns} is not a multiple of group_size {group_size}",
            mend=f"keep this layer, or use group_size {suggest_group_size(columns, group_size)}",
        )
    return rows * (columns // group_size)


def suggest_group_size(columns: int, wanted: int) -> int:
    """The divisor of ``columns`` nearest to the group size that was wanted.

    >>> suggest_group_size(4100, 128)
    100
    """
    divisors = [d for d in range(1, columns + 1) if columns % d == 0 and d <= 4 * max(wanted, 1)]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


class Scheme(ABC):
    """Base of every scheme; a scheme is a frozen dataclass. See ``docs/architecture.md`` for the contract in words."""

    kind: ClassVar[str]
    #: how many neighbouring values one code stands for
    vector: ClassVar[int] = 1
    #: how the layer's inputs are quantized; None: they stay as they are. Schemes that can have it redeclare it as a field.
    inputs: InputScheme | None = None

    @property
    def shares(self) -> bool:
        """True where ``prepare`` wants all tensors of a fused layer (q, k, v; gate, up) at once. Default: each for itself."""
        return False

    @property
    def two_level(self) -> bool:
        """True where parameters are themselves quantized over the whole weight.

        ``fit`` then gives *loose* parameters, tile by tile, that ``encode``, ``decode``, ``codec`` and ``choose`` understand, and
        ``finish`` turns those of the whole weight into the stored ones.
        """
        return False

    @property
    @abstractmethod
    def tile(self) -> Tile:
        """The block that shares parameters."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """How many codes exist; codes are ``0 .. levels - 1``."""

    @property
    def code_bits(self) -> int:
        """Bits needed for one code."""
        return (self.levels - 1).bit_length()

    def span(self, columns: int) -> int:
        """How many neighbouring columns share parameters in a weight with this many columns."""
        return self.tile.columns or columns

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Tiles down and across a weight of this shape; raises PlanError where they do not divide it."""
        rows, columns = shape
        if columns == 0 or rows == 0:
            raise PlanError(f"a weight of shape {shape} is empty", mend="keep this tensor")
        group_count(shape, group_size=self.span(columns))
        tile_rows = self.tile.rows or rows
        return -(-rows // tile_rows), columns // self.span(columns)

    def by_rows(self, shape: tuple[int, int]) -> bool:
        """True where no tile of a weight of this shape reaches into a second row, so that rows may be fitted in pieces."""
        del shape
        return self.tile.rows == 1

    def sum_tiles(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` ``(rows, columns)`` over every tile: ``(tile rows, tile columns)``."""
        rows, columns = values.shape
        down, across = self.grid((rows, columns))
        per_row = values.view(rows, across, self.span(columns)).sum(-1)
        if down == rows:
            return per_row
        tile_rows = self.tile.rows or rows
        padded = torch.zeros(down * tile_rows, across)
        padded[:rows] = per_row
        return padded.view(down, tile_rows, across).sum(1)

    def prepare(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Once over the tensors that share something above the tile; the result is handed to ``fit``. Default: nothing."""
        return None

    def limit(self, limits: Limits) -> Self:
        """The same scheme under a layout's demands. The default knows ``scale_dtype`` and ``zero_min`` fields by name."""
        own = {field.name for field in fields(self)}  # type: ignore[arg-type]
        changes = {}
        for name in ("scale_dtype", "zero_min"):
            value = getattr(limits, name)
            if value is not None and name in own:
                changes[name] = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        return replace(self, **changes)  # type: ignore[type-var]

    @abstractmethod
    def fit(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None, clip: float = 1.0
    ) -> Params:
        """Parameters for ``w`` ``(rows, columns)`` float32.

        weights: ``(columns,)`` importance of each column (E[x²]) for fits that weigh errors; clip: factor on the
        represented range, for methods that search it. A constant or zero tile gives finite parameters.
        """

    @abstractmethod
    def encode(self, w: torch.Tensor, params: Params) -> torch.Tensor:
        """Nearest codes of ``w`` ``(rows, columns)`` float32 under these parameters: uint8."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        """``(rows, columns)`` float32 that the codes stand for."""

    def quantize(
        self, w: torch.Tensor, *, weights: torch.Tensor | None = None, context: Any = None
    ) -> tuple[Params, torch.Tensor]:
        """The reference quantizer: fit, then encode. Schemes that imitate a foreign reference override it."""
        params = self.finish(self.fit(w, weights=weights, context=context), (w.shape[0], w.shape[1]))
        return params, self.encode(w, params)

    def finish(self, params: Params, shape: tuple[int, int]) -> Params:
        """The stored parameters of a whole weight from loose ones; called before the last ``encode``. Default: the same ones."""
        del shape
        return params

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, *, weights: torch.Tensor | None) -> Params:
        """Better parameters for codes that are already chosen, where a closed form exists. Default: the same ones."""
        return params

    def clipped(
        self, w: torch.Tensor, clips: Sequence[float], context: Any = None, weights: torch.Tensor | None = None
    ) -> Iterator[Params]:
        """``fit(w, clip=clip)`` for every clip; schemes that need the range of ``w`` only once override it.

        weights: ``(columns,)`` importance, for schemes whose own search takes the place of the clips.
        """
        del weights
        return (self.fit(w, context=context, clip=clip) for clip in clips)

    def refit_sums(self, above: torch.Tensor, below: torch.Tensor, params: Params) -> Params | None:
        """``refit`` from the sums of ``core.method.TileSums``, or None where the scheme has no such closed form."""
        return None

    def choose(self, first: torch.Tensor, a: Params, b: Params) -> Params:
        """Per tile, parameters of ``a`` where ``first`` ``(tile rows, tile columns)`` is true, else those of ``b``."""
        return {name: torch.where(first, a[name], b[name]) for name in a}

    def columns(self, params: Params, start: int, stop: int, shape: tuple[int, int]) -> Params:
        """The parameters of columns ``start .. stop`` (both on tile boundaries) of a weight of this shape."""
        span = self.span(shape[1])
        if start % span or stop % span:
            raise InputError(f"columns {start}:{stop} do not lie on tile boundaries of {span}")
        return {name: value[:, start // span : stop // span] for name, value in params.items()}

    @abstractmethod
    def codec(self, params: Params, shape: tuple[int, int]) -> Codec:
        """The columns as affine steps, a table or a vector lookup, for the error-feedback kernels."""

    @abstractmethod
    def param_spec(self, shape: tuple[int, int]) -> tuple[ParamSpec, ...]:
        """Names, shapes and dtypes of the parameters of a weight of this shape."""

    @abstractmethod
    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Code bits plus parameter bits, per weight."""

    def outlier_count(self, shape: tuple[int, int]) -> int:
        """How many weights of this shape are stored apart in 16 bits. Default: none."""
        del shape
        return 0

    @property
    def outlier_dtype(self) -> torch.dtype:
        """Storage dtype of the outliers' values."""
        return torch.float16

    def describe(self) -> str:
        """One short line for tables and logs, about the weight alone."""
        return self.kind

    def describe_all(self) -> str:
        """``describe``, and how inputs are quantized."""
        return self.describe() if self.inputs is None else f"{self.describe()}, inputs {self.inputs.describe()}"

    def to_spec(self) -> dict[str, Any]:
        """A JSON object from which ``catalog`` rebuilds this scheme."""
        spec = {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]
        spec.pop("inputs", None)
        return spec if self.inputs is None else {**spec, "inputs": self.inputs.to_spec()}


def tile_of_columns(columns: int, span: int) -> torch.Tensor:
    """``(columns,)`` int64: the tile that each column belongs to.

    >>> tile_of_columns(4, 2).tolist()
    [0, 0, 1, 1]
    """
    return torch.arange(columns) // span
