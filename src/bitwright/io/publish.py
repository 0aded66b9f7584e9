"""Atomic output: everything is written in a hidden folder beside the output path, which then takes its name.

Beside ``OUT`` lie, while a run is in progress or after one was killed:

- ``.OUT.bitwright-lock``: holds the PID of the run that owns the rest;
- ``.OUT.bitwright-partial``: the output being written; its subfolder ``.bitwright`` (``Staging.work``) holds what a
  resumed run needs and is never published. Without it the partial folder is stale;
- ``.OUT.bitwright-old``: the output that is being replaced, where the system cannot exchange two folders in one step;
- ``.OUT.bitwright-trash``: what is being deleted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bitwright.errors import InputError, ResourceError
from bitwright.io.files import free_bytes, os_error
from bitwright.io.rename import exchange, fsync_folder, fsync_tree, move_aside_and_in
from bitwright.io.text import printable

__all__ = ["Staging"]

_WORK = ".bitwright"
#: in the work folder: files that are being renamed to their places -> device and inode
_MOVING = "moving.json"


class Staging:
    """The private folder of one run, and the exclusive right to publish to one output path.

    Use as ``with Staging.acquire(...) as staging``: leaving the block gives the lock back and keeps a partial output
    that can be resumed. A run killed at any moment leaves the output path absent, or as it was, or whole.
    """

    def __init__(self, output: Path, overwrite: bool, lock: int, *, file: bool = False) -> None:
        self._output = output
        self._overwrite = overwrite
        self._file = file
        self._lock: int | None = lock

    @classmethod
    def acquire(cls, output: Path, overwrite: bool = False, source: Path | None = None, *, file: bool = False) -> Self:
        """Check the output path, lock it, clean up after dead runs, and make the partial folder.

        overwrite: an existing model folder may be replaced; source: the model being read, which must be elsewhere; file: the output
        is a file (``publish_files``), not a folder (``publish``). Raises InputError where the path cannot be used or another process
        works on it.
        """
        output = _checked(output, overwrite, source, file)
        staging = cls(output, overwrite, _lock(output), file=file)
        try:
            staging._clean()
            _check_output(output, overwrite, file)  # again: _clean may have restored it, another run may have ended
            _own_folder(staging.folder)
            _own_folder(staging.work)
        except OSError as error:
            staging._unlock()
            raise os_error(error, printable(str(staging.folder)), folder=output.parent) from error
        except BaseException:
            staging._unlock()
            raise
        return staging

    @property
    def output(self) -> Path:
        """The path that ``publish`` gives to the folder."""
        return self._output

    @property
    def folder(self) -> Path:
        """The partial output: whatever lies in it is published, except ``work``."""
        return _beside(self._output, "partial")

    @property
    def work(self) -> Path:
        """A folder for journal and intermediate files, inside ``folder``, never published."""
        return self.folder / _WORK

    @property
    def exists_partial(self) -> bool:
        """True where a killed run left something to resume, that is, where ``work`` holds anything."""
        return _is_resumable(self.folder)

    def reset(self) -> None:
        """Delete all partial content, ``work`` included, and begin anew."""
        self._require_lock()
        try:
            self._delete(self.folder)
            _own_folder(self.folder)
            _own_folder(self.work)
        except OSError as error:
            raise os_error(error, printable(str(self.folder))) from error

    def require_space(self, needed_bytes: int) -> None:
        """Raise ResourceError unless the disk has ``needed_bytes`` bytes free for this user."""
        free = free_bytes(self._output.parent)
        if free < needed_bytes:
            raise ResourceError(
                f"{printable(str(self._output.parent))}: {needed_bytes} bytes needed, {free} bytes free",
                mend=f"free {needed_bytes - free} bytes, or choose an output path on another disk",
            )

    def publish(self) -> None:
        """Bring everything to the disk, drop ``work``, give files the permissions of the umask, and take the name.

        Gives the lock back. Raises InputError if the output path was taken meanwhile, ResourceError if the disk
        failed; the partial folder is then still there.
        """
        self._require_lock()
        output, parent = self._output, self._output.parent
        try:
            _check_output(output, self._overwrite, self._file)
            fsync_tree(self.folder, _umask(), skip=_WORK)
            self._take_name()
            fsync_folder(parent)
            for replaced in (_beside(output, "trash"), self.folder, _beside(output, "old")):
                self._delete(replaced)
        except OSError as error:
            raise os_error(error, f"publishing {printable(str(output))}", folder=parent) from error
        self.release()

    def check_files(self, names: Sequence[str], sources: Sequence[Path]) -> None:
        """Raise InputError where ``publish_files`` would refuse these names, or would write over one of the files that are read."""
        for name in names:
            target = self._output.parent / name
            for source in sources:
                _check_apart(target, source)
            _check_output(target, self._overwrite, True)

    def publish_files(self, names: Sequence[str]) -> list[Path]:
        """Bring files of the partial folder to the disk and rename them to their places beside each other; the rest is dropped.

        The first name, which readers open, appears last. Gives the lock back. Raises as ``publish`` does.
        """
        self._require_lock()
        parent = self._output.parent
        targets = [parent / name for name in names]
        try:
            for target in targets:
                _check_output(target, self._overwrite, True)
            fsync_tree(self.folder, _umask(), skip=_WORK)
            self._note_files(names)
            for target in reversed(targets):
                os.replace(self.folder / target.name, target)
            fsync_folder(parent)
            self._delete(self.folder)
        except OSError as error:
            raise os_error(error, f"publishing {printable(str(self._output))}", folder=parent) from error
        self.release()
        return targets

    def _note_files(self, names: Sequence[str]) -> None:
        """Write down which files are about to be renamed, so that a run killed in between can be told from somebody else's files."""
        status = {name: (self.folder / name).lstat() for name in names}
        with (self.work / _MOVING).open("w", encoding="utf-8") as file:
            json.dump({name: [found.st_dev, found.st_ino] for name, found in status.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self.work)

    def take_back(self) -> None:
        """Fetch files that a run which was killed inside ``publish_files`` had renamed already, and nothing else."""
        self._require_lock()
        note = self.work / _MOVING
        try:
            noted = json.loads(note.read_text(encoding="utf-8"))
            for name, place in noted.items():
                target = self._output.parent / name
                if not os.path.lexists(self.folder / name) and os.path.lexists(target):
                    found = target.lstat()
                    if place == [found.st_dev, found.st_ino]:
                        os.replace(target, self.folder / name)
            note.unlink()
        except FileNotFoundError:
            return
        except ValueError:
            note.unlink()  # killed while it was written: nothing had been renamed
        except OSError as error:
            raise os_error(error, printable(str(self.folder)), folder=self._output.parent) from error

    def _take_name(self) -> None:
        """The renames of ``publish``; where they fail, the partial output is resumable as before. Raises OSError."""
        output, trash = self._output, _beside(self._output, "trash")
        self._delete(trash)
        os.rename(self.work, trash)
        try:
            fsync_folder(self.folder)
            if not os.path.lexists(output):
                os.rename(self.folder, output)
            elif not exchange(self.folder, output):
                move_aside_and_in(self.folder, output, _beside(output, "old"))
        except OSError:
            os.rename(trash, self.work)
            raise

    def discard(self) -> None:
        """Delete the partial output and give the lock back."""
        self._require_lock()
        try:
            self._delete(self.folder)
        except OSError as error:
            raise os_error(error, printable(str(self.folder))) from error
        self.release()

    def release(self) -> None:
        """Give the lock back and keep a partial output that can be resumed; one that cannot is deleted."""
        if self._lock is None:
            return
        if os.path.lexists(self.folder) and not self.exists_partial:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is None:
            return
        # Unlinked before it is unlocked: whoever waits on the old file sees that it is no longer the one at the path.
        _beside(self._output, "lock").unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _require_lock(self) -> None:
        if self._lock is None:
            raise InputError(f"{printable(str(self._output))}: already published or released", mend="acquire it again")

    def _clean(self) -> None:
        """Bring what a dead run left to one of two states: resumable, or nothing there but the output."""
        if os.path.lexists(self.folder):
            _refuse_foreign(self.folder)
        old = _beside(self._output, "old")
        if os.path.lexists(old) and not os.path.lexists(self._output):
            os.rename(old, self._output)  # killed between the two renames of move_aside_and_in
            fsync_folder(self._output.parent)
        self._delete(_beside(self._output, "trash"))
        self._delete(old)
        if os.path.lexists(self.folder) and not _is_resumable(self.folder):
            # Also the replaced output of a run that was killed right after the exchange.
            self._delete(self.folder)

    def _delete(self, path: Path) -> None:
        """Rename to the trash, then delete: a kill in between leaves nothing that looks resumable."""
        trash = _beside(self._output, "trash")
        if os.path.lexists(trash):
            _refuse_foreign(trash)
            shutil.rmtree(trash)
        if path != trash and os.path.lexists(path):
            os.rename(path, trash)
            shutil.rmtree(trash)


def _beside(output: Path, kind: str) -> Path:
    return output.parent / f".{output.name}.bitwright-{kind}"


def _is_resumable(folder: Path) -> bool:
    work = folder / _WORK
    return not folder.is_symlink() and work.is_dir() and any(work.iterdir())


def _checked(output: Path, overwrite: bool, source: Path | None, file: bool) -> Path:
    """The output path with its parent resolved, after all checks that need no lock."""
    where = printable(str(output))
    absolute = Path(os.path.abspath(output))
    try:
        parent = absolute.parent.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of symbolic links; a NUL in the name
        raise InputError(f"{where}: the parent folder does not exist", mend="create it first") from error
    resolved = parent / absolute.name
    if not absolute.name or not parent.is_dir():
        raise InputError(f"{where}: not a usable output path", mend="name a folder that does not exist yet")
    if source is not None:
        _check_apart(resolved, source)
    _check_output(resolved, overwrite, file)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{printable(str(parent))}: cannot be written to", mend="choose another output path")
    return resolved


def _check_apart(output: Path, source: Path) -> None:
    # By inode, not by text: bind mounts and file systems that ignore case give one folder several names.
    target = output.resolve() if output.exists() else output
    origin = source.resolve()
    inside = any(_is_same(place, origin) for place in (target, *target.parents))
    contains = any(_is_same(place, target) for place in origin.parents)
    if inside or contains:
        relation = "is, or lies inside," if inside else "contains"
        raise InputError(
            f"{printable(str(output))}: the output {relation} the source {printable(str(source))}",
            mend="choose an output path outside of the model that is read",
        )


def _is_same(first: Path, second: Path) -> bool:
    if first == second:
        return True
    return first.exists() and second.exists() and first.samefile(second)


def _check_output(output: Path, overwrite: bool, file: bool = False) -> None:
    where = printable(str(output))
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise InputError(f"{where}: exists already", mend="choose another output path, or pass --overwrite")
    if file:
        if output.is_symlink() or not output.is_file():
            raise InputError(
                f"{where}: not a plain file, which alone is overwritten", mend="choose another output path"
            )
        return
    if output.is_symlink() or not output.is_dir() or output.is_mount():
        raise InputError(f"{where}: not a plain folder, which alone is overwritten", mend="choose another output path")
    names = os.listdir(output)
    if _WORK in names:
        raise InputError(
            f"{where}: holds a folder {_WORK}: not a finished output", mend="delete it yourself, or move it"
        )
    # --overwrite with a mistyped path must not delete somebody's home folder
    if names and "config.json" not in names and not any(name.endswith((".safetensors", ".gguf")) for name in names):
        raise InputError(
            f"{where}: does not look like a model folder, so it is not overwritten",
            mend="delete it yourself, or move it",
        )


def _own_folder(path: Path) -> None:
    """Make a folder that only this user can enter; one that is there already must be this user's, and no link."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        _refuse_foreign(path)


def _refuse_foreign(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise InputError(f"{printable(str(path))}: not a folder of this user", mend="delete it")


def _lock(output: Path) -> int:
    """An exclusively locked descriptor of the lock file, with this PID in it."""
    path = _beside(output, "lock")
    where = printable(str(path))
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise os_error(error, where, folder=output.parent) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        except BlockingIOError:
            holder = printable(os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()) or "unknown"
            os.close(descriptor)
            raise InputError(
                f"{printable(str(output))}: another bitwright (PID {holder}) is writing it",
                mend="wait for it, or choose another output path",
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:
                raise ResourceError(f"{where}: the file system has no locks", mend="write to another disk") from error
            raise os_error(error, where, folder=output.parent) from error
        os.close(descriptor)  # the holder before us removed this file: lock the one that is there now


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _umask() -> int:
    """This process's umask, read without changing it for other threads where the system offers that."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except FileNotFoundError:
        pass  # not Linux
    current = os.umask(0o077)
    os.umask(current)
    return current
