"""One whole conversion: plan, stage, rewrite tensor by tensor, verify, publish.

A quantized checkpoint's codes are carried into another layout as they are, or decoded into plain weights. One tensor is in memory at a
time; nothing is visible at the output path before the output has been opened anew and decodes to the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitwright import catalog
from bitwright.core.layout import Layout
from bitwright.core.options import build
from bitwright.core.source import Source
from bitwright.core.tensor import TensorSpec
from bitwright.engine.conversion import ConversionPlan, ModulePlan, plan_conversion
from bitwright.engine.progress import Progress, Silent
from bitwright.engine.regrid import express
from bitwright.engine.run import versions
from bitwright.engine.tensors import CHUNK_ELEMENTS, bytes_of, decoded_hash
from bitwright.errors import BitwrightError, InputError, NumericError, VerifyError
from bitwright.io.files import os_error
from bitwright.io.heap import release_free_memory
from bitwright.io.model_files import refuse_remote_code, side_files
from bitwright.io.publish import Staging
from bitwright.io.safetensors_writer import SafetensorsWriter, index_json
from bitwright.io.strict import load_json
from bitwright.io.text import printable
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

__all__ = ["Conversion", "convert_folder", "make_layout", "open_quantized", "plan_folder"]

_VERIFY_MEND = "run it again; if it repeats, the disk or the memory is faulty"


@dataclass(frozen=True)
class Conversion:
    """What a conversion produced. hashes: tensor -> SHA-256 of what it decodes to (quantized) or of its bytes."""

    output: Path
    plan: ConversionPlan
    hashes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A summary of plain values."""
        return {"output": str(self.output), **self.plan.to_json()}


def open_quantized(path: Path) -> DecodedSource:
    """A quantized checkpoint to convert. Raises InputError for remote code and for plain checkpoints."""
    opened = open_checkpoint(path)
    if not isinstance(opened, DecodedSource):
        opened.close()
        raise InputError(f"{path} is not quantized", mend="use `bitwright quantize`")
    refuse_remote_code(opened.config, path)
    return opened


def make_layout(name: str, options: Mapping[str, Any]) -> Layout | None:
    """The layout called ``name`` with these options; None for ``dense``, plain weights."""
    if name == "dense":
        if options:
            raise InputError("layout dense has no options", mend="drop --layout-option")
        return None
    layout = build(catalog.load("layouts", name), options, f"layout '{name}'")
    assert isinstance(layout, Layout)
    return layout


def plan_folder(
    model: Path,
    *,
    layout: str,
    layout_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    lossy: bool = False,
    target: str | None = None,
) -> ConversionPlan:
    """What ``convert_folder`` would do with these arguments; writes nothing."""
    made = make_layout(layout, layout_options or {})
    source = open_quantized(model)
    with closing(source.stored):
        return plan_conversion(source, made, dtype=dtype, lossy=lossy, target=target)


def convert_folder(
    model: Path,
    output: Path,
    *,
    layout: str,
    layout_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    target: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the quantized checkpoint folder ``model`` into the folder ``output``.

    layout: a layout's name, or ``dense``. dtype: that of what is not quantized (default: the model's). lossy: scales may be rounded.
    target: an engine that the output must load in. Raises any of the errors in ``bitwright.errors``.
    """
    progress = progress or Silent()
    made = make_layout(layout, layout_options or {})
    source = open_quantized(model)
    with closing(source.stored):
        plan = plan_conversion(source, made, dtype=dtype, lossy=lossy, target=target)
        for note in plan.notes:
            progress.note(note)
        with Staging.acquire(output, overwrite=overwrite, source=model) as staging:
            try:
                staging.reset()
                staging.require_space(plan.weight_file_bytes)
                hashes = _write(plan, source, staging.folder, progress)
                _write_config(plan, source, staging.folder)
                progress.note("verifying")
                _verify(plan, staging.folder, hashes)
                _describe(plan, source, staging.folder, hashes)
                source.stored.check_unchanged()
                staging.publish()
            except BitwrightError:
                staging.discard()
                raise
            except OSError as error:
                staging.discard()
                where = printable(str(output))
                raise os_error(error, f"writing {where}", folder=output.absolute().parent) from error
    return Conversion(output, plan, hashes)


def _write(plan: ConversionPlan, source: DecodedSource, files: Path, progress: Progress) -> dict[str, str]:
    """Write every tensor; the hash of what each one decodes to."""
    hashes: dict[str, str] = {}
    groups: dict[str, list[ModulePlan]] = {}
    for module in plan.modules:
        found = re.search(r"\.(\d+)\.", module.name)
        groups.setdefault(f"block {found[1]}" if found else "outside the blocks", []).append(module)
    progress.begin(len(groups) + 1, "converting")
    with SafetensorsWriter(files, plan.shards) as sink:
        for name, spec in plan.kept.items():
            digest = hashlib.sha256()
            for start, piece in _pieces(source.stored, name):
                stored = _cast(name, piece, spec)
                sink.write(name, stored, start)
                digest.update(bytes_of(stored))
            hashes[name] = digest.hexdigest()
        progress.step("what is not quantized")
        for label, group in groups.items():
            for module in group:
                weight = f"{module.name}.weight"
                if plan.layout is None:
                    (spec,) = module.stored
                    decoded = _cast(weight, source.read(weight), spec)
                    sink.write(weight, decoded)
                    hashes[weight] = hashlib.sha256(bytes_of(decoded)).hexdigest()
                else:
                    hashes[weight] = _rewrite(plan.layout, source, module, sink)
                release_free_memory()
            progress.step(label)
        missing = sink.missing()
        if missing:
            raise VerifyError(f"{len(missing)} tensors were never written, {missing[0]} first", mend="report this")
        sink.sync()
    return hashes


def _rewrite(layout: Layout, source: DecodedSource, module: ModulePlan, sink: SafetensorsWriter) -> str:
    """Write one module in its new terms; the hash of its decoded weight, which is that of the source's where nothing is rounded."""
    assert module.target is not None
    before = source.quantized(module.name)
    after, rounding = express(before, module.target, lossy=module.rounding > 0)
    found = decoded_hash(after)
    if rounding == 0.0 and found != decoded_hash(before):
        raise VerifyError(f"{module.name} decodes to other numbers as {module.target.describe()}", mend="report this")
    for name, value in layout.pack(module.name, after).items():
        sink.write(name, value)
    return found


