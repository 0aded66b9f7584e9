"""Outliers among what every linear of a model reads: ``watch`` walks through the blocks, ``evaluation.outliers`` has the figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bitwright.engine.progress import Progress, Silent
from bitwright.engine.watch import watching
from bitwright.errors import InputError
from bitwright.evaluation.outliers import InputProbe, LayerInput, OutlierReport, summarize
from bitwright.model.structure import LinearUnit

__all__ = ["analyze_folder", "label_of"]


def analyze_folder(
    model: Path,
    *,
    text: str | Path | None = None,
    samples: int = 32,
    length: int = 512,
    threshold: float = 6.0,
    top: int = 5,
    seed: int = 0,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> OutlierReport:
    """Activation outliers of the checkpoint folder ``model``; see ``evaluation.outliers`` for the figures.

    text: a file as for calibration; None: the model's own samples. samples sequences of ``length`` tokens are read. threshold:
    magnitude above which a value counts as an outlier. top: worst channels listed per input. max_memory_bytes: a third of it may
    hold hidden states.
    Raises InputError for models whose blocks transformers cannot run, NumericError where activations are not finite.
    """
    if top < 0:
        raise InputError(f"top {top} is negative", mend="use 5")
    InputProbe(1, threshold)  # refuses a wrong threshold before anything is read
    progress = progress or Silent()
    found: list[LayerInput] = []
    with watching(
        model, lambda columns: InputProbe(columns, threshold), text=text, samples=samples, length=length, seed=seed,
        max_memory_bytes=max_memory_bytes, progress=progress,
    ) as watch:  # fmt: skip
        for index, watched in watch.run():
            for seen in watched:
                label, layers = label_of(seen.units, index), [unit.name for unit in seen.units]
                found.append(summarize(seen.probe, block=index, label=label, layers=layers, top=top))
    if not found:
        raise InputError("the blocks hold no linear layers", mend="analyze a decoder model")
    return OutlierReport(model.name, Path(watch.tokens.origin).name, watch.tokens.count, threshold, tuple(found))


def label_of(units: Sequence[LinearUnit], block: int) -> str:
    """The linears' names inside their block, those of experts with ``*`` for the number, the first one's parent said once."""
    inside = [unit.name.partition(f".{block}.")[2] or unit.name for unit in units]
    names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in inside))
    parent = names[0].rpartition(".")[0]
    return ", ".join([names[0], *(name.removeprefix(parent + ".") for name in names[1:])])
