"""A model folder with safetensors weights as a ``Source``: headers are parsed at once, data by ``pread`` on demand.

No memory maps: a file that is truncated during the run gives an InputError, not a SIGBUS.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch

from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, ResourceError
from bitwright.io.files import (
    Signature,
    open_regular,
    os_error,
    read_at,
    require_little_endian,
    sha256_file,
    signature,
)
from bitwright.io.header import Header, read_header
from bitwright.io.model_files import (
    already_quantized,
    load_config,
    refuse_remote_code,
    side_files,
    tokenizer_vocab_size,
)
from bitwright.io.pickled import convert_pickles, remove_scratch
from bitwright.io.text import printable, quoted
from bitwright.io.weight_files import WeightFiles, check_weight_map, find_pickles, find_safetensors

__all__ = ["SafetensorsDir", "already_quantized", "refuse_remote_code", "side_files", "tokenizer_vocab_size"]

_EDGE_BYTES = 2**20
_KEEP_STILL = "keep the files still during a run, then start again"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    where: str
    signature: Signature
    header: Header


class SafetensorsDir:
    """A model folder: config, tensor headers, and data on demand. Threads may share it.

    Descriptors open with the first read of each file and close with ``close``, the end of a ``with`` block, or the
    object. ``close`` must not run beside reads.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        files: Mapping[Path, _File],
        watched: Mapping[Path, Signature],
        scratch: Path | None,
    ) -> None:
        self._path = path
        self._config = config
        self._files = files
        self._watched = dict(watched)
        self._home = {spec.name: file for file in files.values() for spec in file.header.specs}
        self._specs = {spec.name: spec for file in files.values() for spec in file.header.specs}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closer = weakref.finalize(self, _close_all, self._descriptors)
        self._remover = weakref.finalize(self, remove_scratch, scratch, os.getpid()) if scratch is not None else None

    @classmethod
    def open(cls, path: Path, *, allow_pickle: bool = False, scratch: Path | None = None) -> Self:
        """Read the config and all headers of the model folder ``path``.

        allow_pickle: where there are only pickled weights, convert them in a child process by
        ``torch.load(weights_only=True)``; scratch: folder for the converted copy, which is as large as the model
        (default: the system's temporary folder). The copy goes when the object is closed.
        Raises InputError naming the file for everything that is not as it should be.
        """
        require_little_endian()
        config = load_config(path)
        found = find_safetensors(path)
        watched: dict[Path, Signature] = {}
        copy: Path | None = None
        if found is None:
            pickles = _pickles(path, allow_pickle)
            watched = {file: _signature(file) for file in pickles.files}
            converted, copy = convert_pickles(pickles.files, scratch)
            found = WeightFiles(tuple(converted), pickles.weight_map, pickles.index)
            names = {file: pickle.name for file, pickle in zip(converted, pickles.files, strict=True)}
        else:
            names = {file: file.name for file in found.files}
        try:
            files = {file: _read_file(file) for file in found.files}
            _check_tensors(path, found, {names[file]: files[file] for file in found.files})
            beside = [path / "config.json", *side_files(path), *([found.index] if found.index else [])]
            watched |= {file: _signature(file) for file in beside}
            watched |= {file.path: file.signature for file in files.values()}
            return cls(path, config, files, watched, copy)
        except BaseException:
            if copy is not None:
                remove_scratch(copy, os.getpid())
            raise

    @property
    def path(self) -> Path:
        """The model folder."""
        return self._path

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed ``config.json``; not to be changed."""
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name, in the order of the files and of the data in them."""
        return MappingProxyType(self._specs)

    @property
    def total_bytes(self) -> int:
        """Size of all tensor data."""
        return sum(spec.nbytes for spec in self._specs.values())

    def file_of(self, name: str) -> Path:
        """The file that holds tensor ``name``; raises InputError where there is none of that name."""
        return self._find(name).path

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Tensor ``name``, or rows ``start .. stop`` of its first axis, in its stored dtype, freshly allocated.

        Raises InputError naming file and tensor if the file changed or ended early; ResourceError without memory.
        """
        file = self._find(name)
        spec = self._specs[name]
        where = f"{file.where}, tensor {quoted(name)}"
        begin, end = file.header.offsets[name]
        shape = spec.shape
        if rows is not None:
            start, stop = rows
            if not shape or not 0 <= start <= stop <= shape[0]:
                raise InputError(f"{where}: rows {start}:{stop} of shape {shape} do not exist", mend="check the rows")
            row_bytes = math.prod(shape[1:]) * spec.dtype.itemsize
            begin, end = begin + start * row_bytes, begin + stop * row_bytes
            shape = (stop - start, *shape[1:])
        try:
            data = torch.empty(end - begin, dtype=torch.uint8)
        except RuntimeError as error:
            raise ResourceError(f"{where}: no memory for {end - begin} bytes", mend="free memory") from error
        try:
            count = read_at(self._descriptor(file), data.numpy().data, file.header.data_start + begin)
        except OSError as error:
            raise os_error(error, where) from error
        if count != end - begin:
            raise InputError(
                f"{where}: {count} of {end - begin} bytes could be read: source changed during the run",
                mend=_KEEP_STILL,
            )
        return data.view(spec.dtype).view(shape)

    def check_unchanged(self) -> None:
        """Raise InputError if a weight file, the config or a tokenizer file changed since ``open``."""
        for path, before in self._watched.items():
            if _signature(path) != before:
                raise InputError(f"{printable(str(path))}: source changed during the run", mend=_KEEP_STILL)

    def fingerprint(self) -> Mapping[str, str]:
        """File name -> SHA-256, independent of clocks.

        Weights: of size, header, and the first and last MiB of the data; config, index and tokenizer: of the content.
        """
        result = {
            path.name: sha256_file(path)
            for path in self._watched
            if path.parent == self._path and path.suffix not in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
        }
        for path, file in self._files.items():
            result[str(path.relative_to(path.parents[1])) if path.parent != self._path else path.name] = self._edges(
                file
            )
        return dict(sorted(result.items()))

    def _edges(self, file: _File) -> str:
        size = file.signature[2]
        digest = hashlib.sha256(f"{size} {file.header.sha256}".encode())
        for begin in (file.header.data_start, max(file.header.data_start, size - _EDGE_BYTES)):
            edge = bytearray(min(_EDGE_BYTES, size - begin))
            try:
                count = read_at(self._descriptor(file), memoryview(edge), begin)
            except OSError as error:
                raise os_error(error, file.where) from error
            if count != len(edge):
                raise InputError(f"{file.where}: source changed during the run", mend=_KEEP_STILL)
            digest.update(edge)
        return digest.hexdigest()

    def _find(self, name: str) -> _File:
        try:
            return self._home[name]
        except KeyError:
            raise InputError(f"{printable(str(self._path))}: no tensor {quoted(name)}", mend="check the name") from None

    def _descriptor(self, file: _File) -> int:
        with self._lock:
            descriptor = self._descriptors.get(file.path)
            if descriptor is None:
                descriptor = open_regular(file.path, file.where)
                if signature(os.fstat(descriptor)) != file.signature:
                    os.close(descriptor)
                    raise InputError(f"{file.where}: source changed during the run", mend=_KEEP_STILL)
                self._descriptors[file.path] = descriptor
            return descriptor

    def close(self) -> None:
        """Close the files and remove a converted copy. The object can be read again unless it was converted."""
        with self._lock:
            _close_all(self._descriptors)
        if self._remover is not None:
            self._remover()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _signature(path: Path) -> Signature:
    try:
        return signature(path.stat())
    except OSError as error:
        raise os_error(error, printable(str(path))) from error


def _read_file(path: Path) -> _File:
    where = printable(str(path))
    descriptor = open_regular(path, where)
    try:
        before = signature(os.fstat(descriptor))
        return _File(path, where, before, read_header(descriptor, before[2], where))
    finally:
        os.close(descriptor)


def _check_tensors(path: Path, found: WeightFiles, files: Mapping[str, _File]) -> None:
    if found.weight_map is not None and found.index is not None:
        tensors = {name: file.header.offsets for name, file in files.items()}
        check_weight_map(found.weight_map, tensors, found.index)
    if not any(file.header.specs for file in files.values()):
        raise InputError(f"{printable(str(path))}: the weights hold no tensor", mend="download the model again")


def _pickles(path: Path, allow_pickle: bool) -> WeightFiles:
    pickles = find_pickles(path)
    if pickles is None:
        raise InputError(
            f"{printable(str(path))}: no safetensors weights", mend="name the folder of a whole transformers model"
        )
    if not allow_pickle:
        raise InputError(
            f"{printable(str(path))}: only pickled weights ({quoted(pickles.files[0].name)}), "
            "which can run code when they are read",
            mend="convert the model to safetensors, or quantize it with --allow-pickle, which does so in a separate process",
        )
    return pickles
