"""The model card: README.md of the output folder."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bitwright.io.text import printable

__all__ = ["model_card", "safe"]


def safe(text: object) -> str:
    """Escaped for Markdown tables, code spans, links and HTML: names come from strangers."""
    escaped = escape(printable(str(text))).replace("|", "\\|")
    for mark in "`[]":
        escaped = escaped.replace(mark, f"&#{ord(mark)};")
    return escaped


def model_card(provenance: Mapping[str, Any], engines: Mapping[str, str | None]) -> str:
    """Markdown from the content of ``bitwright.json``. Depends on nothing else, not on the clock."""
    recipe = provenance["recipe"]
    sizes = provenance["sizes"]
    name = safe(provenance["source"]["name"])
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- bitwright",
        f"- {recipe['layout']}",
        f"- {recipe['bits']}-bit",
        "---",
        "",
        f"# {name}, quantized",
        "",
        f"Made with bitwright {safe(provenance['bitwright'])} from `{name}`: {safe(recipe['method'])}, "
        f"{recipe['bits']} bits, group size {safe(recipe['group_size'])}, layout {safe(recipe['layout'])}.",
        "",
        "## Size",
        "",
        "| | |",
        "| --- | --- |",
        f"| weight files | {sizes['weight_file_bytes']:,} bytes |",
        f"| bits per parameter, whole model | {sizes['bits_per_weight']:.3f} |",
        f"| bits per weight, quantized layers | {sizes['quantized_bits_per_weight']:.3f} |",
        "",
        "## Quality",
        "",
    ]
    quality = provenance["quality"]
    if quality:
        lines += [
            f"Measured on {int(quality['tokens'])} tokens of the calibration text while quantizing; run `bitwright eval` on text "
            "of your own for figures on unseen text.",
            "",
            "| | original | quantized |",
            "| --- | --- | --- |",
            f"| perplexity | {quality['perplexity_source']:.4f} | {quality['perplexity_quantized']:.4f} |",
            f"| mean KL divergence | 0 | {quality['kl_mean']:.6f} |",
        ]
    else:
        lines += ["Not measured: this recipe uses no data. Run `bitwright eval OUT --against MODEL --text FILE`."]
    lines += ["", "## Loads in", "", "| engine | |", "| --- | --- |"]
    lines += [f"| {engine} | {'yes' if why is None else safe(why)} |" for engine, why in engines.items()]
    if provenance["fallbacks"]:
        lines += ["", "## Fallbacks", "", "| tensor | what happened |", "| --- | --- |"]
        lines += [f"| `{safe(line['tensor'])}` | {safe(line['fallback'])} |" for line in provenance["fallbacks"]]
    if provenance["notes"]:
        lines += ["", "## Notes", ""]
        lines += [f"- {safe(note)}" for note in provenance["notes"]]
    lines += ["", "## Recipe", "", "```yaml"]
    lines += [f"{key}: {_plain(value)}" for key, value in recipe.items()]
    lines += ["```", "", "## Source", "", "| file | fingerprint |", "| --- | --- |"]
    lines += [f"| `{safe(file)}` | `{safe(mark)}` |" for file, mark in provenance["source"]["files"].items()]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    import json

    # An escape that YAML and JSON share: some viewers look for HTML inside code too.
    return printable(json.dumps(value, ensure_ascii=False)).replace("<", "\\u003c")
