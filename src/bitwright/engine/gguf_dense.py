"""From a GGUF file back to a checkpoint folder: names, row orders and settings as transformers has them, weights decoded.

Plain numbers come back bit for bit; blocks are decoded and rounded once to the dtype that is asked for.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitwright.core.tensor import TensorSpec
from bitwright.engine.progress import Progress, Silent
from bitwright.engine.run import versions
from bitwright.engine.tensors import CHUNK_ELEMENTS, bytes_of
from bitwright.errors import BitwrightError, NumericError, VerifyError
from bitwright.gguf.to_hf import HfView
from bitwright.io.files import os_error
from bitwright.io.gguf_check import check_hyperparameters
from bitwright.io.gguf_file import GgufFile
from bitwright.io.heap import release_free_memory
from bitwright.io.publish import Staging
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.safetensors_writer import SafetensorsWriter, index_json, plan_shards
from bitwright.io.text import printable

__all__ = ["DenseResult", "dense_from_gguf"]

_MEND = "run it again; if it repeats, the disk or the memory is faulty"


@dataclass(frozen=True)
class DenseResult:
    """What was written. hashes: tensor -> SHA-256 of its bytes; types: GGUF type -> how many tensors had it."""

    output: Path
    weight_file_bytes: int
    dtype: str
    hashes: dict[str, str] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A summary of plain values."""
        return {
            "output": str(self.output), "weight_file_bytes": self.weight_file_bytes, "dtype": self.dtype, "types": self.types,
        }  # fmt: skip


def dense_from_gguf(
    path: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> DenseResult:
    """Write the GGUF file ``path`` as the checkpoint folder ``output``; it appears only when it is whole and verified.

    dtype: of all floating-point tensors (default: the dtype that the file's own numbers say). Raises any of the errors in
    ``bitwright.errors``, InputError for architectures that are not known.
    """
    progress = progress or Silent()
    with GgufFile.open(path) as file:
        check_hyperparameters(file)
        view = HfView(file, dtype=dtype)
        shards = plan_shards(list(view.tensors.values()), max_shard_bytes)
        total = sum(shard.total_bytes for shard in shards)
        with Staging.acquire(output, overwrite=overwrite) as staging:
            try:
                staging.reset()
                staging.require_space(total)
                with SafetensorsWriter(staging.folder, shards) as sink:
                    hashes = _write(view, sink, progress)
                    sink.sync()
                _write_json(staging.folder / "config.json", dict(view.config))
                index = index_json(shards)
                if index is not None:
                    (staging.folder / "model.safetensors.index.json").write_bytes(index)
                view.write_tokenizer(staging.folder)
                types: dict[str, int] = {}
                for tensor in file.tensors.values():
                    types[tensor.block.name] = types.get(tensor.block.name, 0) + 1
                provenance = {
                    "bitwright": versions()["bitwright"],
                    "conversion": {"from": "gguf", "to": "dense", "types": types},
                    "source": {"name": path.name, "files": dict(file.fingerprint())},
                    "hashes": hashes,
                }
                _write_json(staging.folder / "bitwright.json", provenance)
                progress.note("verifying")
                _verify(staging.folder, hashes)
                file.check_unchanged()
                staging.publish()
            except BitwrightError:
                staging.discard()
                raise
            except OSError as error:
                staging.discard()
                where = printable(str(output))
                raise os_error(error, f"writing {where}", folder=output.absolute().parent) from error
    name = str(view.config.get("dtype", "float32"))
    return DenseResult(output, total, name, hashes, types)


def _write(view: HfView, sink: SafetensorsWriter, progress: Progress) -> dict[str, str]:
    hashes: dict[str, str] = {}
    progress.begin(len(view.tensors), "decoding")
    for name, spec in view.tensors.items():
        digest = hashlib.sha256()
        for start, stop in _rows(spec):
            piece = view.read(name) if start is None else view.read(name, (start, stop))
            if piece.is_floating_point() and not bool(torch.isfinite(piece).all()):
                raise NumericError(
                    f"{name}: values are not finite in {spec.dtype}", mend="use --dtype bfloat16 or float32"
                )
            sink.write(name, piece, start or 0)
            digest.update(bytes_of(piece))
        hashes[name] = digest.hexdigest()
        release_free_memory()
        progress.step(name)
    return hashes


def _rows(spec: TensorSpec) -> list[tuple[int | None, int]]:
    """Row ranges of a tensor; one that says "all of it" for small ones."""
    count = spec.nbytes // spec.dtype.itemsize
    if count <= CHUNK_ELEMENTS or len(spec.shape) < 2:
        return [(None, 0)]
    step = max(1, CHUNK_ELEMENTS * spec.shape[0] // count)
    return [(start, min(start + step, spec.shape[0])) for start in range(0, spec.shape[0], step)]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(folder: Path, hashes: dict[str, str]) -> None:
    with closing(SafetensorsDir.open(folder)) as stored:
        for name, wanted in hashes.items():
            digest = hashlib.sha256()
            for start, stop in _rows(stored.tensors[name]):
                digest.update(bytes_of(stored.read(name) if start is None else stored.read(name, (start, stop))))
            if digest.hexdigest() != wanted:
                raise VerifyError(f"{name}: what was written differs from what was computed", mend=_MEND)
