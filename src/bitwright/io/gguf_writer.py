"""A streaming GGUF writer: files are planned from keys and entries, created at full size, and filled in any order.

The bytes depend on what was planned and written, not on the order of the writes, the clock or the machine. Files are of version 3,
little endian. Split models follow llama.cpp's splitter: a part is full when the next tensor's padded size would exceed the bound.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks.types import BlockType
from bitwright.errors import InputError, ResumeError
from bitwright.io.files import require_little_endian
from bitwright.io.gguf_file import SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, part_name
from bitwright.io.gguf_header import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    MAX_HEAD_BYTES,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    MIN_ALIGNMENT,
    padded,
)
from bitwright.io.gguf_values import GgufValue, ValueType, encode_text, encode_value, i32, u16
from bitwright.io.planned_files import RESUME_MEND, Intervals, PlannedFile, PlannedFiles
from bitwright.io.text import quoted

__all__ = ["GgufEntry", "GgufPart", "GgufWriter", "plan_gguf"]

_MAX_PARTS = 2**16 - 1
_MAX_BYTES = 2**63 - 1
_SPLIT_KEYS = {SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS}


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """A tensor to be written. shape: in numpy's order, columns last."""

    name: str
    shape: tuple[int, ...]
    block: BlockType

    @property
    def rows(self) -> int:
        """Rows, all leading axes taken together."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.block.row_bytes(self.shape[-1] if self.shape else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufPart:
    """One file to be written.

    header: all bytes before the data, padding included; offsets: name -> (begin, end) in the file; entries: in the order of the
    data; total_bytes: the exact size of the file.
    """

    file_name: str
    header: bytes
    offsets: Mapping[str, tuple[int, int]]
    entries: tuple[GgufEntry, ...]
    total_bytes: int


def plan_gguf(
    values: Mapping[str, GgufValue],
    entries: Sequence[GgufEntry],
    *,
    stem: str = "model",
    max_part_bytes: int | None = None,
) -> tuple[GgufPart, ...]:
    """Lay out keys and tensors, keeping both orders, in ``STEM.gguf`` or in parts of at most ``max_part_bytes`` of tensor data.

    A larger tensor gets a part of its own. Keys that begin with ``split.`` are made anew; ``general.alignment`` is obeyed.
    Raises InputError for what no GGUF reader would take: names that are not unique or too long, shapes, values of a wrong type.
    """
    if not stem or "/" in stem or "\x00" in stem:
        raise InputError(f"{quoted(stem)} cannot begin a file name", mend="use a plain name")
    if max_part_bytes is not None and max_part_bytes <= 0:
        raise InputError(f"max_part_bytes is {max_part_bytes}", mend="use a positive size")
    kept = {key: value for key, value in values.items() if key not in _SPLIT_KEYS}
    alignment = _alignment(kept)
    _check_entries(entries)
    groups = _groups(entries, alignment, max_part_bytes)
    count = len(groups)
    if count == 1:
        return (_plan(f"{stem}.gguf", kept, groups[0], alignment),)
    if count > _MAX_PARTS:
        raise InputError(f"{count} parts, at most {_MAX_PARTS} are possible", mend="use larger parts")
    parts = []
    for number, group in enumerate(groups):
        # a part's own alignment is read from the part itself
        own = kept if number == 0 else {key: value for key, value in kept.items() if key == ALIGNMENT_KEY}
        split = {SPLIT_NUMBER: u16(number), SPLIT_COUNT: u16(count), SPLIT_TENSORS: i32(len(entries))}
        parts.append(_plan(part_name(stem, number, count), own | split, group, alignment))
    return tuple(parts)


def _alignment(values: Mapping[str, GgufValue]) -> int:
    found = values.get(ALIGNMENT_KEY)
    if found is None:
        return DEFAULT_ALIGNMENT
    alignment = found.value
    if (
        found.type is not ValueType.U32
        or alignment & (alignment - 1)
        or not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT
    ):
        raise InputError(
            f"key '{ALIGNMENT_KEY}': {found.kind} {alignment} is not a u32 power of two", mend="use 32, or leave it out"
        )
    return int(alignment)


def _check_entries(entries: Sequence[GgufEntry]) -> None:
    if len(entries) > MAX_TENSORS:
        raise InputError(f"{len(entries)} tensors, at most {MAX_TENSORS} are possible", mend="write fewer tensors")
    seen: set[str] = set()
    for entry in entries:
        what = f"tensor {quoted(entry.name)}"
        if not 1 <= len(encode_text(entry.name)) - 8 <= MAX_NAME_BYTES:
            raise InputError(f"{what}: names have 1 to {MAX_NAME_BYTES} bytes", mend="rename the tensor")
        if entry.name in seen:
            raise InputError(f"{what}: planned twice", mend="rename the tensors")
        seen.add(entry.name)
        if len(entry.shape) > MAX_DIMENSIONS or any(size < 1 for size in entry.shape):
            raise InputError(
                f"{what}: shape {entry.shape}; GGUF has at most {MAX_DIMENSIONS} sizes from 1 on", mend="reshape it"
            )
        if entry.nbytes > _MAX_BYTES:
            raise InputError(f"{what}: shape {entry.shape} is too large", mend="check the shape")


def _groups(entries: Sequence[GgufEntry], alignment: int, bound: int | None) -> list[list[GgufEntry]]:
    groups: list[list[GgufEntry]] = [[]]
    filled = 0
    for entry in entries:
        size = padded(entry.nbytes, alignment)
        if bound is not None and groups[-1] and filled + size > bound:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    return groups


def _plan(file_name: str, values: Mapping[str, GgufValue], group: Sequence[GgufEntry], alignment: int) -> GgufPart:
    if len(values) > MAX_KEYS:
        raise InputError(f"{file_name}: {len(values)} keys, at most {MAX_KEYS} are possible", mend="write fewer keys")
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(group), len(values)))
    for key, value in values.items():
        name = encode_text(key)
        if not 1 <= len(name) - 8 <= MAX_KEY_BYTES:
            raise InputError(f"{file_name}, key {quoted(key)}: keys have 1 to {MAX_KEY_BYTES} bytes", mend="rename it")
        try:
            head += name + encode_value(value)
        except InputError as error:
            raise InputError(f"{file_name}, key {quoted(key)}: {error.message}", mend=error.mend) from error
    relative: list[int] = []
    cursor = 0
    for entry in group:
        dims = entry.shape[::-1]
        head += encode_text(entry.name)
        head += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.block.number, cursor)
        relative.append(cursor)
        cursor += padded(entry.nbytes, alignment)
    head += bytes(-len(head) % alignment)
    if len(head) > MAX_HEAD_BYTES:
        raise InputError(f"{file_name}: a head of {len(head)} bytes is too long", mend="write fewer or shorter values")
    offsets = {
        entry.name: (len(head) + begin, len(head) + begin + entry.nbytes)
        for entry, begin in zip(group, relative, strict=True)
    }
    return GgufPart(file_name, bytes(head), offsets, tuple(group), len(head) + cursor)


@dataclass(frozen=True, slots=True)
class _Place:
    file: int
    start: int
    entry: GgufEntry


class GgufWriter:
    """Fills planned parts in ``folder``. Threads may share it; ``close`` must not run beside writes.

    resume: reopen files of an earlier run, which must have the planned sizes and headers, else ResumeError.
    written: names that the earlier run is known to have written whole; the others count as missing.
    Raises ResourceError where the disk cannot hold the files; files made until then are removed.
    """

    def __init__(
        self, folder: Path, parts: Sequence[GgufPart], *, resume: bool = False, written: Collection[str] = ()
    ) -> None:
        require_little_endian()
        self._parts = tuple(parts)
        self._places = {
            entry.name: _Place(index, part.offsets[entry.name][0], entry)
            for index, part in enumerate(self._parts)
            for entry in part.entries
        }
        unknown = sorted(set(written) - self._places.keys())
        if unknown:
            raise ResumeError(f"tensor {quoted(unknown[0])} was written but is not in the plan", mend=RESUME_MEND)
        self._covered = {name: Intervals() for name in self._places}
        for name in written:
            self._covered[name].add(0, self._places[name].entry.nbytes)
        self._lock = threading.Lock()
        planned = [PlannedFile(part.file_name, part.header, part.total_bytes) for part in self._parts]
        self._files = PlannedFiles(folder, planned, resume=resume)

    def write(self, name: str, blocks: NDArray[Any], row: int = 0) -> None:
        """Store ``blocks`` ``(rows, row bytes)`` uint8 as (part of) the planned tensor, from row ``row`` on.

        Rows count over all leading axes taken together. Raises InputError if name, dtype, shape or rows do not fit the plan,
        ResourceError if the disk is full.
        """
        place = self._place(name)
        entry = place.entry
        what = f"{self._parts[place.file].file_name}, tensor {quoted(name)}"
        if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != entry.row_bytes:
            raise InputError(
                f"{what}: {blocks.dtype} {blocks.shape} given, uint8 rows of {entry.row_bytes} bytes planned",
                mend="write what was planned",
            )
        if not 0 <= row <= row + len(blocks) <= entry.rows:
            raise InputError(
                f"{what}: {len(blocks)} rows from row {row} do not fit {entry.shape}", mend="write what was planned"
            )
        begin = row * entry.row_bytes
        buffer = np.ascontiguousarray(blocks).reshape(-1).data
        self._files.write(place.file, buffer, place.start + begin, what)
        with self._lock:
            self._covered[name].add(begin, begin + len(buffer))

    def missing(self) -> tuple[str, ...]:
        """Names of planned tensors that were not written whole, in the order of the plan."""
        with self._lock:
            return tuple(
                name for name, place in self._places.items() if not self._covered[name].covers(place.entry.nbytes)
            )

    def sync(self) -> None:
        """Return only when everything written so far is on the disk. Raises ResourceError if the disk fails."""
        self._files.sync()

    def close(self) -> None:
        """Close the files. Does not sync, and may be called twice."""
        self._files.close()

    def _place(self, name: str) -> _Place:
        if self._files.closed:
            raise InputError(f"tensor {quoted(name)}: the writer is closed", mend="write before closing")
        try:
            return self._places[name]
        except KeyError:
            raise InputError(f"tensor {quoted(name)} is not in the plan", mend="plan every tensor") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
