"""The page: one HTML file with everything that a document holds, drawn from it and from nothing else.

It asks for nothing from the network, needs no script, and is the same for the same document and the same versions of jinja2 and
matplotlib. Names come from strangers: jinja2 escapes them, control and direction characters are spelled out, and a content security
policy lets no script run but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import InputError
from bitwright.io.text import printable
from bitwright.report import sections, sections_inside
from bitwright.report.charts import require_matplotlib
from bitwright.report.document import Candidate, Document
from bitwright.report.figures import Chart, short
from bitwright.report.figures_layers import (
    HeatMap,
    Scale,
    activation_maps,
    block_chart,
    heat_chart,
    histogram_chart,
    layer_map,
    scale_of,
)
from bitwright.report.figures_quality import frontier, pareto_chart, perplexity_chart
from bitwright.report.figures_speed import groups_of, speed_charts
from bitwright.report.numbers import bytes_text, fixed, grouped, percent, significant
from bitwright.report.palette import DARK, HEAT_LEVELS, LIGHT
from bitwright.report.verdict import GRADES, Verdict, grade, increase, verdict

__all__ = ["render_page"]

#: Heat maps beside the main one.
_MULTIPLES = 4
#: Names longer than this are cut in the middle: the page is for reading.
_NAME = 120
_MINUS = re.compile(r"(?<![\w.])-(?=\d|infinite)")
_TIMES = re.compile(r"(?<=\d)x\b")


@dataclass(frozen=True)
class _Tile:
    """One key figure. tone: good, warn, bad or ""."""

    label: str
    value: str
    unit: str = ""
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class _Legend:
    """Ends of a heat map's scale."""

    low: str
    high: str


@dataclass(frozen=True)
class _Heat:
    """Heat maps with one scale. charts: title and chart, the main one first."""

    charts: tuple[tuple[str, Chart], ...]
    legend: _Legend


