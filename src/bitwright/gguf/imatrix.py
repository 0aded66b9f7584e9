"""Importance matrices: how much each input of a matrix matters, E[x²], in llama.cpp's two file formats.

GGUF form (``general.type`` = ``imatrix``): per tensor ``NAME.in_sum2`` ``(matrices, columns)``, the sum of x² over tokens, and
``NAME.counts`` ``(matrices, 1)``, the tokens that were seen; an expert stack has one row per expert. The older ``.dat`` form:
little-endian records of ``len, name, calls, values, floats``, the floats being the mean of x² times ``calls``. Source: llama.cpp's
``tools/imatrix`` (MIT).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bitwright.blocks.codec import Floats
from bitwright.blocks.types import TYPES
from bitwright.errors import InputError, PlanError
from bitwright.io.files import os_error
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import ValueType, string, strings, u32
from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf
from bitwright.io.text import printable

__all__ = ["ImportanceMatrix", "Sums", "read_imatrix", "write_imatrix"]

_GGUF_MAGIC = b"GGUF"
_MEND = "collect it anew with `bitwright imatrix`"
_MAX_NAME = 512


@dataclass(frozen=True, slots=True)
class Sums:
    """One tensor's statistics. squares: ``(matrices, columns)`` float32, sum of x² over tokens; counts: ``(matrices,)`` float32, tokens."""

    squares: Floats
    counts: Floats

    def weights(self) -> Floats:
        """``(matrices, columns)`` float32: E[x²]; ones for an expert that no token reached."""
        seen = self.counts > 0
        mean = self.squares / np.where(seen, self.counts, np.float32(1))[:, None]
        return np.where(seen[:, None], mean, np.float32(1)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Statistics by GGUF tensor name. chunks x chunk_size tokens of ``datasets`` were read. origin: the file's name."""

    entries: Mapping[str, Sums]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 512
    origin: str = field(default="", compare=False)

    def weights(self, name: str, columns: int, matrices: int = 1) -> Floats | None:
        """E[x²] for tensor ``name``: ``(matrices, columns)``, or None where it has no entry. PlanError where sizes differ."""
        sums = self.entries.get(name)
        if sums is None:
            return None
        found = sums.weights()
        if found.size == matrices * columns:
            found = found.reshape(matrices, columns)  # the older form keeps an expert stack as one row
        if found.shape != (matrices, columns):
            raise PlanError(
                f"importance matrix {self.origin}: {name} has {found.shape[0]} x {found.shape[1]} values, "
                f"the tensor needs {matrices} x {columns}",
                mend="collect it for this model",
            )
        return found


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix in either format, told apart by the first bytes. InputError for damaged files and values that are not finite."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise os_error(error, printable(str(path))) from error
    found = _read_gguf(path) if head == _GGUF_MAGIC else _read_dat(path)
    if not 0 <= found.chunks < 2**32:
        raise InputError(f"{printable(str(path))} claims to be made from {found.chunks} chunks", mend=_MEND)
    for name, sums in found.entries.items():
        good = np.isfinite(sums.squares).all() and np.isfinite(sums.counts).all() and (sums.squares >= 0).all()
        if not good:
            raise InputError(
                f"{printable(str(path))}: '{printable(name)}' holds values that are negative or not finite", mend=_MEND
            )
    return found


def _read_gguf(path: Path) -> ImportanceMatrix:
    where = printable(str(path))
    with GgufFile.open(path) as file:
        kind = file.values.get("general.type")
        if kind is None or kind.value != "imatrix":
            raise InputError(f"{where}: general.type is not 'imatrix'", mend="this is a model; " + _MEND)
        entries: dict[str, Sums] = {}
        for name, tensor in file.tensors.items():
            base, dot, part = name.rpartition(".")
            if part != "in_sum2" or not dot:
                continue
            counts = file.tensors.get(f"{base}.counts")
            if counts is None or tensor.block.name != "F32" or counts.block.name != "F32":
                raise InputError(f"{where}: '{printable(base)}' lacks its counts, or is not float32", mend=_MEND)
            squares = file.read(name)
            seen = file.read(counts.name).reshape(-1)
            if len(seen) != len(squares):
                raise InputError(
                    f"{where}: '{printable(base)}' has {len(seen)} counts for {len(squares)} rows", mend=_MEND
                )
            entries[base] = Sums(squares, seen)
        datasets = file.values.get("imatrix.datasets")
        named = datasets.value if datasets is not None and datasets.element is ValueType.STRING else []
        numbers = [file.values.get(f"imatrix.{key}") for key in ("chunk_count", "chunk_size")]
        chunks, size = (int(v.value) if v is not None and isinstance(v.value, int) else 0 for v in numbers)
    if not entries:
        raise InputError(f"{where} holds no statistics", mend=_MEND)
    return ImportanceMatrix(entries, tuple(str(name) for name in named), chunks, size or 512, path.name)


def _read_dat(path: Path) -> ImportanceMatrix:
    """The older form; every length is checked against what is left of the file before anything is read."""
    where = printable(str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise os_error(error, where) from error
    cursor = 0

    def take(size: int, what: str) -> bytes:
        nonlocal cursor
        if size < 0 or size > len(data) - cursor:
            raise InputError(f"{where} is no importance matrix: {what} goes beyond its end", mend=_MEND)
        cursor += size
        return data[cursor - size : cursor]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    count = number("the number of entries")
    if count < 1 or count > len(data) // 16:
        raise InputError(f"{where} is no importance matrix: it claims {count} entries", mend=_MEND)
    entries: dict[str, Sums] = {}
    for _ in range(count):
        length = number("a name's length")
        if not 0 < length <= _MAX_NAME:
            raise InputError(f"{where} is no importance matrix: a name of {length} bytes", mend=_MEND)
        name = take(length, "a name").decode("utf-8", "replace")
        calls, size = number("a count"), number("a size")
        values = np.frombuffer(take(4 * size, f"'{printable(name)}'"), "<f4").astype(np.float32)
        if size == 0 or name in entries:
            raise InputError(f"{where}: '{printable(name)}' is empty or comes twice", mend=_MEND)
        entries[name] = Sums(values[None], np.array([max(calls, 0)], np.float32))
    chunks = 0
    datasets: tuple[str, ...] = ()
    if cursor < len(data):
        chunks = number("the number of chunks")
        length = number("the data set's name")
        datasets = (take(length, "the data set's name").decode("utf-8", "replace"),)
    return ImportanceMatrix(entries, datasets, chunks, 512, path.name)


def write_imatrix(matrix: ImportanceMatrix, path: Path) -> None:
    """Write it atomically: as ``.dat`` where the name ends so, else as GGUF. The same statistics give the same bytes."""
    if path.suffix == ".dat":
        _replace(path, lambda temporary: temporary.write_bytes(_dat_bytes(matrix)))
    else:
        _replace(path, lambda temporary: _write_gguf(matrix, temporary))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.partial.gguf")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise os_error(error, f"writing {printable(str(path))}", folder=path.absolute().parent) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_gguf(matrix: ImportanceMatrix, path: Path) -> None:
    values = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings(list(matrix.datasets)),
        "imatrix.chunk_count": u32(matrix.chunks),
        "imatrix.chunk_size": u32(matrix.chunk_size),
    }
    parts = {}
    for name in sorted(matrix.entries):
        sums = matrix.entries[name]
        parts[f"{name}.in_sum2"] = np.ascontiguousarray(sums.squares, np.float32)
        parts[f"{name}.counts"] = np.ascontiguousarray(sums.counts, np.float32).reshape(-1, 1)
    entries = [GgufEntry(name, value.shape, TYPES["F32"]) for name, value in parts.items()]
    plan = plan_gguf(values, entries, stem=path.name.removesuffix(".gguf"))
    with GgufWriter(path.parent, plan) as writer:
        for name, value in parts.items():
            writer.write(name, value.view(np.uint8))
        writer.sync()


def _dat_bytes(matrix: ImportanceMatrix) -> bytes:
    """An expert stack becomes one long row there; its experts are then weighed by their means, as llama.cpp's reader expects."""
    out = [struct.pack("<i", len(matrix.entries))]
    for name in sorted(matrix.entries):
        sums = matrix.entries[name]
        calls = max(1, matrix.chunks)
        encoded = name.encode()
        values = (sums.weights() * np.float32(calls)).astype("<f4").reshape(-1)
        out.append(
            struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, values.size) + values.tobytes()
        )
    dataset = (matrix.datasets[0] if matrix.datasets else "").encode()
    out.append(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)
    return b"".join(out)
