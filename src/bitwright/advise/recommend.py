"""Recipes for a task on a machine, ranked: what loads, what fits, what is lost, and the command that makes it.

Nothing is suggested that the engine does not load on the hardware (``advise.engines``), that the layout cannot store for this model (the
plan says so), or that does not fit the memory (``advise.memory``). Among what is left, ``advise.knowledge`` says what a task wants.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.advise.engines import Reading, engine
from bitwright.advise.knowledge import CANDIDATES, LADDER, Candidate, is_faithful, measured, order, quality_origin
from bitwright.advise.memory import MemoryForecast, forecast_serving, forecast_training
from bitwright.advise.scenario import Scenario, memory_engine
from bitwright.advise.shape import ModelShape
from bitwright.advise.weights import WeightBytes, weight_bytes
from bitwright.advise.words import describe_device, gigabytes, not_there, start_command
from bitwright.errors import InputError, PlanError

__all__ = ["Advice", "Subject", "Suggestion", "recommend"]

#: A model larger than this is not loaded to sample calibration text from (``engine.sample``).
_SAMPLED = 16_000_000_000


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model. path: where it is, None where only its size is known. text: calibration text for commands. longest: its own context."""

    shape: ModelShape
    path: Path | None = None
    name: str = "MODEL"
    text: str | None = None
    longest: int | None = None

    def weights(self, candidate: Candidate) -> WeightBytes:
        """As this recipe would store it: from the plan where the model is at hand. PlanError or InputError where it cannot."""
        if self.path is not None:
            from bitwright.advise.stored import planned_weights

            return planned_weights(self.path, candidate.recipe()).weights
        if candidate.is_gguf:
            return weight_bytes(self.shape, layout="gguf", type=candidate.name)
        recipe = candidate.recipe()
        return weight_bytes(self.shape, layout=recipe.layout, recipe=recipe.model_dump())

    @property
    def dense(self) -> WeightBytes:
        """In 16 bits."""
        return weight_bytes(self.shape, layout="dense")


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One recipe in one engine. kl: expected loss, on the model of ``knowledge.quality_origin``; kl_here: measured on this very model.

    command: makes it. start: runs it. notes: what to know or install.
    """

    name: str
    engine: str
    layout: str
    memory: MemoryForecast
    budget: int
    native: bool
    kl: float | None
    reason: str
    command: str
    start: str
    notes: tuple[str, ...] = ()
    kl_here: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "engine": self.engine,
            "layout": self.layout,
            "memory": self.memory.to_json(),
            "budget_bytes": self.budget,
            "native_products": self.native,
            "kl_expected": self.kl,
            "kl_measured_here": self.kl_here,
            "reason": self.reason,
            "command": self.command,
            "start": self.start,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Advice:
    """suggestions: the best first. path: how it was decided, in sentences. refused: recipe (engine) -> why not. otherwise: what
    would fit, where nothing does.
    """

    suggestions: tuple[Suggestion, ...]
    path: tuple[str, ...]
    refused: dict[str, str]
    otherwise: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "suggestions": [found.to_json() for found in self.suggestions],
            "decision": list(self.path),
            "refused": self.refused,
            "otherwise": list(self.otherwise),
            "expected_loss": quality_origin(),
        }


def recommend(subject: Subject, scenario: Scenario, *, most: int = 4) -> Advice:
    """At most ``most`` suggestions. An empty list comes with what would fit instead."""
    path = [describe_device(scenario)]
    refused: dict[str, str] = {}
    if subject.longest is not None and scenario.context > subject.longest:
        raise InputError(
            f"the model reads {subject.longest} tokens, not {scenario.context}", mend=f"use --context {subject.longest}"
        )
    found: list[Suggestion] = []
    second: list[Suggestion] = []
    for name in scenario.engines:
        names, why = order(scenario, name)
        reserve, for_whom = scenario.reserve(name)
        left = gigabytes(scenario.budget(name))
        path.append(
            f"{engine(name).title}: {gigabytes(scenario.memory)} less {gigabytes(reserve)} ({for_whom}) leave {left}"
        )
        path += [f"{engine(name).title}: {line}" for line in not_there(scenario, name)]
        path.append(f"{engine(name).title}: {why}")
        seen: set[str] = set()
        for candidate in (CANDIDATES[item] for item in names):
            suggestion = _safely(subject, scenario, name, candidate)
            if isinstance(suggestion, str):
                refused[f"{candidate.name} ({name})"] = suggestion
            else:
                # A second one of a family (4-bit integers, float8, ...) is hardly a choice, and comes last.
                (second if candidate.family in seen else found).append(suggestion)
                seen.add(candidate.family)
    found += second
    if scenario.is_exact:
        # A stable sort: engines keep their order among recipes that are as faithful.
        found.sort(key=lambda one: 1 - is_faithful(one.name))
    too_large = [what for what, reason in refused.items() if reason.startswith("takes ")]
    if too_large:
        path.append(f"too large: {', '.join(f'{what} {refused[what]}' for what in too_large[:4])}")
    path.append(_plain(subject, scenario))
    otherwise = () if found else _otherwise(subject, scenario)
    return Advice(suggestions=tuple(found[:most]), path=tuple(path), refused=refused, otherwise=otherwise)


def _try(subject: Subject, scenario: Scenario, name: str, candidate: Candidate) -> Suggestion | str:
    """A suggestion, or why it is none."""
    reading = engine(name).reading(candidate.kind)
    reason = reading.refused_on(scenario.hardware)
    if reason is not None:
        return reason
    native = reading.is_native_on(scenario.hardware)
    if not reading.packed or (name == "transformers" and candidate.kind == "fp8" and not native):
        return "decoded to 16 bits while it runs: no memory is saved"
    layout_says = _layout_refuses(subject, name, candidate)
    if layout_says is not None:
        return layout_says
    weights = subject.weights(candidate)
    memory = forecast(subject, scenario, name, weights)
    budget, once = scenario.budget(name), False
    if memory.total_bytes > budget and weights.repacked and name == "llamacpp" and scenario.hardware.is_cpu:
        once, memory = True, forecast(subject, scenario, name, replace(weights, repacked=0))
    if memory.total_bytes > budget:
        return f"takes {gigabytes(memory.total_bytes)}"
    output = f"{_stem(subject)}-{candidate.name}" + (".gguf" if candidate.is_gguf else "")
    flags, notes = _flags(subject, candidate)
    start = start_command(scenario, name, output)
    if once:
        start += " --no-repack"
        notes = (*notes, "--no-repack: llama.cpp's second copy of the weights does not fit; slower")
    return Suggestion(
        name=candidate.name,
        engine=name,
        layout="gguf" if candidate.is_gguf else candidate.recipe().layout,
        memory=memory,
        budget=budget,
        native=native,
        kl=measured(candidate.name),
        reason=candidate.good_for,
        command=shlex.join(["bitwright", "quantize", subject.name, "-o", output, *flags]),
        start=start,
        notes=(*_needs(name, reading), *_warnings(scenario, candidate), *notes),
    )


def forecast(subject: Subject, scenario: Scenario, name: str, weights: WeightBytes) -> MemoryForecast:
    """Memory of the task in this engine."""
    device = "cpu" if scenario.hardware.is_cpu else "cuda"
    if scenario.task == "finetune":
        return forecast_training(
            subject.shape,
            weight_bytes=weights,
            context=scenario.context,
            batch=scenario.batch,
            finetune="qlora",
            device=device,
        )
    family = memory_engine(name)
    return forecast_serving(
        subject.shape, weight_bytes=weights, context=scenario.context, batch=scenario.batch, engine=family, device=device,
        kv=scenario.kv or ("fp16" if family == "llamacpp" else "bf16"),
    )  # fmt: skip


def _layout_refuses(subject: Subject, name: str, candidate: Candidate) -> str | None:
    """The layout's own word about this engine: group sizes, zero points, architectures."""
    from bitwright import catalog
    from bitwright.advise.engines import refusal
    from bitwright.core.options import build
    from bitwright.core.tensor import parse_dtype
    from bitwright.engine.plan import make_scheme

    if candidate.is_gguf:
        return None
    recipe = candidate.recipe()
    layout = build(catalog.load("layouts", recipe.layout), recipe.layout_options, f"layout '{recipe.layout}'")
    return refusal(name, layout, make_scheme(recipe, layout, parse_dtype("bfloat16")), model_type=subject.shape.name)


