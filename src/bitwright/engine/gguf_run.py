"""Into GGUF, whole roads: a checkpoint folder, a quantized one, or another GGUF file becomes one verified file.

Without data, tensors are streamed from the source into blocks. With a calibrated method (or a transform) the blockwise engine first writes
the linears as blocks into a private folder, in the checkpoint's terms; their rows are then moved into the file as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitwright.blocks.types import TYPES, BlockType
from bitwright.engine.gguf_regrid import RegriddedBlocks
from bitwright.engine.gguf_source import FromBlocks, FromCheckpoint, FromFile, Place, facts
from bitwright.engine.gguf_write import Target, plan_file, verify_file, write_file
from bitwright.engine.journal import Journal
from bitwright.engine.modelwide import plan_rewritten
from bitwright.engine.progress import Progress, Silent
from bitwright.engine.recipe import GgufChoice, Recipe, make_recipe
from bitwright.engine.run import Resume, open_source, quantize_folder, versions
from bitwright.errors import BitwrightError, InputError, PlanError, ResumeError, Stopped
from bitwright.gguf.imatrix import ImportanceMatrix, read_imatrix
from bitwright.gguf.mixture import MIXTURES, Mixture, Override, assign, mixture, quantizable
from bitwright.io.files import os_error
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import GgufValue, string, u32
from bitwright.io.gguf_writer import GgufPart
from bitwright.io.model_files import already_quantized
from bitwright.io.publish import Staging
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.strict import load_json
from bitwright.io.text import printable
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

__all__ = ["GgufPlan", "GgufResult", "is_gguf", "plan_gguf_file", "write_gguf_file"]

Found = FromCheckpoint | FromBlocks | FromFile

#: ``general.file_type`` of a file without a mixture's name
_GUESSED = 1024


@dataclass(frozen=True)
class GgufPlan:
    """What will be written, to the byte. notes: what the reader should know; left_out: tensors that GGUF has no place for -> why."""

    targets: tuple[Target, ...]
    parts: tuple[GgufPart, ...]
    values: Mapping[str, GgufValue]
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def file_bytes(self) -> int:
        """Size of all files together."""
        return sum(part.total_bytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all tensors."""
        weights = sum(target.place.rows * target.place.columns for target in self.targets)
        return 8 * sum(target.nbytes for target in self.targets) / weights if weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """A summary of plain values."""
        return {
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.bits_per_weight,
            "files": {part.file_name: part.total_bytes for part in self.parts},
            "tensors": [
                {
                    "tensor": t.place.name,
                    "shape": list(t.place.shape),
                    "type": t.block.name,
                    "bytes": t.nbytes,
                    "copied": t.copy,
                }
                for t in self.targets
            ],
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class GgufResult:
    """What a run produced. output: the file, or the first part. hashes: tensor -> SHA-256 of its bytes."""

    output: Path
    plan: GgufPlan
    hashes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A summary of plain values."""
        return {"output": str(self.output), **self.plan.to_json()}


def is_gguf(path: Path) -> bool:
    """True for a file that begins like GGUF, or is called so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".gguf"


def plan_gguf_file(
    recipe: Recipe, model: Path, *, allow_pickle: bool = False, requantize: bool = False, lossy: bool = False
) -> GgufPlan:
    """What ``write_gguf_file`` would write, from headers alone. Raises InputError and PlanError as it does."""
    choice = _choice(recipe)
    imatrix = _given_imatrix(choice)
    with _opened(recipe, model, allow_pickle=allow_pickle, lossy=lossy) as source:
        return _plan(recipe, source, choice, imatrix is not None or choice.imatrix == "auto", "model", requantize)


def write_gguf_file(
    recipe: Recipe,
    model: Path,
    output: Path,
    *,
    resume: Resume = "auto",
    overwrite: bool = False,
    max_memory_bytes: int | None = None,
    allow_pickle: bool = False,
    requantize: bool = False,
    lossy: bool = False,
    progress: Progress | None = None,
) -> GgufResult:
    """Write ``model`` (a checkpoint folder or a GGUF file) as the GGUF file ``output``; it appears only when it is whole and verified.

    recipe: layout gguf, with its ``gguf`` section; method ``rtn`` rounds as llama.cpp does, others are calibrated. requantize: tensors of a
    GGUF file that are in blocks already may be decoded and quantized anew. lossy: integer weights of other layouts may have their scales
    rounded to float16. Raises any of the errors in ``bitwright.errors``; Stopped where it was interrupted after a committed step.
    """
    progress = progress or Silent()
    choice = _choice(recipe)
    if output.suffix != ".gguf":
        raise InputError(f"{printable(str(output))} is not called .gguf", mend="name the output NAME.gguf")
    imatrix = _given_imatrix(choice)
    with ExitStack() as stack:
        staging = stack.enter_context(Staging.acquire(output, overwrite=overwrite, source=model, file=True))
        try:
            staging.take_back()
            if resume == "never":
                staging.reset()
            if resume == "require" and not staging.exists_partial:
                raise ResumeError("there is no interrupted run to resume", mend="start one with --resume auto")
            _same_run(staging.work, recipe, model)
            if choice.imatrix == "auto" or _calibrated(recipe):
                # What the end of the run would refuse is refused before the hours of work.
                with _opened(recipe, model, allow_pickle=allow_pickle, lossy=lossy) as early:
                    weighed = imatrix is not None or choice.imatrix == "auto"
                    first = _plan(recipe, early, choice, weighed, output.stem, requantize)
                    _check_targets(staging, first, early, model)
            if choice.imatrix == "auto":
                imatrix = _auto_imatrix(recipe, model, staging.work, max_memory_bytes, allow_pickle, progress)
            source: Found
            if _calibrated(recipe) and not is_gguf(model):
                folder = _calibrate(
                    recipe, model, staging.work, imatrix, resume, max_memory_bytes, allow_pickle, progress
                )
                source = stack.enter_context(_opened(recipe, folder, allow_pickle=False, lossy=False))
            else:
                source = stack.enter_context(_opened(recipe, model, allow_pickle=allow_pickle, lossy=lossy))
            plan = _plan(recipe, source, choice, imatrix is not None, output.stem, requantize, imatrix)
            _check_targets(staging, plan, source, model)
            for note in plan.notes:
                progress.note(note)
            journal = _journal(staging, _identity(recipe, source, imatrix, plan), resume, plan, progress)
            hashes = write_file(
                source,
                plan.targets,
                plan.parts,
                staging.folder,
                journal,
                imatrix,
                progress,
                check=source.check_unchanged,
            )
            progress.note("verifying")
            verify_file(staging.folder / plan.parts[0].file_name, plan.values, plan.targets, hashes)
            published = staging.publish_files([part.file_name for part in plan.parts])
        except (Stopped, ResumeError):
            raise
        except BitwrightError:
            staging.discard()
            raise
        except OSError as error:
            staging.discard()
            where = printable(str(output))
            raise os_error(error, f"writing {where}", folder=output.absolute().parent) from error
    return GgufResult(published[0], plan, hashes)


def _check_targets(staging: Staging, plan: GgufPlan, source: Found, model: Path) -> None:
    """InputError where a file of the plan cannot be published. A split source is read from all of its parts."""
    read = source.file.paths if isinstance(source, FromFile) else (model,)
    staging.check_files([part.file_name for part in plan.parts], read)


def _choice(recipe: Recipe) -> GgufChoice:
    if recipe.layout != "gguf":
        raise InputError(f"layout {recipe.layout} is not written as a GGUF file", mend="use --layout gguf")
    if recipe.overrides:
        raise InputError(
            "exceptions for GGUF go by tensor type", mend="use --tensor-type PATTERN=TYPE instead of overrides"
        )
    return recipe.gguf or GgufChoice()


def _calibrated(recipe: Recipe) -> bool:
    return recipe.method != "rtn" or bool(recipe.transforms)


def _given_imatrix(choice: GgufChoice) -> ImportanceMatrix | None:
    return read_imatrix(Path(choice.imatrix)) if choice.imatrix not in (None, "auto") else None


@contextmanager
def _opened(recipe: Recipe, model: Path, *, allow_pickle: bool, lossy: bool) -> Iterator[Found]:
    """The model as a source of GGUF tensors, whatever it is."""
    pre = _choice(recipe).pre
    if is_gguf(model):
        if _calibrated(recipe):
            raise InputError(
                f"method {recipe.method} and transforms run the model, which needs a checkpoint folder, not a GGUF file",
                mend="start from the folder, or `bitwright convert FILE -o FOLDER --layout dense` first",
            )
        if _choice(recipe).imatrix == "auto":
            raise InputError(
                "importance weights are collected by running the model, which needs a checkpoint folder, not a GGUF file",
                mend="give --imatrix FILE, collected from the folder with `bitwright imatrix`",
            )
        with GgufFile.open(model) as file:
            yield FromFile(file)
        return
    with SafetensorsDir.open(model, allow_pickle=allow_pickle) as peek:
        quantized = already_quantized(peek.config) is not None
    if not quantized:
        with open_source(model, allow_pickle=allow_pickle) as source:
            rewritten = plan_rewritten(_base(recipe), source)[1] if recipe.transforms else source
            yield FromCheckpoint(rewritten, pre=pre)
        return
    opened = open_checkpoint(model)
    assert isinstance(opened, DecodedSource)
    with opened.stored:
        yield FromBlocks(opened, RegriddedBlocks(opened, lossy=lossy), pre=pre)


def _base(recipe: Recipe) -> Recipe:
    """The recipe for the blockwise engine, before types are known: some ggml type, so that a plan can be made at all."""
    values = recipe.model_dump() | {"gguf": None, "scheme": "ggml", "scheme_options": {"type": "Q8_0"}}
    return make_recipe(values)


def _plan(
    recipe: Recipe,
    source: Found,
    choice: GgufChoice,
    has_imatrix: bool,
    stem: str,
    requantize: bool,
    imatrix: ImportanceMatrix | None = None,
) -> GgufPlan:
    """Types of all tensors, and the files. PlanError for what cannot be."""
    mix = mixture(choice.type)
    kept = isinstance(source, FromBlocks)
    shapes = {name: place.shape for name, place in source.places.items() if name not in source.plain}
    wanted = (
        {}
        if kept
        else assign(
            mix, shapes, facts(source.values), imatrix=has_imatrix, pure=choice.pure, embedding=_upper(choice.embedding_type),
            output=_upper(choice.output_type), overrides=[Override.parse(text) for text in choice.tensor_types],
        )
    )  # fmt: skip
    targets: list[Target] = []
    for name, place in source.places.items():
        stored = place.stored
        if isinstance(source, FromBlocks):
            block = stored or _plain_block(source, place, mix)
        else:
            block = TYPES[wanted[name]] if name in wanted else stored or TYPES["F32"]
        copy = stored is not None and stored == block
        if stored is not None and stored.blocked and block.blocked and not copy and not requantize:
            raise PlanError(
                f"{name} is {stored.name} already; quantizing it anew to {block.name} would add the errors of both",
                mend="start from an F16, BF16 or F32 file, or allow it with --requantize",
            )
        if block.wants_weights and not copy and not has_imatrix:
            raise PlanError(
                f"{name}: {block.name} needs importance weights", mend="give --imatrix FILE or --imatrix auto"
            )
        if block.integer and not copy:
            raise PlanError(f"{name}: {block.name} holds integers, no weights", mend="choose another type")
        targets.append(Target(place, block, copy))
    if TYPES[mix.base].blocked and not any(target.block.blocked for target in targets):
        raise PlanError(
            "nothing would be quantized: there is no matrix of a model in it", mend="check which file this is"
        )
    values = _values(recipe, source, targets, _file_type(recipe, mix, targets if kept else ()), imatrix)
    return GgufPlan(
        targets=tuple(targets),
        parts=plan_file(values, targets, stem=stem, max_part_bytes=choice.max_part_bytes),
        values=values,
        left_out=source.left_out,
        notes=_plan_notes(source, targets, imatrix),
    )


def _plain_block(source: FromBlocks, place: Place, mix: Mixture) -> BlockType:
    """For what a quantized checkpoint has left alone: the plain type that was asked for, or the one that holds its values exactly."""
    if place.name in source.plain or not quantizable(place.name, place.shape):
        return TYPES["F32"]
    return TYPES[source.exact_type(place.name) if TYPES[mix.base].blocked else mix.base]


def _file_type(recipe: Recipe, mix: Mixture, targets: Sequence[Target]) -> int:
    """The mixture's number; of a file that was converted integer for integer that of the type most weights have."""
    counts: dict[str, int] = {}
    for target in targets if not _calibrated(recipe) else ():
        counts[target.block.name] = counts.get(target.block.name, 0) + target.place.rows * target.place.columns
    most = max(counts, key=lambda name: counts[name]) if counts else mix.name
    return MIXTURES[most].number if most in MIXTURES else _GUESSED


def _upper(name: str | None) -> str | None:
    return None if name is None else name.upper()


def _plan_notes(source: Found, targets: list[Target], imatrix: ImportanceMatrix | None) -> tuple[str, ...]:
    notes = [*source.notes, *(f"left out: {name}: {why}" for name, why in source.left_out.items())]
    if imatrix is not None:
        missing = [
            t.place.name for t in targets if t.block.blocked and not t.copy and t.place.name not in imatrix.entries
        ]
        inside = [name for name in missing if name.startswith("blk.")]
        if inside:
            shown = ", ".join(inside[:3]) + (" ..." if len(inside) > 3 else "")
            notes.append(f"{len(inside)} tensors have no importance weights and are quantized without ({shown})")
    return tuple(notes)


def _values(
    recipe: Recipe, source: Found, targets: list[Target], file_type: int, imatrix: ImportanceMatrix | None
) -> dict[str, GgufValue]:
    """The header: the model's values, the type of the file, and where it comes from."""
    values = dict(source.values)
    values["general.file_type"] = u32(file_type)
    if any(target.block.blocked for target in targets):
        values["general.quantization_version"] = u32(2)
    if imatrix is not None:
        values["quantize.imatrix.file"] = string(imatrix.origin[:127])
        values["quantize.imatrix.dataset"] = string((imatrix.datasets[0] if imatrix.datasets else "")[:127])
        values["quantize.imatrix.entries_count"] = u32(len(imatrix.entries))
        values["quantize.imatrix.chunks_count"] = u32(imatrix.chunks)
    section = (recipe.gguf or GgufChoice()).model_dump(exclude_none=True)
    if "imatrix" in section and section["imatrix"] != "auto":
        section["imatrix"] = Path(section["imatrix"]).name
    made: dict[str, Any] = {"bitwright": versions()["bitwright"], "method": recipe.method, "gguf": section}
    if recipe.transforms:
        # With the seed a rotation can be repeated, to compare with the source layer by layer.
        made |= {"transforms": [transform.model_dump() for transform in recipe.transforms], "seed": recipe.seed}
    values["bitwright.recipe"] = string(json.dumps(made, sort_keys=True))
    return values


def _same_run(work: Path, recipe: Recipe, model: Path) -> None:
    """Note what this run is made of; ResumeError, listing the differences, where the interrupted one was made of something else.

    What is made before the file itself (an importance matrix, the blocks of a calibrated method) is only taken up again by the same run.
    """
    found = {
        f"recipe {key}": json.dumps(value, sort_keys=True) for key, value in recipe.model_dump(mode="json").items()
    }
    found |= {f"version of {name}": value for name, value in versions().items()}
    texts = [recipe.calibration.text, recipe.gguf.imatrix if recipe.gguf is not None else None]
    files = [Path(name) for name in texts if name is not None and Path(name).is_file()]
    files += sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else [model]
    for path in files:
        status = path.stat()
        found[f"size and last change of {path.name}"] = f"{status.st_size} {status.st_mtime_ns}"
    note = work / "run.json"
    if not note.is_file():
        temporary = note.with_suffix(".new")
        temporary.write_text(json.dumps(found, sort_keys=True), encoding="utf-8")
        temporary.replace(note)
        return
    was = load_json(note)
    was = was if isinstance(was, dict) else {}
    changed = [
        f"{key}: was {was.get(key, 'absent')}, is {found.get(key, 'absent')}"
        for key in sorted(was.keys() | found.keys())
        if was.get(key) != found.get(key)
    ]
    if changed:
        raise ResumeError(
            "the interrupted run was another one; " + "; ".join(changed),
            mend="run it with the same inputs, or start again with --resume never",
        )


def _auto_imatrix(
    recipe: Recipe, model: Path, work: Path, max_memory_bytes: int | None, allow_pickle: bool, progress: Progress
) -> ImportanceMatrix:
    """Collected from the calibration text, once per run: an interrupted one finds it again."""
    from bitwright.engine.gguf_imatrix import collect_imatrix
    from bitwright.gguf.imatrix import write_imatrix

    held = work / "imatrix.gguf"
    if not held.is_file():
        text = recipe.calibration
        found = collect_imatrix(
            model, text=text.text, samples=text.samples, length=text.length, seed=recipe.seed, shuffle=text.shuffle,
            max_memory_bytes=max_memory_bytes, pre=_choice(recipe).pre, allow_pickle=allow_pickle, progress=progress,
        )  # fmt: skip
        write_imatrix(found, held)
    return read_imatrix(held)


def _calibrate(
    recipe: Recipe,
    model: Path,
    work: Path,
    imatrix: ImportanceMatrix | None,
    resume: Literal["auto", "require", "never"],
    max_memory_bytes: int | None,
    allow_pickle: bool,
    progress: Progress,
) -> Path:
    """Run the blockwise engine with the types that the mixture gives to the checkpoint's linears; the folder of blocks."""
    folder = work / "blocks"
    if folder.is_dir():
        return folder
    choice = _choice(recipe)
    with _opened(recipe, model, allow_pickle=allow_pickle, lossy=False) as source:
        plan = _plan(recipe, source, choice, imatrix is not None, "model", requantize=False)
        modules = source.modules
    overrides: list[dict[str, Any]] = []
    roles = {"head": False, "embeddings": False}
    for target in plan.targets:
        for module in modules.get(target.place.name, ()) if target.block.blocked else ():
            if target.place.name in ("token_embd.weight", "output.weight"):
                roles["embeddings" if target.place.name == "token_embd.weight" else "head"] = True
            overrides.append(
                {
                    "pattern": f"re:^{re.escape(module)}$",
                    "scheme": "ggml",
                    "scheme_options": {"type": target.block.name},
                }
            )
    values: dict[str, Any] = recipe.model_dump() | {"gguf": None, "scheme": "ggml", "scheme_options": {"type": "Q8_0"}}
    values |= roles
    overrides.append({"pattern": "*", "keep": True})
    values["overrides"] = overrides
    quantize_folder(
        make_recipe(values), model, folder, resume="auto" if resume == "require" else resume,
        max_memory_bytes=max_memory_bytes, allow_pickle=allow_pickle, progress=progress,
    )  # fmt: skip
    return folder


def _identity(recipe: Recipe, source: Found, imatrix: ImportanceMatrix | None, plan: GgufPlan) -> dict[str, str]:
    identity = {
        f"recipe {key}": json.dumps(value, sort_keys=True) for key, value in recipe.model_dump(mode="json").items()
    }
    identity |= {f"model file {name}": value for name, value in source.fingerprint().items()}
    identity |= {f"version of {name}": value for name, value in versions().items()}
    identity["tensor types"] = json.dumps({t.place.name: t.block.name for t in plan.targets})
    if imatrix is not None:
        total = sum(float(sums.squares.sum(dtype="float64")) for sums in imatrix.entries.values())
        identity["importance weights"] = f"{len(imatrix.entries)} entries, {total!r}"
    return identity


def _journal(staging: Staging, identity: dict[str, str], resume: Resume, plan: GgufPlan, progress: Progress) -> Journal:
    if Journal.present(staging.work) and resume != "never":
        journal = Journal.reopen(staging.work, identity)
        progress.note(f"resuming after {len(journal.commits)} steps")
        return journal
    staging.require_space(plan.file_bytes)
    return Journal.start(staging.work, identity)
