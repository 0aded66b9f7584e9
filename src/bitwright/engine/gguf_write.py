"""Write a GGUF file: tensor by tensor and rows at a time, in an order that does not matter, resumable, verified before it is published.

One step is what lies outside the blocks, or one block; a step is committed to the journal when its tensors are on the disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitwright.blocks import codec
from bitwright.blocks.codec import Bytes, Floats
from bitwright.blocks.types import BlockType
from bitwright.engine.gguf_source import GgufSource, Place
from bitwright.engine.interrupt import StopRequest
from bitwright.engine.journal import Commit, Journal
from bitwright.engine.progress import Progress
from bitwright.errors import BitwrightError, NumericError, Stopped, VerifyError
from bitwright.gguf.imatrix import ImportanceMatrix
from bitwright.gguf.mixture import by_layer
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import GgufValue
from bitwright.io.gguf_writer import GgufEntry, GgufPart, GgufWriter, plan_gguf
from bitwright.io.heap import release_free_memory

__all__ = ["CHUNK_VALUES", "Target", "plan_file", "verify_file", "write_file"]

#: Rows are read, quantized and written in pieces of about this many values.
CHUNK_VALUES = 8 * 1024 * 1024
_MEND = "run it again; if it repeats, the disk or the memory is faulty"


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the file to be. copy: its bytes stay as they are."""

    place: Place
    block: BlockType
    copy: bool = False
    reason: str = ""

    @property
    def nbytes(self) -> int:
        """Data bytes, padding not counted."""
        return self.place.rows * self.block.row_bytes(self.place.columns)


def plan_file(
    values: Mapping[str, GgufValue], targets: Sequence[Target], *, stem: str, max_part_bytes: int | None
) -> tuple[GgufPart, ...]:
    """The files, to the byte; tensors in llama.cpp's order."""
    ordered = sorted(targets, key=lambda target: by_layer(target.place.name))
    entries = [GgufEntry(target.place.name, target.place.shape, target.block) for target in ordered]
    return plan_gguf(values, entries, stem=stem, max_part_bytes=max_part_bytes)


@dataclass
class _Work:
    source: GgufSource
    writer: GgufWriter
    imatrix: ImportanceMatrix | None
    hashes: dict[str, str] = field(default_factory=dict)

    def write(self, target: Target) -> None:
        place = target.place
        digest = hashlib.sha256()
        weights = None
        if self.imatrix is not None and target.block.blocked and not target.copy:
            weights = self.imatrix.weights(place.name, place.columns, place.matrices)
        for start, stop in pieces(place):
            if target.copy:
                data = self.source.raw(place.name, (start, stop))
            else:
                data = self._quantized(target, self.source.read(place.name, (start, stop)), start, weights)
            self.writer.write(place.name, data, start)
            digest.update(data.data)
        self.hashes[place.name] = digest.hexdigest()

    @staticmethod
    def _quantized(target: Target, x: Floats, start: int, weights: Floats | None) -> Bytes:
        name = target.place.name
        own = None
        if weights is not None:
            own = weights[start // (target.place.rows // target.place.matrices)]
            if float(own.max()) <= 0:
                own = None  # nothing was ever read here: weigh all columns alike
        try:
            return codec.quantize(x, target.block.name, own)
        except NumericError as error:
            raise NumericError(f"{name}: {error.message}", mend=error.mend) from error
        except BitwrightError as error:
            raise type(error)(f"{name}: {error.message}", mend=error.mend) from error


def pieces(place: Place) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``CHUNK_VALUES`` values; none crosses from one expert into the next."""
    per_matrix = place.rows // place.matrices
    step = max(1, min(per_matrix, CHUNK_VALUES // max(1, place.columns)))
    for matrix in range(place.matrices):
        first = matrix * per_matrix
        for start in range(0, per_matrix, step):
            yield first + start, first + min(start + step, per_matrix)


def steps(targets: Sequence[Target]) -> list[list[Target]]:
    """What is committed together: outside the blocks, then block by block."""
    groups: dict[int, list[Target]] = {}
    for target in sorted(targets, key=lambda target: by_layer(target.place.name)):
        groups.setdefault(by_layer(target.place.name)[0], []).append(target)
    return list(groups.values())


def write_file(
    source: GgufSource,
    targets: Sequence[Target],
    parts: Sequence[GgufPart],
    folder: Path,
    journal: Journal,
    imatrix: ImportanceMatrix | None,
    progress: Progress,
    *,
    check: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Fill the planned files in ``folder``, going on after the journal's last commit; SHA-256 of each tensor's bytes.

    Raises Stopped after a committed step where SIGINT or SIGTERM came, NumericError naming the tensor for values that are not finite.
    """
    groups = steps(targets)
    written = [name for commit in journal.commits for name in commit.hashes]
    if not journal.commits:
        for part in parts:
            (folder / part.file_name).unlink(missing_ok=True)
    progress.begin(len(groups), "writing")
    with (
        GgufWriter(folder, parts, resume=bool(journal.commits), written=written) as writer,
        StopRequest() as stop,
    ):
        for index, group in enumerate(groups):
            layer = by_layer(group[0].place.name)[0]
            label = "outside the blocks" if layer < 0 else f"block {layer}"
            if index < len(journal.commits):
                progress.step(f"{label} (already committed)")
                continue
            began = time.monotonic()
            work = _Work(source, writer, imatrix)
            for target in group:
                work.write(target)
            release_free_memory()
            writer.sync()
            journal.append(Commit(index, work.hashes))
            progress.step(f"{label} ({time.monotonic() - began:.1f} s)")
            if stop.requested() and index + 1 < len(groups):
                raise Stopped(
                    f"stopped after {len(journal.commits)} of {len(groups)} steps",
                    mend="run the same command again to continue",
                )
        missing = writer.missing()
        if missing:
            raise VerifyError(f"{len(missing)} tensors were never written, {missing[0]} first", mend="report this")
    check()
    return {name: value for commit in journal.commits for name, value in commit.hashes.items()}


def verify_file(
    path: Path, values: Mapping[str, GgufValue], targets: Sequence[Target], hashes: Mapping[str, str]
) -> None:
    """Open what was written anew and compare header values, types, shapes and every byte. VerifyError names what differs."""
    try:
        with GgufFile.open(path) as file:
            for key, value in values.items():
                if file.values.get(key) != value:
                    raise VerifyError(f"{key}: what was written differs", mend=_MEND)
            for target in targets:
                place = target.place
                found = file.tensors.get(place.name)
                if found is None or found.shape != place.shape or found.block != target.block:
                    raise VerifyError(f"{place.name}: type or shape differ from the plan", mend=_MEND)
                digest = hashlib.sha256()
                for rows in pieces(place):
                    digest.update(file.raw(place.name, rows).data)
                if digest.hexdigest() != hashes[place.name]:
                    raise VerifyError(f"{place.name}: what was written differs from what was computed", mend=_MEND)
    except VerifyError:
        raise
    except BitwrightError as error:
        raise VerifyError(f"what was written cannot be opened: {error.message}", mend=_MEND) from error
