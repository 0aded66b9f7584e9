"""Suggestions tried on the model itself: quantized into a temporary folder, measured, and ranked by what they lose."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.advise.knowledge import CANDIDATES
from bitwright.advise.recommend import Advice, Subject, Suggestion
from bitwright.engine.progress import Progress, Silent
from bitwright.errors import InputError

__all__ = ["try_suggestions"]


def try_suggestions(
    subject: Subject,
    advice: Advice,
    *,
    most: int = 3,
    text: Any = None,
    windows: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> Advice:
    """The advice with its first ``most`` recipes measured against the original and ranked by mean KL divergence; the others follow.

    text: as for ``bitwright.evaluate`` (default: samples of the model). samples: calibration sequences (default: the recipe's). One
    quantized version is on the disk at a time. InputError where the model is not at hand.
    """
    if subject.path is None:
        raise InputError("only a model at hand can be measured", mend="name a checkpoint folder, or drop --measure")
    progress = progress or Silent()
    measured: list[Suggestion] = []
    losses: dict[str, float] = {}
    for suggestion in advice.suggestions:
        if suggestion.name not in losses and len(losses) >= most:
            continue
        if suggestion.name not in losses:
            progress.note(f"trying {suggestion.name}")
            losses[suggestion.name] = _loss(subject.path, suggestion, text, windows, samples, subject.text, progress)
        measured.append(replace(suggestion, kl_here=losses[suggestion.name]))
    rest: Sequence[Suggestion] = [found for found in advice.suggestions if found.name not in losses]
    ranked = sorted(measured, key=lambda found: found.kl_here or 0.0)
    listed = ", ".join(f"{name} {loss:.3g}" for name, loss in sorted(losses.items(), key=lambda pair: pair[1]))
    line = f"ranked by the loss (KL) measured on this model: {listed}"
    return replace(advice, suggestions=(*ranked, *rest), path=(*advice.path, line) if losses else advice.path)


def _loss(
    model: Path,
    suggestion: Suggestion,
    text: Any,
    windows: int | None,
    samples: int | None,
    calibration_text: str | None,
    progress: Progress,
) -> float:
    from bitwright.api import evaluate, quantize, to_gguf

    candidate = CANDIDATES[suggestion.name]
    options: dict[str, Any] = {}
    if candidate.text and (samples is not None or calibration_text is not None):
        values = {"samples": samples, "text": calibration_text}
        options["calibration"] = {key: value for key, value in values.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="bitwright-recommend-") as scratch:
        out = Path(scratch) / ("out.gguf" if candidate.is_gguf else "out")
        make = to_gguf if candidate.is_gguf else quantize
        make(model, out, recipe=candidate.recipe(), progress=progress, **options)
        found = evaluate(out, against=model, text=text, windows=windows)
    assert found.quality.kl is not None
    return found.quality.kl.mean