def render_page(document: Document) -> str:
    """The whole page. InputError where jinja2 or matplotlib is missing."""
    require_page()
    import jinja2

    loader = jinja2.PackageLoader("bitwright.report", "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_final,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(name=_name, figure=_figure)
    script = loader.get_source(environment, "page.js")[0].strip()
    content = _content(document)
    from markupsafe import Markup

    return environment.get_template("page.html").render(
        content,
        style=Markup(environment.get_template("page.css").render(light=LIGHT, dark=DARK)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # Drawn by us from escaped names: see report/figures.py.
        drawn=Markup,
        levels=range(HEAT_LEVELS),
        grades=GRADES,
    )


def require_page() -> None:
    if importlib.util.find_spec("jinja2") is None:
        raise InputError("the page is drawn by jinja2", mend="pip install bitwright[report]")
    require_matplotlib()


def _final(value: Any) -> Any:
    """What every value of the template goes through: text without control characters, lines apart."""
    return printable(value, keep="\n") if type(value) is str else value


def _name(text: str) -> str:
    """A stranger's name on one line, not longer than a page can bear."""
    return short(printable(text), _NAME)


def _figure(text: str) -> str:
    """Our own figures with the signs that print has for them.

    >>> _figure("3.6x smaller; 35.41 -> 35.60 (-0.5 %)")
    '3.6× smaller; 35.41 → 35.60 (−0.5\xa0%)'
    """
    text = _TIMES.sub("×", _MINUS.sub("−", text.replace("->", "→")))
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _content(document: Document) -> dict[str, Any]:
    """Everything the template names."""
    found = verdict(document)
    chosen = found.candidate if found else None
    content: dict[str, Any] = {
        "document": document,
        "found": found,
        "chosen": chosen,
        "several": len(document.candidates) > 1,
        "subtitle": _subtitle(document),
        "tiles": _tiles(document, found),
        "quality": None, "any_quality": False, "domains": None, "pareto": None, "perplexity": None, "original_size": "",
        "heat": None, "layers": None, "blocks": None, "histograms": None, "inside": chosen,
        "activation_heat": (), "activations": None, "speed": (), "speeds": None, "tasks": None,
        "gates": None, "said": (), "engines": None, "reasons": (),
        "made": [sections_inside.provenance(one) for one in document.candidates],
        "measured": sections_inside.measurement_facts(document),
    }  # fmt: skip
    if chosen is not None:
        content |= _quality(document, chosen) | _inside(document, chosen) | _use(document, chosen)
    content["missing"] = _missing(document, content)
    return content


def _quality(document: Document, chosen: Candidate) -> dict[str, Any]:
    size = document.source.size if document.source else None
    measured = any(one.quality is not None for one in document.candidates)
    return {
        "quality": sections.quality_table(document, chosen) if measured or len(document.candidates) > 1 else None,
        "any_quality": measured,
        "domains": sections.domain_table(document, chosen),
        "pareto": pareto_chart(document, chosen),
        "perplexity": perplexity_chart(document, chosen),
        "original_size": bytes_text(size.weight_file_bytes) if size else "",
    }


def _inside(document: Document, chosen: Candidate) -> dict[str, Any]:
    """Layers, blocks and weights of the chosen candidate, or of the first that has them; other candidates for comparison."""

    def first(has: str) -> Candidate | None:
        return next((one for one in [chosen, *document.candidates] if getattr(one, has)), None)

    layered, blocked, weighed = first("layers"), first("blocks"), first("histograms")
    others = _others(document, blocked, "blocks")[:_MULTIPLES]
    large, lost = activation_maps(document.activations) if document.activations else (None, None)
    return {
        "heat": _layer_heat(document, layered) if layered else None,
        "layers": sections_inside.layer_table(layered.layers) if layered else None,
        "layered": layered,
        "blocks": block_chart(blocked.blocks, {one.name: one.blocks for one in others}, _name(blocked.name)) if blocked else None,
        "blocked": blocked,
        "histograms": histogram_chart(weighed.histograms) if weighed else None,
        "weighed": weighed,
        "activation_heat": [
            _heat("magnitude", large, "Largest magnitude of every input", scale_of([large], log=True)),
            _heat("lost", lost, "Bits of int8 lost to one scale for the tensor", Scale(0.0, 8.0)),
        ] if large and lost else (),
        "activations": sections_inside.activation_table(document.activations),
    }  # fmt: skip


def _others(document: Document, main: Candidate | None, has: str) -> list[Candidate]:
    """Other candidates that have it: those on the frontier of size and divergence first."""
    found = [one for one in document.candidates if one is not main and getattr(one, has)]
    points = [
        (float(one.size.weight_file_bytes), one.quality.kl.mean if one.quality and one.quality.kl else float("inf"))
        for one in found
    ]
    on = frontier(points)
    return [found[i] for i in [*on, *(i for i in range(len(found)) if i not in on)]]


def _layer_heat(document: Document, main: Candidate) -> _Heat | None:
    shown = [main, *_others(document, main, "layers")[:_MULTIPLES]]
    maps = [(one, found) for one in shown if (found := layer_map(one.layers)) is not None]
    if not maps:
        return None
    scale = scale_of([found for _, found in maps], falling=True)
    what = "Signal-to-noise ratio of every linear's output in decibels"
    charts = [
        (one.name, heat_chart(f"layers{i}", found, scale, f"{what}, {_name(one.name)}", main=i == 0))
        for i, (one, found) in enumerate(maps)
    ]
    return _Heat(tuple(charts), _Legend(f"{scale.low:g} dB", f"{scale.high:g} dB"))


def _heat(key: str, found: HeatMap, title: str, scale: Scale) -> _Heat:
    return _Heat(((title, heat_chart(key, found, scale, title, main=True)),), _ends(scale))


def _ends(scale: Scale) -> _Legend:
    return (
        _Legend(significant(scale.low), significant(scale.high))
        if scale.log
        else _Legend(f"{scale.low:g}", f"{scale.high:g}")
    )


def _use(document: Document, chosen: Candidate) -> dict[str, Any]:
    named = [(document.source.name if document.source else "original", document.source_speed)]
    named += [(one.name, one.speed) for one in document.candidates]
    engines = sections_inside.engine_table(document)
    return {
        "speed": speed_charts(groups_of(named)),
        "speeds": sections_inside.speed_table(document),
        "tasks": sections.task_table(document),
        "gates": sections.gate_table(document),
        "said": sections.gate_sentences(document, chosen),
        "engines": engines[0] if engines else None,
        "reasons": engines[1] if engines else (),
    }


def _subtitle(document: Document) -> list[tuple[str, str]]:
    """The line below the title, as names and values."""
    facts = []
    if document.source is not None:
        facts.append(("original", document.source.name))
        if document.source.model_type:
            facts.append(("type", document.source.model_type))
        size = document.source.size
        if size is not None and size.parameters:
            facts.append(("parameters", _count(size.parameters)))
    if len(document.candidates) > 1:
        facts.append(("candidates", str(len(document.candidates))))
    tokens = sections_inside.predictions(document)
    if tokens:
        facts.append(("measured on", f"{grouped(tokens)} predictions"))
    return facts


def _count(count: int) -> str:
    """A large count in words.

    >>> _count(7_890_000_000), _count(7_467_840), _count(512)
    ('7.89 billion', '7.47 million', '512')
    """
    for name, unit in (("billion", 1e9), ("million", 1e6)):
        if count >= unit:
            return f"{significant(count / unit)} {name}"
    return grouped(count)


_TONES = ("good", "good", "good", "warn", "bad", "bad")


def _tiles(document: Document, found: Verdict | None) -> list[_Tile]:
    if found is None:
        return []
    one, quality = found.candidate, found.candidate.quality
    value, unit = bytes_text(one.size.weight_file_bytes).split()
    origin = document.source.size if document.source else None
    tiles = [_Tile("Weight files", value, unit, f"original {bytes_text(origin.weight_file_bytes)}" if origin else "")]
    if one.size.bits_per_weight is not None:
        inner = one.size.quantized_bits_per_weight
        tiles.append(
            _Tile(
                "Bits per weight",
                fixed(one.size.bits_per_weight, 2),
                "",
                f"quantized layers {fixed(inner, 2)}" if inner else "",
            )
        )
    if quality is not None:
        change = increase(quality)
        note = (
            f"original {significant(quality.source.perplexity, 4)}, {percent(change)}"
            if quality.source and change is not None
            else ""
        )
        tiles.append(_Tile("Perplexity", significant(quality.model.perplexity, 4), "", note))
        if quality.kl is not None:
            words = grade(quality)
            tone = _TONES[words.level] if words else ""
            note = f"99 % below {significant(quality.kl.p99, 2)}"
            tiles.append(_Tile("Mean KL", significant(quality.kl.mean, 2), "nats", note, tone))
        if quality.top1 is not None:
            note = f"top 5 {fixed(100 * quality.top5, 1)} %" if quality.top5 is not None else ""
            tiles.append(_Tile("Same top token", fixed(100 * quality.top1, 1), "%", note))
    gate = one.gate
    if gate is not None:
        held = sum(line.passed for line in gate.lines)
        tiles.append(
            _Tile(
                "Limits",
                "pass" if gate.passed else "fail",
                "",
                f"{held} of {len(gate.lines)} held",
                "good" if gate.passed else "bad",
            )
        )
    return tiles


#: Section -> what is missing without it, and how a document begins that says so itself.
_MISSING: Mapping[str, tuple[str, str]] = {
    "pareto": ("size against divergence: needs two candidates with a KL divergence", "size against"),
    "heat": ("errors of single layers", "errors of layers"),
    "blocks": ("errors along the blocks", "errors of layers"),
    "activation_heat": ("outliers of the activations", "errors of layers"),
    "histograms": ("histograms of the weights", "errors of layers"),
    "speed": ("speed and memory", "speed"),
    "tasks": ("tasks", "tasks"),
    "gates": ("limits: none were given", "limits"),
    "engines": ("which engines load it", "engines"),
}


def _missing(document: Document, content: Mapping[str, Any]) -> list[str]:
    """What has no section, and what the document itself says is missing."""
    found = []
    measured = [one.quality for one in document.candidates if one.quality is not None]
    if not measured:
        found.append("quality")
    elif not any(quality.kl for quality in measured):
        found.append("divergence from the original: no original was given")
    for key, (text, begins) in _MISSING.items():
        said = any(line.lower().startswith(begins) for line in document.not_measured)
        if not content[key] and not said and not (key == "pareto" and len(document.candidates) < 2):
            found.append(text)
    return [*found, *document.not_measured]