def _pieces(source: Source, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """``(first row, rows)`` of a stored tensor."""
    shape = source.tensors[name].shape
    if not shape or math.prod(shape) <= CHUNK_ELEMENTS:
        yield 0, source.read(name)
        return
    rows = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield start, source.read(name, (start, min(start + rows, shape[0])))


def _cast(name: str, value: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """``value`` in the output's dtype; NumericError where it overflows."""
    if value.dtype == spec.dtype:
        return value
    stored = value.to(spec.dtype)
    if not bool(torch.isfinite(stored).all()):
        what = str(spec.dtype).removeprefix("torch.")
        raise NumericError(f"{name}: values are not finite in {what}", mend="use --dtype bfloat16 or float32")
    return stored


def _write_config(plan: ConversionPlan, source: DecodedSource, files: Path) -> None:
    config = _without_quantization(source.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    if plan.untie:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    if plan.layout is not None and plan.quantization_config is not None:
        config["quantization_config"] = plan.quantization_config
        for name, content in plan.layout.side_files(plan.quantization_config).items():
            (files / name).write_bytes(content)
    _write_json(files / "config.json", config)
    index = index_json(plan.shards)
    if index is not None:
        (files / "model.safetensors.index.json").write_bytes(index)
    for file in side_files(source.path):
        shutil.copyfile(file, files / file.name)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a model's config that says nothing of quantization."""
    found = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(found.get("text_config"), Mapping):
        found["text_config"] = _without_quantization(found["text_config"])
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(plan: ConversionPlan, folder: Path, hashes: Mapping[str, str]) -> None:
    """Open the output anew and compare every tensor. Raises VerifyError naming the first one that differs."""
    try:
        opened = open_checkpoint(folder)
    except BitwrightError as error:
        raise VerifyError(f"what was written cannot be opened: {error.message}", mend=_VERIFY_MEND) from error
    quantized = opened.modules if isinstance(opened, DecodedSource) else {}
    stored = opened.stored if isinstance(opened, DecodedSource) else opened
    with closing(stored):
        expected = {module.name for module in plan.modules if module.target is not None}
        if set(quantized) != expected:
            name = min(expected ^ set(quantized))
            raise VerifyError(f"{name} is quantized in the output or in the plan, not in both", mend=_VERIFY_MEND)
        for name, wanted in hashes.items():
            module = name.removesuffix(".weight")
            if isinstance(opened, DecodedSource) and name.endswith(".weight") and module in quantized:
                found = decoded_hash(opened.quantized(module))
            else:
                digest = hashlib.sha256()
                for _, piece in _pieces(stored, name):
                    digest.update(bytes_of(piece))
                found = digest.hexdigest()
            release_free_memory()
            if found != wanted:
                raise VerifyError(f"{name}: what was written differs from what was read", mend=_VERIFY_MEND)


def _describe(plan: ConversionPlan, source: DecodedSource, files: Path, hashes: Mapping[str, str]) -> None:
    """bitwright.json and the model card. What an earlier run of bitwright said of the source is carried along."""
    from bitwright.report.conversion_card import conversion_card

    earlier = source.path / "bitwright.json"
    origin = load_json(earlier) if earlier.is_file() else {}
    origin = origin if isinstance(origin, dict) else {}
    summary = plan.to_json()
    provenance = {
        "bitwright": versions()["bitwright"],
        "conversion": {
            "from": source.layout.name,
            "to": plan.layout_name,
            "layout_options": vars(plan.layout) if plan.layout is not None else {},
            **{key: summary[key] for key in ("dtype", "largest_rounding", "modules", "dropped")},
        },
        "recipe": origin.get("recipe") or {},
        "source": {"name": source.path.name, "files": dict(source.fingerprint())},
        "versions": versions(),
        "sizes": {"weight_file_bytes": plan.weight_file_bytes},
        "hashes": dict(hashes),
        "notes": list(plan.notes),
        **(
            {"origin": {k: v for k, v in origin.items() if k not in ("hashes", "tensors", "versions")}}
            if origin
            else {}
        ),
    }
    _write_json(files / "bitwright.json", provenance)
    (files / "README.md").write_text(conversion_card(provenance, plan.engines), encoding="utf-8")
