"""The section of a model card that holds what was measured; entering it again replaces it."""

from __future__ import annotations

import re
from pathlib import Path

from bitwright.errors import InputError
from bitwright.evaluation.record import Quality
from bitwright.io.files import os_error, write_text
from bitwright.report.card import safe
from bitwright.report.document import Candidate, Document

__all__ = ["enter_figures", "figures_section"]

_BEGIN, _END = "<!-- bitwright: measured -->", "<!-- bitwright: end -->"


def figures_section(document: Document) -> str:
    """Markdown about the first candidate, between two marks."""
    candidate = document.candidates[0]
    lines = [_BEGIN, "## Measured", ""]
    measured = document.measurement
    if measured is not None:
        texts = ", ".join(f"{safe(name)} ({count:,} tokens)" for name, count in measured.texts.items())
        windows = f"{measured.windows} windows of {measured.length} tokens"
        windows += "" if measured.stride is None else f" that advance by {measured.stride}"
        against = "" if document.source is None else f", against `{safe(document.source.name)}`"
        lines += [
            f"On {texts}; {windows}, {safe(measured.convention)}, {safe(measured.dtype)} activations{against}.",
            "",
        ]
    if candidate.quality is not None:
        lines += _quality(candidate.quality)
    lines += _domains(candidate)
    if candidate.tasks:
        lines += ["", "| task | metric | score | original |", "| --- | --- | ---: | ---: |"]
        for score in candidate.tasks:
            error = "" if score.error is None else f" ± {score.error:.4f}"
            before = "" if score.source_value is None else f"{score.source_value:.4f}"
            lines.append(f"| {safe(score.task)} | {safe(score.metric)} | {score.value:.4f}{error} | {before} |")
    if candidate.gate is not None:
        lines += ["", *(f"- {'kept' if line.passed else 'missed'}: {line.sentence}" for line in candidate.gate.lines)]
    return "\n".join([*lines, "", f"Measured with bitwright {safe(document.bitwright)}.", _END]) + "\n"


def _quality(quality: Quality) -> list[str]:
    lines = ["| | original | quantized |", "| --- | ---: | ---: |"]
    before = (
        ""
        if quality.source is None
        else f"{quality.source.perplexity:.4f} ± {quality.source.perplexity * quality.source.error:.4f}"
    )
    after = f"{quality.model.perplexity:.4f} ± {quality.model.perplexity * quality.model.error:.4f}"
    lines.append(f"| perplexity | {before} | {after} |")
    if quality.increase is not None:
        lines.append(
            f"| its increase | | {quality.increase.perplexity:+.4f} ± {quality.increase.perplexity_error:.4f} |"
        )
    if quality.kl is not None:
        kl = quality.kl
        lines.append(f"| mean KL divergence, nats | 0 | {kl.mean:.6f} ± {kl.error:.6f} |")
        lines.append(
            f"| median, 99 %, 99.9 %, largest | | {kl.median:.6f}, {kl.p99:.5f}, {kl.p999:.5f}, {kl.max:.4f} |"
        )
    if quality.top1 is not None and quality.top5 is not None:
        lines.append(
            f"| same most likely token, same top five | | {100 * quality.top1:.2f} %, {100 * quality.top5:.2f} % |"
        )
    if quality.flips is not None:
        shares = f"{100 * quality.flips.right_to_wrong:.2f} %, {100 * quality.flips.wrong_to_right:.2f} %"
        lines.append(f"| flips: right to wrong, wrong to right | | {shares} |")
    return lines


def _domains(candidate: Candidate) -> list[str]:
    if not candidate.domains:
        return []
    lines = ["", "| text | perplexity, original | quantized | mean KL |", "| --- | ---: | ---: | ---: |"]
    for name, quality in candidate.domains.items():
        before = "" if quality.source is None else f"{quality.source.perplexity:.4f}"
        kl = "" if quality.kl is None else f"{quality.kl.mean:.6f}"
        lines.append(f"| {safe(name)} | {before} | {quality.model.perplexity:.4f} | {kl} |")
    return lines


def enter_figures(card: Path, document: Document) -> None:
    """Put the section into a model card, in the place of an older one, else after "Quality", else at the end."""
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else f"# {safe(document.candidates[0].name)}\n"
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            raise os_error(error, str(card)) from error
        raise InputError(f"{card}: not UTF-8 text", mend="rename the file") from error
    section = figures_section(document)
    begin, end = text.find(_BEGIN), text.find(_END)
    if 0 <= begin < end:
        text = text[:begin] + section + text[end + len(_END) :].lstrip("\n")
    else:
        match = re.search(r"^## Loads in$", text, re.MULTILINE)
        at = match.start() if match else len(text)
        text = text[:at].rstrip("\n") + "\n\n" + section + ("\n" + text[at:] if match else "")
    write_text(card, text)
