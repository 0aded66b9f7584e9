"""From checkpoints to a document: what is measured of one quantized version, and whole comparisons of several recipes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError

from bitwright.engine.progress import Progress, Silent
from bitwright.engine.recipe import Recipe, load_recipe, make_recipe
from bitwright.errors import InputError, PlanError
from bitwright.evaluating import (
    Convention,
    device_of,
    evaluate_path,
    first_windows,
    load_any,
    load_any_tokenizer,
    own_samples,
)
from bitwright.evaluation.gate import Limit
from bitwright.evaluation.record import Speed, TaskScore
from bitwright.io.files import os_error, write_text
from bitwright.io.gguf_file import GgufFile
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.text import printable
from bitwright.report.document import Activation, Candidate, Document, Measurement
from bitwright.report.gather import candidate_of, environment, gate_result, origin_of
from bitwright.report.measured_card import enter_figures

if TYPE_CHECKING:
    from bitwright.runtime.bench import BenchOptions

__all__ = ["SETS", "Entry", "Wanted", "compare_recipes", "entries_of", "measure_one"]

#: Recipes that are compared by one name.
SETS: Mapping[str, tuple[str, ...]] = {
    "all-4bit": ("w4a16", "awq", "awq-gptq", "nf4", "mxfp4", "nvfp4", "gguf:Q4_K_M", "gguf:Q4_K_M+gptq"),
    "all-8bit": ("w8a8", "w8a8-static", "fp8", "fp8-static", "llm-int8", "gguf:Q8_0"),
    "small": ("spqr", "2bit", "ternary", "gguf:Q3_K_M+imatrix", "gguf:Q2_K+imatrix", "gguf:IQ2_XS+imatrix"),
    "gguf": ("gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K_M", "gguf:Q4_K_M", "gguf:IQ4_XS", "gguf:Q3_K_M", "gguf:Q2_K"),
}

#: Tokens on which errors of layers are measured.
_LAYER_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is measured, and how. texts: contents by name (None: the source's own samples); the rest as in ``bitwright.evaluate``.

    tasks: names, files or folders for lm-evaluation-harness, with at most ``task_limit`` questions each. layers: errors layer by layer.
    speed: how time and memory are measured, None: they are not. gate: limits that are judged.
    """

    texts: Mapping[str, str | torch.Tensor] | None = None
    length: int = 512
    stride: int | None = None
    convention: Convention | None = None
    windows: int | None = None
    dtype: torch.dtype | None = torch.float32
    kernel: str = "auto"
    batch_size: int = 1
    device: str = "auto"
    cache: bool = True
    tasks: tuple[str, ...] = ()
    task_options: Mapping[str, Any] = field(default_factory=dict)
    layers: bool = False
    speed: BenchOptions | None = None
    gate: tuple[Limit, ...] = ()

    def check(self) -> None:
        """InputError for tasks that cannot be run, before anything is loaded."""
        if self.tasks:
            from bitwright.evaluation.tasks import check_tasks

            check_tasks(list(self.tasks), allow_code_execution=bool(self.task_options.get("allow_code_execution")))

    def with_texts(self, source: Path | None, progress: Progress) -> Wanted:
        """The same with a text: samples of the source where none was given. InputError where there is neither."""
        if self.texts is not None:
            return self
        if source is None:
            raise InputError(
                "there is no text to evaluate on", mend="give --text, or the original with --against to sample one from"
            )
        return replace(self, texts={"model samples": own_samples(source, length=self.length, progress=progress)})


