"""What a checkpoint or GGUF file says about itself, for the document: sizes, schemes, recipe, provenance, who loads it."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bitwright.evaluation.gate import Limit, value_of
from bitwright.evaluation.record import Quality, TaskScore
from bitwright.gguf.mixture import MIXTURES
from bitwright.io.gguf_file import GgufFile
from bitwright.io.strict import load_json
from bitwright.report.document import Candidate, GateLine, GateResult, Origin, Size
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

__all__ = ["candidate_of", "environment", "gate_result", "origin_of"]


def candidate_of(path: Path, name: str | None = None) -> Candidate:
    """A candidate without figures. InputError where ``path`` is no readable model."""
    return _of_file(path, name) if path.is_file() else _of_folder(path, name)


def origin_of(path: Path) -> Origin:
    """The source of a comparison."""
    found = candidate_of(path)
    return Origin(name=path.name, model_type=_model_type(path), files=found.files, size=found.size)


def _model_type(path: Path) -> str | None:
    if path.is_file():
        with GgufFile.open(path) as file:
            return file.get("general.architecture", str, None)
    return str(load_json(path / "config.json").get("model_type", "")) or None


def _of_folder(path: Path, name: str | None) -> Candidate:
    opened = open_checkpoint(path)
    stored = opened.stored if isinstance(opened, DecodedSource) else opened
    with stored:
        parameters = sum(spec.nbytes // spec.dtype.itemsize for spec in opened.tensors.values())
        total = sum(spec.nbytes for spec in stored.tensors.values())
        files = dict(stored.fingerprint())
    size = Size(weight_file_bytes=_weight_bytes(path), parameters=parameters, bits_per_weight=_bits(total, parameters))
    if not isinstance(opened, DecodedSource):
        kinds = Counter(str(spec.dtype).removeprefix("torch.") for spec in opened.tensors.values())
        scheme = kinds.most_common(1)[0][0] if kinds else None
        return Candidate(name=name or path.name, layout="dense", scheme=scheme, size=size, files=files)
    quantized = bytes_ = 0
    for module, (scheme_, shape) in opened.modules.items():
        quantized += math.prod(shape)
        bytes_ += sum(part.nbytes for part in opened.layout.tensors(module, scheme_, shape))
    own = path / "bitwright.json"
    told: Mapping[str, Any] = load_json(own) if own.is_file() else {}
    recipe = told.get("recipe") or {}
    schemes = {module: scheme_ for module, (scheme_, _) in opened.modules.items()}
    shown = Counter(scheme_.describe_all() for scheme_ in schemes.values())
    return Candidate(
        name=name or path.name,
        layout=opened.layout.name,
        method=recipe.get("method"),
        scheme=_most(shown),
        size=size.model_copy(update={"quantized_bits_per_weight": _bits(bytes_, quantized)}),
        loads_in=opened.layout.engines(schemes, (), str(opened.config.get("model_type", "?"))),
        recipe=recipe,
        files=files,
        hashes=told.get("hashes") or {},
        fallbacks=tuple(told.get("fallbacks") or ()),
        notes=tuple(told.get("notes") or ()),
    )


def _of_file(path: Path, name: str | None) -> Candidate:
    with GgufFile.open(path) as file:
        weights = {tensor.name: math.prod(tensor.shape) for tensor in file.tensors.values()}
        total = sum(tensor.nbytes for tensor in file.tensors.values())
        blocked = [tensor for tensor in file.tensors.values() if tensor.block.blocked]
        counts: Counter[str] = Counter()
        for tensor in file.tensors.values():
            counts[tensor.block.name] += weights[tensor.name]
        number = file.get("general.file_type", int, None)
        size_bytes = sum(part.stat().st_size for part in file.paths)
        files = dict(file.fingerprint())
        quantized = sum(weights[t.name] for t in blocked)
        quantized_bytes = sum(t.nbytes for t in blocked)
    mixture = next((mix.name for mix in MIXTURES.values() if mix.number == number), None)
    parameters = sum(weights.values())
    return Candidate(
        name=name or path.stem,
        layout="gguf",
        scheme=mixture or _most(counts),
        size=Size(
            weight_file_bytes=size_bytes,
            parameters=parameters,
            bits_per_weight=_bits(total, parameters),
            quantized_bits_per_weight=_bits(quantized_bytes, quantized) if quantized else None,
        ),
        loads_in={"llama.cpp": None, "bitwright": None},
        files=files,
    )


def _most(counts: Counter[str]) -> str | None:
    if not counts:
        return None
    first = counts.most_common(1)[0][0]
    return first if len(counts) == 1 else f"{first} and {len(counts) - 1} more"


def _weight_bytes(path: Path) -> int:
    files = list(path.glob("*.safetensors")) or [*path.glob("*.bin"), *path.glob("*.pt")]
    return sum(file.stat().st_size for file in files)


def _bits(size: int, count: int) -> float:
    return 8 * size / count if count else 0.0


def environment() -> dict[str, str]:
    """Versions and machine, for the reader who wants to repeat it."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for package in ("bitwright", "torch", "transformers", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"cpu capability": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}


def gate_result(limits: Iterable[Limit], quality: Quality, tasks: Sequence[TaskScore] = ()) -> GateResult:
    """Every limit against what was measured."""
    lines = []
    for limit in limits:
        value = value_of(limit, quality, tasks)
        lines.append(
            GateLine(
                name=limit.name, relation=limit.relation, limit=limit.bound, value=value, passed=limit.holds(value),
                sentence=limit.sentence(value),
            )
        )  # fmt: skip
    return GateResult(passed=all(line.passed for line in lines), lines=tuple(lines))
