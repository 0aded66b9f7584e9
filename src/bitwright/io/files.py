"""Small helpers over file descriptors: open regular files only, read and write all bytes, tell errors apart."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
from pathlib import Path

from bitwright.errors import BitwrightError, InputError, ResourceError
from bitwright.io.text import printable

__all__ = [
    "Signature",
    "free_bytes",
    "open_regular",
    "os_error",
    "read_at",
    "read_small_file",
    "require_little_endian",
    "sha256_file",
    "signature",
    "write_at",
    "write_text",
]

#: one system call moves at most this much: Linux stops at 2 GiB - 4 KiB, and signals stay answered
CHUNK_BYTES = 2**30
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

#: device, inode, size in bytes and mtime in nanoseconds: changes when a file is replaced, truncated or rewritten
Signature = tuple[int, int, int, int]


def signature(status: os.stat_result) -> Signature:
    """What identifies a file's content during one run."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def require_little_endian() -> None:
    """Checkpoints are little endian and are moved without conversion; raises ResourceError elsewhere."""
    if sys.byteorder != "little":
        raise ResourceError("this machine is big endian, checkpoints are little endian", mend="use another machine")


def os_error(
    error: OSError, what: str, *, needed_bytes: int | None = None, folder: Path | None = None
) -> BitwrightError:
    """The error of this package that an OSError means: a full disk or table is a ResourceError, all else an InputError.

    what: the file (and tensor) concerned; needed_bytes: what was to be written, named beside what ``folder`` has free.
    """
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in _FULL:
        needed = "" if needed_bytes is None else f", {needed_bytes} bytes needed"
        free = "" if folder is None else f", {free_bytes(folder)} bytes free"
        return ResourceError(
            f"{what}: {reason}{needed}{free}", mend="free disk space or raise the limit, then run it again"
        )
    if error.errno in _EXHAUSTED:
        return ResourceError(f"{what}: {reason}", mend="raise the limit (ulimit -n) or free memory")
    if error.errno == errno.EIO:
        return ResourceError(f"{what}: {reason}", mend="check the disk")
    return InputError(f"{what}: {reason}", mend="check the path and its permissions")


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write on the file system of ``folder``."""
    return shutil.disk_usage(folder).free


def open_regular(path: Path, where: str) -> int:
    """A read-only descriptor of a regular file; ``where`` names it. InputError for anything else (FIFO, folder)."""
    try:
        # O_NONBLOCK: opening a FIFO without a writer would wait for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise os_error(error, where) from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{where}: not a usable path", mend="check the path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{where}: not a regular file", mend="check the path")
    return descriptor


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on; returns how many bytes there were, fewer only at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done : done + CHUNK_BYTES]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write all of ``buffer`` at ``offset``; raises OSError as the system does."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done : done + CHUNK_BYTES], offset + done)


def read_small_file(path: Path, *, max_bytes: int) -> bytes:
    """The whole file, at most ``max_bytes`` bytes; raises InputError naming it otherwise."""
    where = printable(str(path))
    descriptor = open_regular(path, where)
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise InputError(f"{where}: {size} bytes, at most {max_bytes} are read", mend="check the file")
        try:
            data = bytearray(size)
            count = read_at(file.fileno(), memoryview(data), 0)
        except OSError as error:
            raise os_error(error, where) from error
    if count != size:
        raise InputError(f"{where}: the file shrank while it was read", mend="keep the files still during a run")
    return bytes(data)


def sha256_file(path: Path) -> str:
    """SHA-256 of the whole file, hexadecimal; raises InputError naming it where it cannot be read."""
    where = printable(str(path))
    with open(open_regular(path, where), "rb", buffering=0) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise os_error(error, where) from error


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole, or leave the one before; raises InputError or ResourceError naming it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise os_error(error, f"writing {printable(str(path))}", folder=_existing(path.absolute().parent)) from error


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
