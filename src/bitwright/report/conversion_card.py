"""The model card of a converted checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bitwright.report.card import safe

__all__ = ["conversion_card"]


def conversion_card(provenance: Mapping[str, Any], engines: Mapping[str, str | None]) -> str:
    """Markdown from the content of ``bitwright.json``. Depends on nothing else, not on the clock."""
    done = provenance["conversion"]
    name = safe(provenance["source"]["name"])
    rounding = done["largest_rounding"]
    exact = "Decoded weights are the source's, bit for bit."
    if done["to"] == "dense":
        exact = f"The weights are the source's, decoded and rounded once to {safe(done['dtype'])}."
    elif rounding:
        exact = f"Scales were rounded, by up to {rounding:.1e} relative; codes are the source's."
    tags = ["- bitwright", *([] if done["to"] == "dense" else [f"- {safe(done['to'])}"])]
    lines = [
        *("---", "library_name: transformers", "tags:", *tags, "---", ""),
        *(f"# {name}, converted", ""),
        f"Converted with bitwright {safe(provenance['bitwright'])} from layout {safe(done['from'])} to {safe(done['to'])}. {exact}",
        *("", "## Weights", "", "| modules | from | to |", "| ---: | --- | --- |"),
    ]
    kinds = Counter((module["from"], module["to"]) for module in done["modules"])
    lines += [f"| {count} | {safe(before)} | {safe(after)} |" for (before, after), count in kinds.items()]
    lines += ["", f"Weight files: {provenance['sizes']['weight_file_bytes']:,} bytes."]
    if engines:
        lines += ["", "## Loads in", "", "| engine | |", "| --- | --- |"]
        lines += [f"| {engine} | {'yes' if why is None else safe(why)} |" for engine, why in engines.items()]
    recipe = provenance["recipe"]
    if recipe:
        shown = ("method", "scheme", "bits", "group_size", "symmetric")
        lines += ["", "## How the codes were chosen", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {safe(recipe[key])} |" for key in shown if recipe.get(key) is not None]
    if provenance["notes"]:
        lines += ["", "## Notes", "", *(f"- {safe(note)}" for note in provenance["notes"])]
    lines += ["", "## Source", "", "| file | fingerprint |", "| --- | --- |"]
    lines += [f"| `{safe(file)}` | `{safe(mark)}` |" for file, mark in provenance["source"]["files"].items()]
    return "\n".join(lines) + "\n"
