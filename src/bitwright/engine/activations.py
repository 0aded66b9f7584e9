"""Hidden states between blocks: in memory up to a cap, on disk always, in two generations so that a run can resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from bitwright.core.tensor import parse_dtype
from bitwright.errors import InputError

__all__ = ["ActivationStore", "ActivationWriter"]

_CHUNK = 1 << 24


class ActivationWriter:
    """Writes one generation, tensor by tensor; ``finish`` returns its SHA-256."""

    def __init__(self, path: Path, keep: bool) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._index: list[tuple[str, list[int], int]] = []
        self._offset = 0
        self.kept: list[torch.Tensor] | None = [] if keep else None

    def append(self, tensor: torch.Tensor) -> None:
        """Add the next tensor."""
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        self._file.write(data)
        self._digest.update(data)
        self._index.append((str(tensor.dtype), list(tensor.shape), self._offset))
        self._offset += len(data)
        if self.kept is not None:
            self.kept.append(tensor)

    def close(self) -> None:
        """Close the file; without ``finish`` before, the generation is not whole."""
        self._file.close()

    def finish(self) -> str:
        """Flush to the disk; the hash covers the whole file."""
        index = json.dumps(self._index).encode()
        tail = index + len(index).to_bytes(8, "little")
        self._file.write(tail)
        self._digest.update(tail)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


class ActivationStore:
    """The hidden states that enter the next block.

    cap_bytes: a generation larger than this is not held in memory but read back tensor by tensor.
    """

    def __init__(self, folder: Path, *, cap_bytes: int, total_bytes: int) -> None:
        self._folder = folder
        self._keep = total_bytes <= cap_bytes
        self._tensors: list[torch.Tensor] | None = None
        self._path: Path | None = None
        self._index: list[tuple[str, list[int], int]] = []

    def file(self, step: int) -> Path:
        """File of the generation that a step leaves behind: two take turns."""
        return self._folder / f"activations-{step % 2}.bin"

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._tensors is not None:
            return self._tensors[index]
        assert self._path is not None
        dtype, shape, offset = self._index[index]
        tensor = torch.empty(shape, dtype=parse_dtype(dtype))
        with self._path.open("rb") as file:
            file.seek(offset)
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            if file.readinto(buffer) != len(buffer):
                raise InputError(f"{self._path} is cut short", mend="start again with --resume never")
        return tensor

    def writer(self, step: int) -> ActivationWriter:
        """A writer for the generation of ``step``."""
        return ActivationWriter(self.file(step), self._keep)

    def adopt(self, writer: ActivationWriter) -> None:
        """Make a finished generation the current one."""
        self._path, self._index, self._tensors = writer.path, writer._index, writer.kept

    def restore(self, step: int, expected: str) -> bool:
        """Make the generation of ``step`` the current one; False where its file is absent or its hash differs."""
        path = self.file(step)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        digest = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(max(size - 8, 0))
            length = int.from_bytes(file.read(8), "little")
            body = size - 8 - length
            if body < 0:
                return False
            file.seek(0)
            left = size
            while left > 0 and (chunk := file.read(min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest() != expected:
                return False
            file.seek(body)
            self._index = [(dtype, shape, offset) for dtype, shape, offset in json.loads(file.read(length))]
        self._path, self._tensors = path, None
        if self._keep:
            self._tensors = [self[i] for i in range(len(self._index))]
        return True

    def release(self) -> None:
        """Drop what is held in memory."""
        self._tensors = None
