"""Renames that are atomic or do not happen: exchange two folders, move one to a name that is free."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

__all__ = ["exchange", "fsync_folder", "fsync_tree", "move_aside_and_in"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: the kernel, the C library or the file system cannot exchange
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV}


def exchange(first: Path, second: Path) -> bool:
    """Let two existing paths change names in one step (Linux renameat2); False where the system cannot.

    Raises OSError for other failures; then nothing has happened.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def move_aside_and_in(new: Path, output: Path, aside: Path) -> None:
    """Rename ``output`` to ``aside`` and ``new`` to ``output``; on failure undo the first. Raises OSError."""
    os.rename(output, aside)
    try:
        os.rename(new, output)
    except BaseException:
        os.rename(aside, output)
        raise


def fsync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path, umask: int, *, skip: str = "") -> None:
    """Give every file 0666 and every folder 0777, less ``umask``, and bring all to the disk. Raises OSError.

    skip: a name directly in ``folder`` that is left alone. Symbolic links and whatever else is neither a regular file
    nor a folder raise OSError (EINVAL).
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == skip:
            continue
        if entry.is_dir(follow_symlinks=False):
            fsync_tree(Path(entry.path), umask)
            continue
        if not entry.is_file(follow_symlinks=False):
            raise OSError(errno.EINVAL, "not a regular file", entry.path)
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fchmod(descriptor, 0o666 & ~umask)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.chmod(folder, 0o777 & ~umask)
    fsync_folder(folder)
