"""One whole run: plan, stage, drive, verify, publish."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from bitwright.core.source import Source
from bitwright.engine.calibration import CalibrationTokens, load_texts, load_tokenizer, tokens_from_texts
from bitwright.engine.driver import Driver
from bitwright.engine.interrupt import StopRequest
from bitwright.engine.journal import Commit, Journal
from bitwright.engine.memory import Budget
from bitwright.engine.modelwide import plan_rewritten, prove_unchanged
from bitwright.engine.plan import Plan
from bitwright.engine.progress import Progress, Silent
from bitwright.engine.recipe import Recipe
from bitwright.engine.sample import sample_tokens
from bitwright.engine.verify import verify
from bitwright.errors import BitwrightError, InputError, ResumeError, Stopped, VerifyError
from bitwright.io.files import os_error
from bitwright.io.model_files import already_quantized, refuse_remote_code, side_files, tokenizer_vocab_size
from bitwright.io.publish import Staging
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.safetensors_writer import SafetensorsWriter, index_json
from bitwright.io.text import printable

__all__ = ["Result", "open_source", "quantize_folder", "vocab_size"]

Resume = Literal["auto", "require", "never"]


@dataclass(frozen=True)
class Result:
    """What a run produced. report: one record per quantized tensor; quality: figures on calibration probes, where measured."""

    output: Path
    plan: Plan
    report: list[dict[str, Any]]
    quality: dict[str, float]
    calibration: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A summary of plain values."""
        return {
            "output": str(self.output),
            "weight_file_bytes": self.plan.weight_file_bytes,
            "bits_per_weight": self.plan.bits_per_weight,
            "quantized_bits_per_weight": self.plan.quantized_bits_per_weight,
            "quality": self.quality,
            "calibration": self.calibration,
            "fallbacks": [line for line in self.report if line["fallback"]],
            "notes": self.notes,
        }


def open_source(path: Path, *, allow_pickle: bool = False) -> SafetensorsDir:
    """A dense checkpoint to quantize. Raises InputError for remote code and for models that are quantized already."""
    source = SafetensorsDir.open(path, allow_pickle=allow_pickle)
    refuse_remote_code(source.config, path)
    method = already_quantized(source.config)
    if method is not None:
        raise InputError(f"{path} is already quantized ({method})", mend="start from the original checkpoint")
    return source


