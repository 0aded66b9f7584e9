"""The child process of ``pickled``: ``python -P -m bitwright.io.unpickle FOLDER PICKLE ...``.

Writes ``FOLDER/00000/model.safetensors`` and so on. Reports an error as one JSON object on the standard output.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from bitwright.core.tensor import DTYPES, TensorSpec
from bitwright.errors import BitwrightError, InputError
from bitwright.io.files import os_error
from bitwright.io.safetensors_writer import SafetensorsWriter, plan_shards
from bitwright.io.text import printable, quoted

_MEND = "convert the model to safetensors with a tool that you trust"
#: tied weights are stored once and written twice; more than that is not a checkpoint but a bomb
_MAX_GROWTH = 4
_SLACK_BYTES = 2**24


def convert(source: Path, folder: Path) -> None:
    """Write the state dict pickled in ``source`` to ``folder/model.safetensors``. Raises InputError, ResourceError."""
    where = printable(source.name)
    tensors = _load(source, where)
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    total = sum(spec.nbytes for spec in specs)
    if total > _MAX_GROWTH * source.stat().st_size + _SLACK_BYTES:
        raise InputError(f"{where}: {source.stat().st_size} bytes would become {total}", mend=_MEND)
    folder.mkdir()
    with SafetensorsWriter(folder, plan_shards(specs, max_shard_bytes=2**63 - 1)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _load(source: Path, where: str) -> dict[str, torch.Tensor]:
    with source.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        # weights_only stays True: there is no second attempt without it.
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = printable(" ".join(str(error).split())[:300])
        raise InputError(f"{where}: refused by torch.load(weights_only=True): {reason}", mend=_MEND) from error
    except (EOFError, AssertionError, ImportError, zipfile.BadZipFile) as error:
        raise InputError(f"{where}: not a readable pickle ({type(error).__name__})", mend=_MEND) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise InputError(f"{where}: not a state dict but a {type(loaded).__name__}", mend=_MEND)
    for name, tensor in loaded.items():
        _check(name, tensor, where)
    return dict(loaded)


def _check(name: object, tensor: object, where: str) -> None:
    what = f"{where}, entry {quoted(str(name))}"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise InputError(f"{what}: a {type(tensor).__name__}, not a named tensor", mend=_MEND)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise InputError(f"{what}: not a plain tensor", mend=_MEND)
    if tensor.dtype not in DTYPES.values():
        raise InputError(f"{what}: dtype {tensor.dtype} has no safetensors name", mend=_MEND)


def main(arguments: list[str]) -> int:
    """Convert every pickle named; returns the exit code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(arguments[0])
    try:
        for index, source in enumerate(arguments[1:]):
            try:
                convert(Path(source), folder / f"{index:05d}")
            except OSError as error:
                raise os_error(error, printable(source)) from error
    except BitwrightError as error:
        print(json.dumps({"error": error.message, "mend": error.mend}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
