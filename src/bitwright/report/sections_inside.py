"""Tables of layers, activations, speed, engines and provenance, from the document."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from bitwright.evaluation.record import LayerError, Speed, Spread
from bitwright.report.document import Activation, Candidate, Document
from bitwright.report.numbers import bytes_text, column, fixed, grouped, significant
from bitwright.report.tables import Cell, Head, Row, Table

__all__ = [
    "Provenance",
    "activation_table",
    "engine_table",
    "layer_table",
    "measurement_facts",
    "predictions",
    "provenance",
    "speed_table",
]

_WORST = 10
#: Fingerprints of single tensors are listed up to this many; all of them are in ``bitwright.json``.
_HASHES = 400


def layer_table(layers: Sequence[LayerError]) -> Table | None:
    """The linears whose output suffers most, and those outside the blocks."""
    if not layers:
        return None
    worst = sorted(layers, key=lambda one: -one.relative)[:_WORST]
    shown = worst + [one for one in layers if one.block is None and one not in worst]
    rows = tuple(
        Row(
            one.module,
            (
                Cell(one.scheme),
                Cell(significant(one.relative, 3), value=one.relative),
                Cell("exact" if one.snr_db is None else fixed(one.snr_db, 1), value=one.snr_db),
                Cell(significant(one.weight, 3), value=one.weight),
                Cell(fixed(100 * one.top_channels, 1), value=one.top_channels),
            ),
        )
        for one in shown
    )
    heads = (
        Head("scheme", number=False),
        Head("output error", "E|(W' - W) x|² / E|W x|², with the original's inputs"),
        Head("dB", "Signal-to-noise ratio of the output"),
        Head("weight error", "|W' - W|² / |W|²"),
        Head("from 1 % of channels, %", "Share of the output error from the input channels that contribute most"),
    )
    return Table(f"The {len(worst)} linears whose output suffers most, of {len(layers)}", "module", heads, rows)


def activation_table(activations: Sequence[Activation]) -> Table | None:
    """Inputs that need more than one scale for the tensor, the worst first."""
    found = sorted((one for one in activations if one.advice != "fine"), key=lambda one: -one.lost_bits_tensor)[:_WORST]
    if not found:
        return None
    total = sum(one.advice != "fine" for one in activations)
    rows = tuple(
        Row(
            f"block {one.block}, {one.label}",
            (
                Cell(significant(one.largest, 4), value=one.largest),
                Cell(fixed(one.lost_bits_tensor, 1), value=one.lost_bits_tensor),
                Cell(fixed(one.lost_bits_token, 1), value=one.lost_bits_token),
                Cell(one.advice),
            ),
        )
        for one in found
    )
    heads = (
        Head("largest |x|"), Head("bits lost, one scale", "One scale for the whole tensor"),
        Head("a scale per token", "Bits lost with one scale for each token"), Head("advice", number=False),
    )  # fmt: skip
    of = f"{len(found)} of {total}" if total > len(found) else str(total)
    return Table(f"Inputs that lose more than two of eight bits to one scale: the worst {of}", "input", heads, rows)


def speed_table(document: Document) -> Table | None:
    """Every measurement with its figures, or why there are none."""
    named = [(document.source.name if document.source else "original", document.source_speed)]
    named += [(one.name, one.speed) for one in document.candidates]
    found = [(name, one) for name, speeds in named for one in speeds]
    if not found:
        return None
    figures = [
        (head, _speed_cells([of(one) for _, one in found]))
        for head, of in _FIGURES
        if any(of(one) is not None for _, one in found)
    ]
    heads = (
        Head("engine", number=False), Head("device", number=False), Head("batch"), Head("prompt", "Tokens of the prompt"),
        Head("new", "Tokens generated"), *(head for head, _ in figures), Head("dtype", number=False), Head("threads"), Head("runs"),
    )  # fmt: skip
    rows = tuple(
        Row(
            name,
            (
                Cell(one.engine), Cell(one.device), Cell(str(one.batch)), Cell(str(one.prompt_tokens)), Cell(str(one.new_tokens)),
                *(cells[i] for _, cells in figures), Cell(one.dtype), Cell(str(one.threads)), Cell(str(one.repetitions)),
            ),
            one.note or "",
        )
        for i, (name, one) in enumerate(found)
    )  # fmt: skip
    return Table("Speed and memory, every measurement", "model", heads, rows, sortable=True)


def _gigabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e9


#: Columns of the speed table that hold measurements.
_FIGURES: tuple[tuple[Head, Callable[[Speed], Spread | float | None]], ...] = (
    (Head("first token, ms", "Median of the repetitions; below, the smallest and the largest"), lambda one: one.time_to_first_token_ms),
    (Head("p50, ms", "Between tokens after the first, median"), lambda one: one.inter_token_p50_ms),
    (Head("p99, ms", "Between tokens after the first, 99 % are faster"), lambda one: one.inter_token_p99_ms),
    (Head("prompt tokens/s", "Median; below, the smallest and the largest"), lambda one: one.prompt_tokens_per_s),
    (Head("new tokens/s", "Median; below, the smallest and the largest"), lambda one: one.new_tokens_per_s),
    (Head("loading, s"), lambda one: None if one.load_ms is None else one.load_ms / 1000),
    (Head("memory, GB", "Peak resident memory"), lambda one: _gigabytes(one.peak_resident_bytes)),
    (Head("device, GB", "Peak memory of the accelerator"), lambda one: _gigabytes(one.peak_device_bytes)),
)  # fmt: skip


def _speed_cells(found: Sequence[Spread | float | None]) -> list[Cell]:
    values = [one.median if isinstance(one, Spread) else one for one in found]
    notes = [f"{significant(one.low)} to {significant(one.high)}" if isinstance(one, Spread) else "" for one in found]
    texts = column(values, 3, most=3)
    return [Cell(text or "–", note, value=value) for text, note, value in zip(texts, notes, values, strict=True)]


def engine_table(document: Document) -> tuple[Table, list[str]] | None:
    """Which engine loads which candidate; reasons are numbered and listed once."""
    found = [one for one in document.candidates if one.loads_in]
    engines = list(dict.fromkeys(engine for one in found for engine in one.loads_in))
    if not engines:
        return None
    reasons: dict[str, int] = {}
    rows = []
    for one in found:
        cells = []
        for engine in engines:
            if engine not in one.loads_in:
                cells.append(Cell("–"))
                continue
            why = one.loads_in[engine]
            if why is None:
                cells.append(Cell("yes", tone="good"))
            else:
                number = reasons.setdefault(why, len(reasons) + 1)
                cells.append(Cell("no", f"({number})", title=why, tone="bad"))
        rows.append(Row(one.name, tuple(cells), one.layout))
    heads = tuple(Head(engine, number=False) for engine in engines)
    return Table("Which engine loads which candidate", "candidate", heads, tuple(rows)), list(reasons)


@dataclass(frozen=True)
class Provenance:
    """Where one candidate comes from. facts: names and values; files, hashes: name and fingerprint; hidden: how many are not listed."""

    name: str
    facts: tuple[tuple[str, str], ...]
    recipe: str
    files: tuple[tuple[str, str], ...]
    hashes: tuple[tuple[str, str], ...]
    hidden: int
    fallbacks: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def provenance(one: Candidate) -> Provenance:
    """All that is known of how a candidate was made."""
    facts = [("layout", one.layout), ("method", one.method or ""), ("scheme", one.scheme or "")]
    facts.append(
        ("weight files", f"{bytes_text(one.size.weight_file_bytes)} ({grouped(one.size.weight_file_bytes)} bytes)")
    )
    if one.size.parameters is not None:
        facts.append(("parameters", grouped(one.size.parameters)))
    if one.size.bits_per_weight is not None:
        facts.append(("bits per weight, whole model", fixed(one.size.bits_per_weight, 3)))
    if one.size.quantized_bits_per_weight is not None:
        facts.append(("quantized layers alone", fixed(one.size.quantized_bits_per_weight, 3)))
    if one.seconds is not None:
        facts.append(("quantizing took", f"{fixed(one.seconds, 0 if one.seconds >= 100 else 1)} s"))
    hashes = tuple(one.hashes.items())
    return Provenance(
        name=one.name,
        facts=tuple((name, value) for name, value in facts if value),
        recipe=_yaml(one.recipe),
        files=tuple(one.files.items()),
        hashes=hashes if len(hashes) <= _HASHES else (),
        hidden=len(hashes) if len(hashes) > _HASHES else 0,
        fallbacks=tuple((str(line.get("tensor", "")), _fallback(line)) for line in one.fallbacks),
        notes=one.notes,
    )


def _fallback(line: Mapping[str, object]) -> str:
    if "fallback" in line:
        return str(line["fallback"])
    return ", ".join(f"{name} {value}" for name, value in line.items() if name != "tensor")


def _yaml(recipe: Mapping[str, object]) -> str:
    """The recipe as it could be given to ``--recipe``; "" where there is none."""
    if not recipe:
        return ""
    # Through JSON: the document may hold tuples and other mappings, which YAML would tag.
    plain = json.loads(json.dumps(recipe, default=str))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)).rstrip("\n")


_CONVENTIONS = {
    "non-overlapping": "windows side by side; every token but the first of each is predicted",
    "sliding": "windows that overlap; only the tokens that are new to a window count",
    "llama.cpp": "as llama-perplexity does: windows side by side, of which the second half counts",
}


def predictions(document: Document) -> int:
    """How many tokens the perplexities are over: with few windows far less than the texts hold. 0 where nothing was measured."""
    return max((one.quality.model.tokens for one in document.candidates if one.quality is not None), default=0)


def measurement_facts(document: Document) -> list[tuple[str, str]]:
    """How quality was measured, as names and values."""
    how = document.measurement
    if how is None:
        return []
    meaning = f": {_CONVENTIONS[how.convention]}" if how.convention in _CONVENTIONS else ""
    advance = f", advancing by {how.stride}" if how.stride else ""
    facts = [
        ("convention", how.convention + meaning),
        ("windows", f"{grouped(how.windows)} of {grouped(how.length)} tokens{advance}"),
        ("predictions", grouped(predictions(document))),
        ("activations", how.dtype),
        ("special tokens", "added by the tokenizer" if how.special_tokens else "not added"),
    ]
    facts += [(f"text {name}", f"{grouped(count)} tokens") for name, count in how.texts.items()]
    return facts
