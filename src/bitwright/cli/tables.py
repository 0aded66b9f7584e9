"""What commands print on stdout for people. Names come from strangers' files and are escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.io.text import printable

if TYPE_CHECKING:
    from bitwright.engine.memory import Forecast
    from bitwright.engine.plan import Plan
    from bitwright.engine.run import Result

__all__ = ["print_facts", "print_table", "show_inspection", "show_plan", "show_result", "size"]

_BLOCK = re.compile(r"\.(\d+)\.")


def size(count: int) -> str:
    """Bytes in the unit that reads best.

    >>> size(7467840)
    '7.47 MB'
    """
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{count} bytes" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    # Piped output is not squeezed into 80 columns.
    return console if console.is_terminal else Console(highlight=False, markup=False, width=200)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with left-aligned first column and right-aligned numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(table)


def print_facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Lines of a name and a value."""
    console = _console()
    for name, value in pairs:
        console.print(Text(f"{name:<28}{printable(value)}"), soft_wrap=True)


def _folded(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Names that differ only in the block number as one pattern with ``*``, and the indices of each."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(_BLOCK.sub(".*.", name), []).append(index)
    return list(groups.items())


def show_plan(plan: Plan, forecast: Forecast, *, all_tensors: bool) -> None:
    """The plan as a table and a summary."""
    names = [entry.tensor for entry in plan.entries]
    groups = [(name, [i]) for i, name in enumerate(names)] if all_tensors else _folded(names)
    rows = []
    for name, indices in groups:
        entries = [plan.entries[i] for i in indices]
        first = entries[0]
        kinds = {(e.action, e.scheme.describe_all() if e.scheme else e.reason) for e in entries}
        what = first.action if len(kinds) == 1 else "mixed (see --all)"
        detail = (first.scheme.describe_all() if first.scheme else first.reason) if len(kinds) == 1 else ""
        shape = "x".join(str(d) for d in first.spec.shape)
        before, after = sum(e.spec.nbytes for e in entries), sum(e.stored_bytes for e in entries)
        rows.append((name, str(len(entries)), shape, what, detail, size(before), size(after)))
    print_table(("tensor", "count", "shape", "", "scheme or reason", "now", "then"), rows)
    print_facts(
        [
            ("method", plan.recipe.method),
            ("layout", plan.layout.name),
            (
                "weight files",
                f"{plan.weight_file_bytes} bytes ({size(plan.weight_file_bytes)}; now {size(plan.source_bytes)})",
            ),
            (
                "bits per parameter",
                f"{plan.bits_per_weight:.3f} (quantized layers {plan.quantized_bits_per_weight:.3f})",
            ),
            ("peak memory", f"about {size(forecast.peak_bytes)} beside the interpreter and its libraries"),
            ("temporary disk", size(forecast.disk_bytes)),
        ]
    )
    for engine, why in plan.engines.items():
        print_facts([(f"loads in {engine}", "yes" if why is None else f"no: {why}")])
    for note in plan.notes:
        print_facts([("note", note)])


def show_result(result: Result) -> None:
    """What a run produced."""
    plan = result.plan
    facts = [
        ("written", str(result.output)),
        ("weight files", f"{size(plan.weight_file_bytes)} (were {size(plan.source_bytes)})"),
        ("bits per parameter", f"{plan.bits_per_weight:.3f} (quantized layers {plan.quantized_bits_per_weight:.3f})"),
    ]
    quality = result.quality
    if quality:
        facts.append(
            (
                "on the calibration text",
                f"perplexity {quality['perplexity_source']:.4g} -> {quality['perplexity_quantized']:.4g}, "
                f"mean KL {quality['kl_mean']:.5f} ({int(quality['tokens'])} tokens)",
            )
        )
    print_facts(facts)


def show_inspection(found: dict[str, Any], *, all_tensors: bool) -> None:
    """What ``inspect`` found."""
    tensors = found["tensors"]
    names = [line["name"] for line in tensors]
    groups = [(name, [i]) for i, name in enumerate(names)] if all_tensors else _folded(names)
    rows = []
    for name, indices in groups:
        lines = [tensors[i] for i in indices]
        schemes = sorted({line["scheme"] for line in lines})
        bytes_, count = sum(line["stored_bytes"] for line in lines), sum(line["parameters"] for line in lines)
        shape = "x".join(str(d) for d in lines[0]["shape"])
        rows.append(
            (name, str(len(lines)), shape, ", ".join(schemes), f"{8 * bytes_ / max(count, 1):.3f}", size(bytes_))
        )
    print_table(("tensor", "count", "shape", "scheme", "bits/weight", "bytes"), rows)
    facts = [
        ("layout", found["layout"]),
        ("model type", str(found["model_type"])),
        ("parameters", f"{found['parameters']:,}"),
        ("data", size(found["data_bytes"])),
        ("bits per parameter", f"{found['bits_per_weight']:.3f}"),
    ]
    provenance = found["provenance"]
    if isinstance(provenance, dict):
        recipe = provenance.get("recipe", {})
        facts.append(("made by", f"bitwright {provenance.get('bitwright', '?')}"))
        facts.append(
            (
                "recipe",
                ", ".join(f"{k} {recipe[k]}" for k in ("method", "bits", "group_size", "symmetric") if k in recipe),
            )
        )
        for name, value in (provenance.get("quality") or {}).items():
            facts.append((name.replace("_", " "), f"{value:.6g}"))
        for line in provenance.get("fallbacks", []):
            facts.append(("fallback", f"{line.get('tensor')}: {line.get('fallback')}"))
    print_facts(facts)
