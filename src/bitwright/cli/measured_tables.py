"""What ``eval`` and ``compare`` print for people, from the document."""

from __future__ import annotations

from bitwright.cli.tables import print_facts, print_table, size
from bitwright.evaluation.record import Quality
from bitwright.report.document import Candidate, Document

__all__ = ["show_document"]


def show_document(document: Document) -> None:
    """Quality of every candidate beside the source's, then texts, tasks, layers and gates."""
    first = next((c.quality for c in document.candidates if c.quality is not None), None)
    rows = []
    if document.source is not None and first is not None and first.source is not None:
        source = document.source.size
        shown = (
            (size(source.weight_file_bytes), f"{source.bits_per_weight:.3f}")
            if source is not None and source.bits_per_weight
            else ("", "")
        )
        rows.append(("original", *shown, f"{first.source.perplexity:.4f}", *[""] * 7))
    rows += [_row(candidate) for candidate in document.candidates if candidate.quality is not None]
    timed = any(candidate.seconds is not None for candidate in document.candidates)
    if rows:
        headings = (
            "",
            "weights",
            "bits/weight",
            "perplexity",
            "increase",
            "KL mean",
            "KL 99 %",
            "KL max",
            "top-1",
            "top-5",
            "flips",
        )
        print_table((*headings, "time") if timed else headings, [row if timed else row[:11] for row in _padded(rows)])
    for candidate in document.candidates:
        _details(candidate, len(document.candidates) > 1)
    measured = document.measurement
    if measured is not None:
        kind = f"{measured.convention} windows of {measured.length} tokens"
        kind += "" if measured.stride is None else f" advancing by {measured.stride}"
        texts = ", ".join(f"{name} ({count} tokens)" for name, count in measured.texts.items())
        predictions = "" if first is None else f"{first.model.tokens} predictions, "
        print_facts([("measured on", f"{predictions}{measured.windows} {kind}: {texts}")])
    if first is not None:
        print_facts([("standard error", _errors(first))])
    for line in document.not_measured:
        print_facts([("not measured", line)])


def _padded(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [(*row, *[""] * (12 - len(row))) for row in rows]


def _row(candidate: Candidate) -> tuple[str, ...]:
    quality = candidate.quality
    assert quality is not None
    bits = candidate.size.quantized_bits_per_weight or candidate.size.bits_per_weight
    rise = quality.increase
    increase = "" if rise is None else f"{rise.perplexity:+.4f} ± {rise.perplexity_error:.4f}"
    kl = quality.kl
    return (
        candidate.name,
        size(candidate.size.weight_file_bytes),
        "" if bits is None else f"{bits:.3f}",
        f"{quality.model.perplexity:.4f}",
        increase,
        *(("", "", "") if kl is None else (f"{kl.mean:.6f}", f"{kl.p99:.5f}", f"{kl.max:.4f}")),
        "" if quality.top1 is None else f"{100 * quality.top1:.2f} %",
        "" if quality.top5 is None else f"{100 * quality.top5:.2f} %",
        "" if quality.flips is None else f"{100 * quality.flips.total:.2f} %",
        "" if candidate.seconds is None else f"{candidate.seconds:.1f} s",
    )


def _errors(quality: Quality) -> str:
    text = f"{quality.model.perplexity * quality.model.error:.4f} of the perplexity"
    return text if quality.kl is None else f"{text} itself, {quality.kl.error:.6f} of the mean KL"


def _details(candidate: Candidate, many: bool) -> None:
    title = f"{candidate.name}: " if many else ""
    if candidate.domains:
        print_table(
            (f"{title}text", "predictions", "perplexity, original", "quantized", "KL mean", "top-1"),
            [
                (
                    name,
                    str(quality.model.tokens),
                    "" if quality.source is None else f"{quality.source.perplexity:.4f}",
                    f"{quality.model.perplexity:.4f}",
                    "" if quality.kl is None else f"{quality.kl.mean:.6f}",
                    "" if quality.top1 is None else f"{100 * quality.top1:.2f} %",
                )
                for name, quality in candidate.domains.items()
            ],
        )
    if candidate.tasks:
        print_table(
            (f"{title}task", "metric", "score", "std. error", "original", "questions"),
            [
                (
                    score.task,
                    score.metric,
                    f"{score.value:.4f}",
                    "" if score.error is None else f"{score.error:.4f}",
                    "" if score.source_value is None else f"{score.source_value:.4f}",
                    str(score.samples),
                )
                for score in candidate.tasks
            ],
        )
    worst = sorted((layer for layer in candidate.layers if layer.relative > 0), key=lambda layer: -layer.relative)[:3]
    if worst and not many:
        listed = ", ".join(f"{layer.module} ({layer.relative:.2e}, {layer.snr_db:.1f} dB)" for layer in worst)
        print_facts([(f"{title}largest errors", listed)])
    if candidate.blocks and not many:
        last = candidate.blocks[-1]
        own = sum(block.own for block in candidate.blocks)
        print_facts([(f"{title}last block's output", f"error {last.total:.2e}; the blocks' own add up to {own:.2e}")])
    if candidate.gate is not None:
        for line in candidate.gate.lines if not many else [line for line in candidate.gate.lines if not line.passed]:
            print_facts([(f"{title}gate {'kept' if line.passed else 'MISSED'}", line.sentence)])
