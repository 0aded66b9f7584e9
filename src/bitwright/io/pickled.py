"""Pickled weights, converted to safetensors in a child process that unpickles tensors and plain containers only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bitwright.errors import InputError, ResourceError
from bitwright.io.files import os_error
from bitwright.io.text import printable

__all__ = ["convert_pickles", "remove_scratch"]

_MEND = "convert the model to safetensors with a tool that you trust"


def convert_pickles(files: Sequence[Path], scratch: Path | None) -> tuple[list[Path], Path]:
    """One safetensors file per pickle, in order, in a new private folder below ``scratch``, and that folder.

    The child uses ``torch.load(weights_only=True)`` and nothing else: whatever that refuses raises InputError here, as
    does a child that was killed. A full disk raises ResourceError. The caller calls ``remove_scratch`` in the end.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="bitwright-pickle-", dir=scratch))
    except OSError as error:
        raise os_error(error, f"temporary folder in {printable(str(scratch or tempfile.gettempdir()))}") from error
    try:
        _run_child([file.resolve() for file in files], folder)
    except BaseException:
        remove_scratch(folder, os.getpid())
        raise
    return [folder / f"{index:05d}" / "model.safetensors" for index in range(len(files))], folder


def remove_scratch(folder: Path, owner: int) -> None:
    """Remove the folder of a converted copy, unless this process is a fork of the one (``owner``) that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _run_child(files: Sequence[Path], folder: Path) -> None:
    where = f"{printable(files[0].name)}{' and others' if len(files) > 1 else ''}"
    # -P: neither the working directory nor the model folder can provide a module
    command = [sys.executable, "-P", "-m", "bitwright.io.unpickle", str(folder), *map(str, files)]
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise os_error(error, f"{where}: the converting process did not start") from error
    if done.returncode == 0:
        return
    if done.returncode < 0:
        name = signal.strsignal(-done.returncode)
        raise InputError(
            f"{where}: the process that read this pickle was killed by signal {-done.returncode} ({name})", mend=_MEND
        )
    try:
        report = json.loads(done.stdout)
        message, mend = printable(str(report["error"])[:2000]), printable(str(report["mend"])[:500])
    except (ValueError, KeyError, TypeError):
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise InputError(f"{where}: the pickle could not be read ({printable(last[:500])})", mend=_MEND) from None
    raise (ResourceError if done.returncode == ResourceError.exit_code else InputError)(message, mend=mend or _MEND)