def vocab_size(source: SafetensorsDir) -> int:
    """Vocabulary size that the config states; 0 where it states none."""
    text = source.config.get("text_config")
    for part in (source.config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    return 0


def quantize_folder(
    recipe: Recipe,
    model: Path,
    output: Path,
    *,
    resume: Resume = "auto",
    overwrite: bool = False,
    max_memory_bytes: int | None = None,
    allow_pickle: bool = False,
    target: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize the checkpoint folder ``model`` into the folder ``output``; nothing is visible there before it is whole.

    resume: "auto" continues an interrupted run where there is one, "require" insists on it, "never" starts anew.
    Raises any of the errors in ``bitwright.errors``; Stopped where it was interrupted after a committed step.
    """
    progress = progress or Silent()
    with open_source(model, allow_pickle=allow_pickle) as source:
        tokens, foreign = _early_tokens(recipe, source)
        plan, rewritten = plan_rewritten(recipe, source, target=target)
        for note in plan.notes:
            progress.note(note)
        budget = Budget.of(plan, max_memory_bytes, tokens)
        with Staging.acquire(output, overwrite=overwrite, source=model) as staging:
            try:
                identity = _identity(recipe, source, tokens)
                journal = _open_journal(staging, identity, resume, plan, budget, progress)
                if plan.needs_calibration and tokens is None:
                    tokens = sample_tokens(recipe, source, staging.work, vocab_size(source), progress)
                for note in tokens.warnings if tokens else ():
                    progress.note(note)
                used = tokens if plan.needs_calibration else None
                if not journal.commits:
                    prove_unchanged(plan, source, rewritten)
                result = _drive(plan, rewritten, journal, staging.folder, used, budget, progress)
                result = _finish(result, plan, source, staging.folder, used, foreign, progress)
                source.check_unchanged()
                staging.publish()
            except (Stopped, ResumeError):
                raise
            except BitwrightError:
                # What cannot be finished leaves nothing behind; an interrupted run stays, to be resumed.
                staging.discard()
                raise
            except OSError as error:
                staging.discard()
                where = printable(str(output))
                raise os_error(error, f"writing {where}", folder=output.absolute().parent) from error
    return Result(output, plan, result.report, result.quality, result.calibration, result.notes)


def _early_tokens(recipe: Recipe, source: SafetensorsDir) -> tuple[CalibrationTokens | None, bool]:
    """Tokens of the named text, read before any model is built; None where the model will sample its own."""
    size = vocab_size(source)
    largest = tokenizer_vocab_size(source.path)
    if largest is not None and size and largest > size:
        raise InputError(
            f"{source.path}: the tokenizer has ids up to {largest - 1}, the model's vocabulary has {size} entries",
            mend="use the tokenizer that belongs to this model",
        )
    if not recipe.needs_calibration or recipe.calibration.text is None:
        return None, False
    texts = load_texts(recipe.calibration)
    tokenizer = load_tokenizer(source.path)
    tokens = tokens_from_texts(
        texts, tokenizer, recipe.calibration, seed=recipe.seed, vocab_size=size, origin=recipe.calibration.text
    )
    return tokens, True


def versions() -> dict[str, str]:
    """Versions on which the promise of identical bytes depends."""
    names = ("bitwright", "torch", "transformers", "numpy", "numba", "safetensors", "tokenizers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _identity(recipe: Recipe, source: SafetensorsDir, tokens: CalibrationTokens | None) -> dict[str, str]:
    identity = {
        f"recipe {key}": json.dumps(value, sort_keys=True) for key, value in recipe.model_dump(mode="json").items()
    }
    identity |= {f"model file {name}": value for name, value in source.fingerprint().items()}
    # The fingerprint samples large files; for an interrupted run the time of the last change is compared as well. It never
    # reaches the output.
    identity |= {
        f"last change of {name}": str((source.path / name).stat().st_mtime_ns)
        for name in source.fingerprint()
        if (source.path / name).is_file()
    }
    identity |= {f"version of {name}": value for name, value in versions().items()}
    identity["calibration tokens"] = tokens.digest if tokens is not None else "none or sampled"
    return identity


def _open_journal(
    staging: Staging, identity: dict[str, str], resume: Resume, plan: Plan, budget: Budget, progress: Progress
) -> Journal:
    """The journal of the interrupted run, or a fresh one in an emptied staging folder."""
    present = staging.exists_partial and Journal.present(staging.work)
    if resume == "require" and not present:
        raise ResumeError("there is no interrupted run to resume", mend="start one with --resume auto")
    if present and resume != "never":
        journal = Journal.reopen(staging.work, identity)
        if journal.torn:
            progress.note("the newest entry of the journal is damaged; going back to the one before")
        progress.note(f"resuming after {len(journal.commits)} of {plan.structure.block_count + 1} steps")
        return journal
    staging.reset()
    staging.require_space(plan.weight_file_bytes + budget.disk_bytes)
    return Journal.start(staging.work, identity)


def _drive(
    plan: Plan,
    source: Source,
    journal: Journal,
    files: Path,
    tokens: CalibrationTokens | None,
    budget: Budget,
    progress: Progress,
) -> Result:
    stored = {entry.tensor: [spec.name for spec in entry.stored] for entry in plan.entries}
    written = [name for commit in journal.commits for tensor in commit.hashes for name in stored.get(tensor, [tensor])]
    if not journal.commits:
        # A run that was killed before its first commit may have created them.
        for shard in plan.shards:
            (files / shard.file_name).unlink(missing_ok=True)
    with (
        SafetensorsWriter(files, plan.shards, resume=bool(journal.commits), written=written) as sink,
        StopRequest() as stop,
    ):
        driver = Driver(
            plan=plan, source=source, sink=sink, journal=journal, progress=progress, tokens=tokens,
            max_activation_bytes=budget.activation_bytes, max_gram_bytes=budget.gram_bytes, should_stop=stop.requested,
        )  # fmt: skip
        if not driver.run():
            raise Stopped(
                f"stopped after {len(journal.commits)} of {plan.structure.block_count + 1} steps",
                mend="run the same command again to continue",
            )
        missing = sink.missing()
        if missing:
            raise VerifyError(f"{len(missing)} tensors were never written, {missing[0]} first", mend="report this")
    _write_config(plan, source, files)
    progress.note("verifying")
    verify(files, plan, journal.commits, tokens, driver.last_activations)
    report = [line for commit in journal.commits for line in commit.report]
    return Result(files, plan, report, driver.quality, {"commits": journal.commits})


def _write_config(plan: Plan, source: Source, files: Path) -> None:
    config = dict(source.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.model_dtype).removeprefix("torch.")
    config["quantization_config"] = plan.quantization_config
    _write_json(files / "config.json", config)
    index = index_json(plan.shards)
    if index is not None:
        (files / "model.safetensors.index.json").write_bytes(index)
    for name, content in plan.layout.side_files(plan.quantization_config).items():
        (files / name).write_bytes(content)
    for file in side_files(source.path):
        shutil.copyfile(file, files / file.name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _finish(
    result: Result,
    plan: Plan,
    source: SafetensorsDir,
    files: Path,
    tokens: CalibrationTokens | None,
    foreign: bool,
    progress: Progress,
) -> Result:
    """Notes, bitwright.json and the model card."""
    from bitwright.report.card import model_card

    commits: list[Commit] = result.calibration["commits"]
    calibration: dict[str, Any] = {}
    if tokens is not None:
        calibration = {
            "origin": Path(tokens.origin).name, "tokens": tokens.count, "sequences": tokens.sequences, "sha256": tokens.digest,
        }  # fmt: skip
    notes = _notes(result, foreign)
    for note in notes:
        progress.note(note)
    provenance = {
        "bitwright": versions()["bitwright"],
        "recipe": _published(plan.recipe),
        "source": {"name": source.path.name, "files": dict(source.fingerprint())},
        "versions": versions(),
        "calibration": calibration,
        "quality": result.quality,
        "sizes": {
            "weight_file_bytes": plan.weight_file_bytes,
            "bits_per_weight": plan.bits_per_weight,
            "quantized_bits_per_weight": plan.quantized_bits_per_weight,
        },
        "tensors": result.report,
        "fallbacks": [line for line in result.report if line["fallback"]],
        "hashes": {name: value for commit in commits for name, value in commit.hashes.items()},
        "notes": [*plan.notes, *notes],
    }
    _write_json(files / "bitwright.json", provenance)
    (files / "README.md").write_text(model_card(provenance, plan.engines), encoding="utf-8")
    return Result(files, plan, result.report, result.quality, calibration, notes)


def _published(recipe: Recipe) -> dict[str, Any]:
    """The recipe as the output shows it: the calibration file by its name alone, for the path is the user's own."""
    values = recipe.model_dump(mode="json")
    text = values["calibration"]["text"]
    if text is not None and not text.startswith("dataset:"):
        values["calibration"]["text"] = Path(text).name
    return values


def _notes(result: Result, foreign: bool) -> list[str]:
    """What the reader should know: how foreign the text was, which layers ended worst, what fell back."""
    notes: list[str] = []
    quality = result.quality
    if quality and foreign:
        ratio = quality["perplexity_source"] / quality["perplexity_own_text"]
        line = (
            f"calibration text: the model's perplexity on it is {quality['perplexity_source']:.4g}; on text of its own it would be "
            f"about {quality['perplexity_own_text']:.4g}"
        )
        if ratio > 1.5:
            line += f" ({ratio:.1f} times less): the text is foreign to the model, its own samples may serve better"
        notes.append(line)
    losses = sorted((r for r in result.report if r["loss"] is not None), key=lambda r: -r["loss"])
    if losses:
        worst = ", ".join(f"{r['tensor'].removesuffix('.weight')} ({r['loss']:.2e})" for r in losses[:3])
        notes.append(f"largest relative output error: {worst}")
    fallen = [r for r in result.report if r["fallback"]]
    if fallen:
        listed = "; ".join(f"{r['tensor']}: {r['fallback']}" for r in fallen[:5])
        notes.append(f"{len(fallen)} layers fell back ({listed}{'; ...' if len(fallen) > 5 else ''})")
    dead = [r for r in result.report if r["dead_columns"]]
    if dead:
        total = sum(r["dead_columns"] for r in dead)
        notes.append(f"{total} input columns of {len(dead)} layers were always zero; they were rounded to nearest")
    return notes
