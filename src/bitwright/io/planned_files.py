"""Files of known heads and sizes, created whole and filled in any order: what the writers of checkpoints share."""

from __future__ import annotations

import ctypes
import errno
import os
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import ResumeError
from bitwright.io.files import os_error, read_at, write_at
from bitwright.io.text import printable

__all__ = ["RESUME_MEND", "Intervals", "PlannedFile", "PlannedFiles"]

RESUME_MEND = "delete the partial output and start again"
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file to be written: its name, its first bytes and its exact size."""

    file_name: str
    header: bytes
    total_bytes: int


class PlannedFiles:
    """Open files in ``folder``, created at their full size with their headers, or with ``resume`` those of an earlier run.

    Resumed files must have the planned sizes and headers, else ResumeError. Raises ResourceError where the disk cannot hold the
    files; files made until then are removed. Threads may share it; ``close`` must not run beside writes.
    """

    def __init__(self, folder: Path, files: Sequence[PlannedFile], *, resume: bool = False) -> None:
        self._folder = folder
        self._descriptors: list[int] = []
        self._closer = weakref.finalize(self, _close_all, self._descriptors)
        try:
            for file in files:
                self._descriptors.append(self._reopen(file) if resume else self._create(file))
        except BaseException:
            made = len(self._descriptors)
            _close_all(self._descriptors)
            if not resume:
                for file in files[:made]:
                    (folder / file.file_name).unlink(missing_ok=True)
            raise

    def _create(self, file: PlannedFile) -> int:
        path = self._folder / file.file_name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise os_error(error, printable(str(path)), folder=self._folder) from error
        try:
            _allocate(descriptor, file.total_bytes)
            write_at(descriptor, memoryview(file.header), 0)
        except OSError as error:
            os.close(descriptor)
            path.unlink()
            raise os_error(error, printable(str(path)), needed_bytes=file.total_bytes, folder=self._folder) from error
        return descriptor

    def _reopen(self, file: PlannedFile) -> int:
        path = self._folder / file.file_name
        where = printable(str(path))
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise ResumeError(f"{where}: missing in the partial output", mend=RESUME_MEND) from None
        except OSError as error:
            raise os_error(error, where) from error
        header = bytearray(len(file.header))
        read_at(descriptor, memoryview(header), 0)
        if os.fstat(descriptor).st_size != file.total_bytes or header != file.header:
            os.close(descriptor)
            raise ResumeError(f"{where}: size or header differ from the plan", mend=RESUME_MEND)
        return descriptor

    @property
    def closed(self) -> bool:
        """True after ``close``, and where no file was planned."""
        return not self._descriptors

    def write(self, file: int, buffer: memoryview, offset: int, what: str) -> None:
        """Store ``buffer`` at ``offset`` of the file with this place in the plan; ``what`` names it in errors."""
        try:
            write_at(self._descriptors[file], buffer, offset)
        except OSError as error:
            raise os_error(error, what, needed_bytes=len(buffer), folder=self._folder) from error

    def sync(self) -> None:
        """Return only when everything written so far is on the disk. Raises ResourceError if the disk fails."""
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        except OSError as error:
            raise os_error(error, printable(str(self._folder)), folder=self._folder) from error

    def close(self) -> None:
        """Close the files. Does not sync, and may be called twice."""
        _close_all(self._descriptors)


class Intervals:
    """A set of byte ranges, kept sorted and merged: repeated writes must not count twice."""

    __slots__ = ("_begins", "_ends")

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Add the bytes ``begin .. end``."""
        if begin == end:
            return
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]

    def covers(self, size: int) -> bool:
        """True where the ranges are exactly ``0 .. size``."""
        return self._begins == [0] and self._ends == [size]


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _allocate(descriptor: int, size: int) -> None:
    """Reserve ``size`` bytes, so that a full disk is met now; where the file system cannot, only set the size.

    libc's fallocate and not posix_fallocate: the latter imitates missing support by writing every block, which takes
    minutes per shard on network file systems.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        while fallocate(descriptor, 0, 0, size) != 0:
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        else:
            return
    os.truncate(descriptor, size)