def measure_one(
    path: Path,
    source: Path | None,
    wanted: Wanted,
    *,
    name: str | None = None,
    source_tasks: Sequence[TaskScore] | None = None,
    source_speed: Sequence[Speed] | None = None,
    progress: Progress | None = None,
) -> Document:
    """A document with one candidate. source_tasks, source_speed: the source's, where they are known already."""
    progress = progress or Silent()
    candidate = candidate_of(path, name)
    wanted.check()
    missing: list[str] = []
    measurement, changes = None, dict[str, Any]()
    if wanted.texts is not None or not wanted.tasks or source is not None:
        wanted = wanted.with_texts(source, progress)
        assert wanted.texts is not None
        progress.note(f"measuring {printable(candidate.name)}")
        found = evaluate_path(
            path, wanted.texts, against=source, length=wanted.length, stride=wanted.stride, convention=wanted.convention,
            windows=wanted.windows, dtype=wanted.dtype, kernel=wanted.kernel, batch_size=wanted.batch_size,
            device=wanted.device, cache=wanted.cache,
        )  # fmt: skip
        changes |= {"quality": found.quality, "domains": found.domains}
        measurement = Measurement(
            convention=found.convention,
            length=found.length,
            stride=found.stride,
            windows=found.windows,
            dtype=found.dtype,
            texts=found.texts,
        )
    if wanted.tasks:
        if source is not None and source_tasks is None:
            source_tasks = run_tasks_on(source, wanted, progress)
        changes["tasks"] = _against(run_tasks_on(path, wanted, progress), source_tasks or ())
    else:
        missing.append("tasks: none were named (--tasks)")
    activations: tuple[Activation, ...] = ()
    if wanted.layers and source is not None:
        layers, activations = _layers(path, source, wanted, progress)
        changes |= layers | {"notes": (*candidate.notes, *layers["notes"])}
    else:
        missing.append(
            "errors of layers: " + ("there is no original" if source is None else "not asked for (--layers)")
        )
    if wanted.gate:
        quality = changes.get("quality")
        if quality is None:
            raise InputError("a gate needs figures", mend="give --text or --against")
        changes["gate"] = gate_result(wanted.gate, quality, changes.get("tasks", ()))
    if wanted.speed is not None:
        changes["speed"] = speed_of(path, wanted, progress)
        if source is not None and source_speed is None:
            source_speed = speed_of(source, wanted, progress)
    else:
        missing.append("speed: not asked for (--bench)")
    return Document(
        bitwright=version("bitwright"),
        title=candidate.name,
        source=None if source is None else origin_of(source),
        measurement=measurement,
        candidates=(candidate.model_copy(update=changes),),
        activations=activations,
        source_speed=tuple(source_speed or ()),
        environment=environment(),
        not_measured=tuple(missing),
    )


def run_tasks_on(path: Path, wanted: Wanted, progress: Progress) -> tuple[TaskScore, ...]:
    """Scores of one model."""
    from bitwright.evaluation.tasks import run_tasks

    progress.note(f"running tasks on {printable(path.name)}")
    model = load_any(path, dtype=wanted.dtype, kernel=wanted.kernel).to(device_of(wanted.device))
    options = {"batch_size": wanted.batch_size, **wanted.task_options}
    return run_tasks(model, load_any_tokenizer(path), list(wanted.tasks), **options)


def speed_of(path: Path, wanted: Wanted, progress: Progress) -> tuple[Speed, ...]:
    """Time and memory of one model in every engine that is installed and takes it."""
    from bitwright.runtime.bench import bench

    assert wanted.speed is not None
    return tuple(bench(path, wanted.speed, progress=lambda words: progress.note(f"timing {words}")))


def _against(scores: Sequence[TaskScore], source: Sequence[TaskScore]) -> tuple[TaskScore, ...]:
    """Scores with the source's beside them."""
    known = {(score.task, score.metric): score for score in source}
    return tuple(
        score
        if (found := known.get((score.task, score.metric))) is None
        else replace(score, source_value=found.value, source_error=found.error)
        for score in scores
    )


