"""Single tensors between source and sink: copied, or read, quantized, packed and written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bitwright import catalog
from bitwright.core.fused import fused_name
from bitwright.core.method import Context, Method, Outcome
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.source import Sink, Source
from bitwright.engine.plan import Plan, PlanEntry
from bitwright.engine.recipe import make_method
from bitwright.errors import InputError, NumericError

__all__ = ["CHUNK_ELEMENTS", "TensorWork", "bytes_of", "decoded_hash", "in_pieces", "without_statistics"]

#: Kept tensors are copied, and row-wise methods run, in pieces of at most this many elements.
CHUNK_ELEMENTS = 4 * 1024 * 1024


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor in row-major order."""
    view: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def decoded_hash(tensor: QuantizedTensor) -> str:
    """SHA-256 of the decoded weight, float32 row-major."""
    digest = hashlib.sha256()
    by_row = all(value.shape[:1] == tensor.shape[:1] for value in tensor.params.values())
    if tensor.outliers is not None or not tensor.scheme.by_rows(tensor.shape) or tensor.scheme.two_level or not by_row:
        digest.update(bytes_of(tensor.decode()))
        return digest.hexdigest()
    rows = max(1, CHUNK_ELEMENTS // tensor.shape[1])
    for start in range(0, tensor.shape[0], rows):
        params = {name: value[start : start + rows] for name, value in tensor.params.items()}
        digest.update(bytes_of(tensor.scheme.decode(tensor.codes[start : start + rows], params)))
    return digest.hexdigest()


def in_pieces(entry: PlanEntry) -> bool:
    """True where a weight is quantized in pieces of rows when no data is needed: it is large, and rows know nothing of each other."""
    assert entry.scheme is not None
    assert entry.unit is not None
    scheme, (rows, columns) = entry.scheme, entry.unit.shape
    if (
        not scheme.by_rows((rows, columns))
        or scheme.two_level
        or scheme.shares
        or scheme.outlier_count((rows, columns))
    ):
        return False
    return not entry.unit.transposed and rows * columns > CHUNK_ELEMENTS


def without_statistics(entry: PlanEntry) -> Method:
    """The method that takes over where there are no statistics: ``search``, or the entry's own where only that serves the scheme."""
    assert entry.method is not None
    assert entry.scheme is not None
    search = make_method("search", {})
    return search if search.accepts(entry.scheme) is None else entry.method


@dataclass
class TensorWork:
    """What one step does to tensors; ``hashes`` and ``report`` gather what the step's commit will tell."""

    plan: Plan
    source: Source
    sink: Sink
    hashes: dict[str, str] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)
    _prepared: tuple[str, Any] | None = None

    def copy(self, entry: PlanEntry) -> None:
        """Copy a kept tensor piece by piece; check that a dropped tied one equals its twin."""
        twin = entry.reason.removeprefix("tied to ") if entry.action == "drop" else None
        digest = hashlib.sha256()
        for start, piece in self.pieces(entry):
            if twin is not None:
                if not torch.equal(piece, self.source.read(twin, (start, start + len(piece)))):
                    raise InputError(
                        f"{entry.tensor} differs from {twin}, but the config ties them",
                        mend="set tie_word_embeddings to false in config.json",
                    )
                continue
            self.sink.write(entry.tensor, piece, start)
            digest.update(bytes_of(piece))
        if twin is None:
            self.hashes[entry.tensor] = digest.hexdigest()

    def write_all(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write small tensors that the source does not have, under their own names."""
        for name, value in tensors.items():
            self.sink.write(name, value)
            self.hashes[name] = hashlib.sha256(bytes_of(value)).hexdigest()

    def pieces(self, entry: PlanEntry) -> Iterator[tuple[int, torch.Tensor]]:
        """``(first row, rows)`` of a stored tensor; NumericError where one is not finite."""
        for start, piece in self._rows(entry):
            if _bad_values(piece):
                bad = sum(_bad_values(part) for _, part in self._rows(entry))
                raise _not_finite(entry.tensor, bad)
            yield start, piece

    def _rows(self, entry: PlanEntry) -> Iterator[tuple[int, torch.Tensor]]:
        shape = entry.spec.shape
        if not shape or math.prod(shape) <= CHUNK_ELEMENTS:
            yield 0, self.source.read(entry.tensor)
            return
        rows = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
        for start in range(0, shape[0], rows):
            yield start, self.source.read(entry.tensor, (start, min(start + rows, shape[0])))

    def check(self, entry: PlanEntry) -> None:
        """Raise NumericError, naming the tensor, where a weight is not finite."""
        for _ in self.pieces(entry):
            pass

    def quantize(self, entry: PlanEntry, method: Method, stats: Mapping[str, Any]) -> Outcome:
        """Quantize one weight; without statistics in pieces of rows, where the scheme's tiles allow it."""
        assert entry.scheme is not None
        assert entry.unit is not None
        scheme = entry.scheme
        if stats or not in_pieces(entry):
            weight = self.source.read(entry.tensor)
            if bad := _bad_values(weight):
                raise _not_finite(entry.tensor, bad)
            return self._run(entry, method, (weight.T if entry.unit.transposed else weight).float().contiguous(), stats)
        parts = [self._run(entry, method, piece.float(), {}).tensor for _, piece in self.pieces(entry)]
        params = {name: torch.cat([part.params[name] for part in parts]) for name in parts[0].params}
        codes = torch.cat([part.codes for part in parts])
        return Outcome(tensor=QuantizedTensor(scheme, entry.unit.shape, codes, params))

    def _run(self, entry: PlanEntry, method: Method, weight: torch.Tensor, stats: Mapping[str, Any]) -> Outcome:
        assert entry.scheme is not None
        context = Context(
            feedback=catalog.load("kernels", "numba-feedback"),
            tile_sums=catalog.load("kernels", "numba-tiles"),
            encode=catalog.load("kernels", "numba-encode"),
            prepared=self._prepare(entry, weight),
            strict=self.plan.recipe.strict,
        )
        try:
            return method.quantize(weight, stats, entry.scheme, context)
        except NumericError as error:
            raise NumericError(f"{entry.tensor}: {error.message}", mend=error.mend) from error

    def _prepare(self, entry: PlanEntry, weight: torch.Tensor) -> Any:
        """What the scheme prepares above the tile: for one weight, or for all parts of the fused layer that it belongs to."""
        assert entry.scheme is not None
        assert entry.unit is not None
        if not entry.scheme.shares:
            return entry.scheme.prepare([weight])
        whole = fused_name(entry.unit.name)
        if self._prepared is None or self._prepared[0] != whole:
            parts = [
                self.source.read(other.tensor).float()
                for other in self.plan.quantized
                if other.unit is not None and fused_name(other.unit.name) == whole
            ]
            self._prepared = (whole, entry.scheme.prepare(parts))
        return self._prepared[1]

    def store(self, entry: PlanEntry, outcome: Outcome, tokens: int) -> None:
        """Pack and write a quantized weight, and note its hash and what is worth telling."""
        assert entry.unit is not None
        assert entry.scheme is not None
        assert entry.method is not None
        for name, value in self.plan.layout.pack(entry.unit.name, outcome.tensor).items():
            self.sink.write(name, value)
        self.hashes[entry.tensor] = decoded_hash(outcome.tensor)
        self.report.append(
            {
                "tensor": entry.tensor,
                "method": entry.method.name,
                "scheme": entry.scheme.describe_all(),
                "loss": outcome.loss,
                "tokens": tokens,
                "dead_columns": outcome.dead_columns,
                "damping": outcome.damping,
                "fallback": outcome.fallback,
                **({"notes": list(outcome.notes)} if outcome.notes else {}),
            }
        )


def _bad_values(tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return 0
    finite = torch.isfinite(tensor)
    return 0 if bool(finite.all()) else int((~finite).sum())


def _not_finite(name: str, bad: int) -> NumericError:
    return NumericError(
        f"{name}: {bad} values are NaN or infinite", mend="the checkpoint is damaged; download it again"
    )