# --- words -------------------------------------------------------------------------------------------------------------------


def _plain(subject: Subject, scenario: Scenario) -> str:
    name = scenario.engines[0]
    try:
        total = forecast(subject, scenario, name, subject.dense).total_bytes
    except InputError:
        return "the original's memory in 16 bits is not known"
    if scenario.task == "finetune":
        return f"LoRA on the original in 16 bits would take {gigabytes(total)}"
    fits = total <= scenario.budget(name)
    return f"the original in 16 bits takes {gigabytes(total)}: {'it fits too; quantize for speed, or for room' if fits else 'too much'}"


def _needs(name: str, reading: Reading) -> tuple[str, ...]:
    return (f"{engine(name).title} needs {reading.needs}",) if reading.needs else ()


def _warnings(scenario: Scenario, candidate: Candidate) -> tuple[str, ...]:
    low = candidate.name in LADDER[LADDER.index("Q3_K_M") :] or candidate.family == "native"
    if low and scenario.is_exact:
        return (f"so few bits are risky for {scenario.task}; a smaller model with more bits may do better",)
    return ()


def _flags(subject: Subject, candidate: Candidate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Flags of the command, with calibration text where one is needed, and a note about it."""
    if not candidate.text:
        return candidate.flags, ()
    if subject.text is not None:
        return (*candidate.flags, "--calibration", subject.text), ()
    if subject.dense.total > _SAMPLED:
        note = "calibration.txt: some hundred kilobytes of text of the kind the model will see"
        return (*candidate.flags, "--calibration", "calibration.txt"), (note,)
    return candidate.flags, ("calibrated on samples of the model itself; --calibration TEXT is better",)


def _stem(subject: Subject) -> str:
    return subject.name.rstrip("/").rpartition("/")[2] or "model"


# --- where nothing fits ------------------------------------------------------------------------------------------------------


def _otherwise(subject: Subject, scenario: Scenario) -> tuple[str, ...]:
    """What would fit: a shorter context, a smaller batch, other engines, fewer bits, more memory. Only what was tried is named."""
    lines: list[str] = []
    shorter = _largest_context(subject, scenario)
    if shorter:
        lines.append(f"with --context {shorter[0]}: {shorter[1]} in {engine(shorter[2]).title}")
    small = _small_cache(scenario)
    first = _first(subject, small) if small is not None else None
    if small is not None and first:
        lines.append(f"with an 8-bit KV cache (--kv {small.kv}): {first[0]} in {engine(first[1]).title}")
    if scenario.batch > 1:
        single = replace(scenario, batch=1)
        first = _first(subject, single)
        if first:
            lines.append(f"with --batch 1: {first[0]} in {engine(first[1]).title}")
    for other in ("llamacpp", "transformers", "bitwright"):
        if other not in scenario.engines and scenario.task != "finetune":
            first = _first(subject, replace(scenario, engine=other))
            if first:
                lines.append(f"with --engine {other}: {first[0]}")
    least = _least(subject, scenario)
    if least is not None:
        total, name, where = least
        lines.append(f"the smallest that loads is {name} in {engine(where).title}, which takes {gigabytes(total)}")
        if "llamacpp" in (where, *scenario.engines) and not scenario.hardware.is_cpu:
            lines.append("llama.cpp can keep some layers in main memory (-ngl N), at the price of speed")
    lines.append("a smaller model: at 4 bits a model of half the size takes about half")
    return tuple(lines)


def _first(subject: Subject, scenario: Scenario) -> tuple[str, str] | None:
    for name in scenario.engines:
        for item in order(scenario, name)[0]:
            if isinstance(_safely(subject, scenario, name, CANDIDATES[item]), Suggestion):
                return item, name
    return None


def _safely(subject: Subject, scenario: Scenario, name: str, candidate: Candidate) -> Suggestion | str:
    try:
        return _try(subject, scenario, name, candidate)
    except (PlanError, InputError) as error:
        return error.message


def _small_cache(scenario: Scenario) -> Scenario | None:
    """The same with keys and values in 8 bits, where an engine of the scenario has such a cache."""
    families = [memory_engine(name) for name in scenario.engines]
    if scenario.task == "finetune" or scenario.kv is not None:
        return None
    if "llamacpp" in families:
        return replace(scenario, kv="q8_0")
    return replace(scenario, kv="fp8") if "vllm" in families and not scenario.hardware.is_cpu else None


def _largest_context(subject: Subject, scenario: Scenario) -> tuple[int, str, str] | None:
    context = scenario.context // 2
    while context >= 512:
        first = _first(subject, replace(scenario, context=context))
        if first:
            return context, *first
        context //= 2
    return None


def _least(subject: Subject, scenario: Scenario) -> tuple[int, str, str] | None:
    """The smallest memory of all candidates that load, with its recipe and engine."""
    roomy = replace(scenario, memory=10**18)
    found: list[tuple[int, str, str]] = []
    for name in scenario.engines:
        for item in order(scenario, name)[0]:
            suggestion = _safely(subject, roomy, name, CANDIDATES[item])
            if isinstance(suggestion, Suggestion):
                found.append((suggestion.memory.total_bytes, item, name))
    return min(found, default=None)