def _layers(
    path: Path, source: Path, wanted: Wanted, progress: Progress
) -> tuple[dict[str, Any], tuple[Activation, ...]]:
    from bitwright.engine.layer_errors import measure_layers

    progress.note("measuring errors layer by layer")
    assert wanted.texts is not None
    tokens = first_windows(source, wanted.texts, length=wanted.length, count=_LAYER_SAMPLES)
    found = measure_layers(source, path, tokens=tokens, progress=progress)
    activations = tuple(
        Activation(
            block=seen.block,
            label=seen.label,
            largest=seen.largest,
            lost_bits_tensor=seen.lost_bits_tensor,
            lost_bits_token=seen.lost_bits_token,
            advice=seen.advice,
        )
        for seen in found.activations
    )
    return {
        "blocks": found.blocks,
        "layers": found.layers,
        "histograms": found.histograms,
        "notes": found.notes,
    }, activations


# --- comparisons -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A recipe under the name that tables and charts show."""

    name: str
    recipe: Recipe


def entries_of(names: Sequence[str], sets: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> list[Entry]:
    """Recipes from YAML files, presets, ``gguf:TYPE[+gptq|+imatrix]``, and names of ``SETS``. changes: on top of all of them.

    InputError where one is unknown, or two have one name.
    """
    wanted = list(names)
    for name in sets:
        if name not in SETS:
            raise InputError(f"set '{name}' of recipes is unknown", mend=f"use one of: {', '.join(SETS)}")
        wanted += [item for item in SETS[name] if item not in wanted]
    found: dict[str, Entry] = {}
    for item in wanted:
        title = item.removeprefix("gguf:") if item.startswith("gguf:") else Path(item).stem if "/" in item else item
        title = title.removesuffix(".yaml").removesuffix(".yml")
        if title in found:
            raise InputError(f"two recipes are called {printable(title)}", mend="rename one of the files")
        found[title] = Entry(title, _recipe(item, changes or {}))
    if not found:
        raise InputError(
            "there is nothing to compare", mend="name recipes with --recipe, or a set with --preset all-4bit"
        )
    return list(found.values())


def _recipe(item: str, changes: Mapping[str, Any]) -> Recipe:
    if not item.startswith("gguf:"):
        return load_recipe(item, changes)
    type_, _, extra = item.removeprefix("gguf:").partition("+")
    if extra not in ("", "gptq", "imatrix"):
        raise InputError(f"'{item}' is not gguf:TYPE, +gptq or +imatrix", mend="write gguf:Q4_K_M+imatrix")
    gguf: dict[str, Any] = {"type": type_} | ({"imatrix": "auto"} if extra else {})
    return make_recipe({"gguf": gguf, "method": "gptq" if extra == "gptq" else "rtn", **changes})


def compare_recipes(
    model: Path,
    entries: Sequence[Entry],
    output: Path,
    wanted: Wanted,
    *,
    keep: Literal["all", "none"] = "all",
    overwrite: bool = False,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Document:
    """Quantize ``model`` with every recipe, measure all alike, and write ``results.json`` and ``report.html`` into ``output``.

    Quantized versions go to ``output/models``; keep "none" deletes each once it is measured. What an earlier run with the same recipe,
    source and settings has measured is taken over, so that an interrupted comparison continues. A recipe that cannot be carried out on
    this model is named in the document with the reason; PlanError where all are.
    """
    from bitwright.report.page import render_page

    progress = progress or Silent()
    wanted.check()
    _own_folder(output, overwrite)
    wanted = wanted.with_texts(model, progress)
    candidates: list[Candidate] = []
    failed: list[str] = []
    documents: list[Document] = []
    source_tasks = run_tasks_on(model, wanted, progress) if wanted.tasks else None
    source_speed = speed_of(model, wanted, progress) if wanted.speed is not None else None
    for entry in entries:
        kept = output / "measured" / f"{entry.name}.json"
        identity = _identity(entry.recipe, model, wanted)
        document = _known(kept, identity)
        if document is None:
            try:
                document = _one(model, entry, output, wanted, source_tasks, source_speed, max_memory_bytes, progress)
            except PlanError as error:
                progress.note(f"{entry.name}: {error}")
                failed.append(f"{entry.name}: {error.message}")
                continue
            write_text(kept, json.dumps({"identity": identity, "document": document.to_json()}, indent=2) + "\n")
        else:
            progress.note(f"{entry.name}: measured by an earlier run")
        if keep == "none":
            _drop(_target(output, entry))
        documents.append(document)
        candidates += document.candidates
    if not documents:
        raise PlanError(f"no recipe fits this model: {failed[0]}", mend="see the reasons above")
    first = documents[0]
    whole = first.model_copy(
        update={
            "title": model.name,
            "candidates": tuple(candidates),
            "not_measured": tuple(dict.fromkeys([*failed, *first.not_measured])),
        }
    )
    write_text(output / "results.json", json.dumps(whole.to_json(), indent=2) + "\n")
    write_text(output / "report.html", render_page(whole))
    return whole


def _one(
    model: Path,
    entry: Entry,
    output: Path,
    wanted: Wanted,
    source_tasks: Sequence[TaskScore] | None,
    source_speed: Sequence[Speed] | None,
    max_memory_bytes: int | None,
    progress: Progress,
) -> Document:
    from bitwright.api import quantize, to_gguf

    target = _target(output, entry)
    progress.note(f"quantizing: {entry.name}")
    began = time.monotonic()
    if entry.recipe.layout == "gguf":
        to_gguf(
            model, target, recipe=entry.recipe, overwrite=True, max_memory_bytes=max_memory_bytes, progress=progress
        )
    else:
        quantize(
            model, target, recipe=entry.recipe, overwrite=True, max_memory_bytes=max_memory_bytes, progress=progress
        )
    seconds = time.monotonic() - began
    document = measure_one(
        target, model, wanted, name=entry.name, source_tasks=source_tasks, source_speed=source_speed, progress=progress
    )
    changes: dict[str, Any] = {"seconds": seconds}
    if not document.candidates[0].recipe:
        changes |= {
            "recipe": entry.recipe.model_dump(mode="json", exclude_defaults=True),
            "method": entry.recipe.method,
        }
    if target.is_dir():
        enter_figures(target / "README.md", document)
    return document.model_copy(update={"candidates": (document.candidates[0].model_copy(update=changes),)})


def _target(output: Path, entry: Entry) -> Path:
    return output / "models" / (f"{entry.name}.gguf" if entry.recipe.layout == "gguf" else entry.name)


def _identity(recipe: Recipe, model: Path, wanted: Wanted) -> str:
    """Hash of everything that a candidate's figures depend on."""
    opened = GgufFile.open(model) if model.is_file() else SafetensorsDir.open(model)
    with opened as source:
        files = dict(source.fingerprint())
    assert wanted.texts is not None
    texts = {
        name: hashlib.sha256(text.encode() if isinstance(text, str) else text.numpy().tobytes()).hexdigest()
        for name, text in wanted.texts.items()
    }
    settings = {
        key: str(getattr(wanted, key))
        for key in (
            "length",
            "stride",
            "convention",
            "windows",
            "dtype",
            "kernel",
            "tasks",
            "task_options",
            "layers",
            "gate",
        )
    }
    versions = {name: version(name) for name in ("bitwright", "torch", "transformers")}
    whole = {"recipe": recipe.model_dump(mode="json"), "files": files, "texts": texts, **settings, **versions}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _known(file: Path, identity: str) -> Document | None:
    """What an earlier run measured under the same identity; a damaged record counts as none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value["identity"] != identity:
            return None
        return Document.from_json(value["document"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def _own_folder(output: Path, overwrite: bool) -> None:
    """The folder of a comparison: new, empty, or an earlier one's."""
    try:
        if output.exists() and not output.is_dir():
            raise InputError(f"{printable(str(output))} is a file", mend="name another folder")
        strange = output.is_dir() and any(output.iterdir()) and not (output / "measured").is_dir()
        if strange and not overwrite:
            raise InputError(
                f"{printable(str(output))} holds something else",
                mend="name another folder, or allow it with --overwrite",
            )
        (output / "models").mkdir(parents=True, exist_ok=True)
        (output / "measured").mkdir(exist_ok=True)
    except OSError as error:
        raise os_error(error, printable(str(output))) from error


def _drop(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
