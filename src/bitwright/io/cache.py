"""Results that are costly to get and cheap to keep, in a folder of the user's: entries by key, whole or absent, the oldest dropped first.

The folder is ``$BITWRIGHT_CACHE``, else ``$XDG_CACHE_HOME/bitwright``, else ``~/.cache/bitwright``. It may be deleted at any time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from bitwright.errors import InputError
from bitwright.io.files import os_error
from bitwright.io.text import printable

__all__ = ["cache_folder", "cached_folder"]

#: What all entries of a kind may take together before the ones that were used longest ago are dropped.
_LIMIT_BYTES = 20_000_000_000
_DONE = "done"


def cache_folder() -> Path:
    """Where entries lie; not created."""
    own = os.environ.get("BITWRIGHT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "bitwright"


def _limit_bytes() -> int:
    text = os.environ.get("BITWRIGHT_CACHE_BYTES")
    if not text:
        return _LIMIT_BYTES
    if not text.isdigit():
        raise InputError(f"BITWRIGHT_CACHE_BYTES '{printable(text)}' is not a number", mend="write bytes: 20000000000")
    return int(text)


def cached_folder(kind: str, key: str, build: Callable[[Path], None], *, root: Path | None = None) -> Path:
    """The folder of one entry; ``build`` fills a new one where there is none yet, and it appears only when it is whole.

    root: another folder than ``cache_folder()``. Errors of the disk become ResourceError.
    """
    shelf = (root or cache_folder()) / kind
    entry = shelf / key
    try:
        if (entry / _DONE).is_file():
            os.utime(entry / _DONE)
            return entry
        shelf.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{key[:16]}-", dir=shelf, ignore_cleanup_errors=True) as name:
            fresh = Path(name) / "entry"
            fresh.mkdir()
            build(fresh)
            (fresh / _DONE).touch()
            shutil.rmtree(entry, ignore_errors=True)
            try:
                os.rename(fresh, entry)
            except OSError:
                # Another process was faster.
                if not (entry / _DONE).is_file():
                    raise
        _prune(shelf, keep=entry)
    except OSError as error:
        raise os_error(error, f"keeping results in {printable(str(shelf))}", folder=_existing(shelf)) from error
    return entry


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _prune(shelf: Path, keep: Path) -> None:
    """Drop the entries that were used longest ago until the shelf is within its limit."""
    limit = _limit_bytes()
    entries = []
    for entry in shelf.iterdir():
        done = entry / _DONE
        if done.is_file():
            entries.append((done.stat().st_mtime_ns, sum(f.stat().st_size for f in entry.iterdir()), entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= limit:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
