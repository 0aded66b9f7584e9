"""A streaming safetensors writer: shards are planned from specs, created at full size, and filled in any order.

The bytes depend on the specs and on what was written, not on the order of the writes, the clock or the machine.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from bitwright.core.tensor import TensorSpec, dtype_name
from bitwright.errors import InputError, ResumeError
from bitwright.io.files import require_little_endian
from bitwright.io.header import MAX_HEADER_BYTES
from bitwright.io.planned_files import RESUME_MEND, Intervals, PlannedFile, PlannedFiles
from bitwright.io.text import quoted

__all__ = ["INDEX_NAME", "SafetensorsWriter", "ShardPlan", "index_json", "plan_shards"]

INDEX_NAME = "model.safetensors.index.json"
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file to be written.

    header: its first bytes, length prefix included; offsets: name -> (begin, end) in bytes from the header's end;
    specs: in the order of the data; total_bytes: the exact size of the file.
    """

    file_name: str
    header: bytes
    offsets: Mapping[str, tuple[int, int]]
    specs: tuple[TensorSpec, ...]
    total_bytes: int


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int = 5_000_000_000) -> tuple[ShardPlan, ...]:
    """Distribute tensors over files of at most ``max_shard_bytes`` bytes of data each, keeping their order.

    A larger tensor gets a file of its own. Within a file, wider dtypes come first, so that every tensor is aligned.
    Raises InputError for names that are not unique or reserved.
    """
    if max_shard_bytes <= 0:
        raise InputError(f"max_shard_bytes is {max_shard_bytes}", mend="use a positive size")
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names) or "__metadata__" in names:
        raise InputError("tensor names are not unique, or one is '__metadata__'", mend="rename the tensors")
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    count = len(groups)
    return tuple(
        _plan("model.safetensors" if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors", group)
        for index, group in enumerate(groups, start=1)
    )


def _plan(file_name: str, group: Sequence[TensorSpec]) -> ShardPlan:
    ordered = tuple(sorted(group, key=lambda spec: -spec.dtype.itemsize))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, tuple[int, int]] = {}
    cursor = 0
    for spec in ordered:
        end = cursor + spec.nbytes
        offsets[spec.name] = (cursor, end)
        entries[spec.name] = {
            "dtype": dtype_name(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [cursor, end],
        }
        cursor = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise InputError(
            f"{file_name}: a header of {len(text)} bytes is too long", mend="use a smaller max_shard_bytes"
        )
    header = len(text).to_bytes(8, "little") + text
    return ShardPlan(file_name, header, offsets, ordered, len(header) + cursor)


def index_json(shards: Sequence[ShardPlan]) -> bytes | None:
    """The content of ``model.safetensors.index.json``, or None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    size = sum(spec.nbytes for shard in shards for spec in shard.specs)
    weight_map = {spec.name: shard.file_name for shard in shards for spec in shard.specs}
    document = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("utf-8")


@dataclass(frozen=True, slots=True)
class _Place:
    file: int
    start: int
    spec: TensorSpec


class SafetensorsWriter:
    """The ``Sink`` over planned shards in ``folder``. Threads may share it; ``close`` must not run beside writes.

    resume: reopen files of an earlier run, which must have the planned sizes and headers, else ResumeError.
    written: names that the earlier run is known to have written whole; the others count as missing.
    Raises ResourceError where the disk cannot hold the files; files made until then are removed.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardPlan], *, resume: bool = False, written: Collection[str] = ()
    ) -> None:
        require_little_endian()
        self._shards = tuple(shards)
        self._places = {
            spec.name: _Place(index, len(shard.header) + shard.offsets[spec.name][0], spec)
            for index, shard in enumerate(self._shards)
            for spec in shard.specs
        }
        unknown = sorted(set(written) - self._places.keys())
        if unknown:
            raise ResumeError(f"tensor {quoted(unknown[0])} was written but is not in the plan", mend=RESUME_MEND)
        self._covered = {name: Intervals() for name in self._places}
        for name in written:
            self._covered[name].add(0, self._places[name].spec.nbytes)
        self._lock = threading.Lock()
        planned = [PlannedFile(shard.file_name, shard.header, shard.total_bytes) for shard in self._shards]
        self._files = PlannedFiles(folder, planned, resume=resume)

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Store ``tensor`` as (part of) the planned tensor ``name``, from row ``row`` of its first axis on.

        Raises InputError if name, dtype, shape or rows do not fit the plan, ResourceError if the disk is full.
        """
        place = self._place(name)
        spec = place.spec
        what = f"{self._shards[place.file].file_name}, tensor {quoted(name)}"
        shape = tuple(tensor.shape)
        if tensor.dtype != spec.dtype or tensor.layout != torch.strided:
            raise InputError(f"{what}: {tensor.dtype} given, {spec.dtype} planned", mend="cast to the planned dtype")
        rows = shape[0] if shape else 0
        if (
            len(shape) != len(spec.shape)
            or shape[1:] != spec.shape[1:]
            or row < 0
            or (row + rows > spec.shape[0] if shape else row != 0)
        ):
            raise InputError(f"{what}: {shape} from row {row} does not fit {spec.shape}", mend="write what was planned")
        # detach, resolve and copy to the CPU first: a view in memory order is what the file holds
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        begin = row * math.prod(spec.shape[1:]) * spec.dtype.itemsize
        buffer = data.numpy().data
        self._files.write(place.file, buffer, place.start + begin, what)
        with self._lock:
            self._covered[name].add(begin, begin + len(buffer))

    def missing(self) -> tuple[str, ...]:
        """Names of planned tensors that were not written whole, in the order of the plan."""
        with self._lock:
            return tuple(
                name
                for name, place in self._places.items()
                if place.spec.nbytes and not self._covered[name].covers(place.spec.nbytes)
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
