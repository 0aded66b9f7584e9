"""Which files of a model folder hold its weights, decided from names and the index alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import InputError
from bitwright.io.model_files import list_files
from bitwright.io.strict import load_json
from bitwright.io.text import printable, quoted

__all__ = ["WeightFiles", "check_weight_map", "find_pickles", "find_safetensors"]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: what trainers leave beside the weights
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_MEND = "download the model again"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a folder, sorted by name, and the index's map from tensor to file name, if there is one."""

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    index: Path | None


def find_safetensors(folder: Path) -> WeightFiles | None:
    """``model.safetensors``, the shards of ``model.safetensors.index.json``, or the only ``*.safetensors``; else None.

    Raises InputError where the choice is not unique, or the index is not sound.
    """
    files = list_files(folder)
    return _find(folder, files, "model", (".safetensors",), [file for file in files if file.suffix == ".safetensors"])


def find_pickles(folder: Path) -> WeightFiles | None:
    """As ``find_safetensors``, for ``pytorch_model.bin``, its index, or the only pickle that may hold weights."""
    files = list_files(folder)
    pickles = [file for file in files if file.suffix in _PICKLE_SUFFIXES and not file.name.startswith(_NOT_WEIGHTS)]
    return _find(folder, files, "pytorch_model", (".bin",), pickles)


def _find(
    folder: Path, files: list[Path], stem: str, suffixes: tuple[str, ...], weights: list[Path]
) -> WeightFiles | None:
    single, index = folder / f"{stem}{suffixes[0]}", folder / f"{stem}{suffixes[0]}.index.json"
    if single in files:
        return WeightFiles((single,), None, None)
    if index in files:
        weight_map = _load_index(index, suffixes)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise InputError(f"{printable(str(folder))}: {first_five('shard', missing)} missing", mend=_MEND)
        return WeightFiles(tuple(folder / name for name in names), weight_map, index)
    if len(weights) > 1:
        raise InputError(
            f"{printable(str(folder))}: {first_five('weight file', [file.name for file in weights])} without an index",
            mend=f"add {index.name}, or leave only one",
        )
    return WeightFiles((weights[0],), None, None) if weights else None


def _load_index(index: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    document = load_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{printable(str(index))}: no weight_map in it", mend=_MEND)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name, suffixes):
            raise InputError(
                f"{printable(str(index))}: tensor {quoted(tensor)} lies in {quoted(str(name))}, "
                f"which is not the plain name of a {suffixes[0]} file",
                mend="do not use this model: an honest index names files beside it",
            )
    return weight_map


def _is_plain(name: str, suffixes: tuple[str, ...]) -> bool:
    """Decided on the text, before any path is built from it."""
    return name.endswith(suffixes) and name[0] != "." and ".." not in name and not set(name) & set("/\\:\0")


def check_weight_map(weight_map: Mapping[str, str], found: Mapping[str, Iterable[str]], index: Path) -> None:
    """Raise InputError unless every shard (``found``: file name -> tensors) holds exactly the tensors mapped to it."""
    where = printable(str(index))
    actual = {name: set(tensors) for name, tensors in found.items()}
    absent = [tensor for tensor, name in weight_map.items() if tensor not in actual.get(name, ())]
    if absent:
        raise InputError(f"{where}: {first_five('tensor', absent)} not in the shard it names", mend=_MEND)
    extra = [tensor for name in sorted(actual) for tensor in sorted(actual[name]) if weight_map.get(tensor) != name]
    if extra:
        raise InputError(f"{where}: {first_five('tensor', extra)} in a shard but not mapped to it", mend=_MEND)


def first_five(kind: str, names: list[str]) -> str:
    """How many, and the first five by name.

    >>> first_five("shard", ["a", "b"])
    "2 shards ('a', 'b')"
    """
    listed = ", ".join(quoted(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} {kind}{'s' if len(names) != 1 else ''} ({listed})"
