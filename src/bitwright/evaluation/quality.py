"""Quality of a model on windows of text: perplexity, and the divergence from its source, in batches of any size."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from bitwright.errors import InputError, NumericError
from bitwright.evaluation.divergence import Model, Predictions, Values, compare_predictions, predictions
from bitwright.evaluation.record import DeltaP, Divergence, Flips, Increase, Perplexity, Quality
from bitwright.evaluation.windows import Window

__all__ = ["LiveReference", "Reference", "measure", "quality", "run_windows", "summarize"]


class Reference(Protocol):
    """What the source predicts, window by window."""

    def read(self, index: int) -> Predictions:
        """Predictions on window ``index``."""


class LiveReference:
    """The source model itself, run on the windows as they are asked for."""

    def __init__(self, model: Model, windows: Sequence[Window]) -> None:
        self._model, self._windows = model, windows

    def read(self, index: int) -> Predictions:
        """Predictions on window ``index``."""
        window = self._windows[index]
        return predictions(self._model(window.tokens)[0], window)


def run_windows(model: Model, windows: Sequence[Window], *, batch_size: int = 1) -> Iterator[Predictions]:
    """Predictions on every window, in order. Neighbours of equal length share a run, so that no token is ever padding."""
    if batch_size < 1:
        raise InputError(f"a batch of {batch_size} windows measures nothing", mend="use at least 1")
    start = 0
    while start < len(windows):
        length = windows[start].tokens.shape[1]
        stop = start + 1
        while stop < min(start + batch_size, len(windows)) and windows[stop].tokens.shape[1] == length:
            stop += 1
        logits = model(torch.cat([window.tokens for window in windows[start:stop]]))
        for row, window in zip(logits, windows[start:stop], strict=True):
            yield predictions(row, window)
        start = stop


def measure(
    model: Model, windows: Sequence[Window], reference: Reference | None = None, *, batch_size: int = 1
) -> list[Values]:
    """Figures of every window, in order; ``summarize`` joins those that belong together."""
    if not windows:
        raise InputError("there is no window to evaluate", mend="give a longer text")
    return [
        compare_predictions(found, None if reference is None else reference.read(index))
        for index, found in enumerate(run_windows(model, windows, batch_size=batch_size))
    ]


def quality(model: Model, windows: Sequence[Window], source: Model | None = None, *, batch_size: int = 1) -> Quality:
    """A model against its source, both at hand, on windows of one text."""
    reference = None if source is None else LiveReference(source, windows)
    return summarize(measure(model, windows, reference, batch_size=batch_size))


def summarize(values: Iterable[Values]) -> Quality:
    """One record of many windows: every prediction weighs the same, whatever window it is in."""
    parts = list(values)
    nll = _join(part.nll for part in parts)
    model = _perplexity(nll)
    if not len(parts[0].kl):
        return Quality(model)
    source_nll = _join(part.source_nll for part in parts)
    source = _perplexity(source_nll)
    rise, rise_error = _mean(nll - source_nll)
    change = torch.exp(-nll) - torch.exp(-source_nll)
    mean, error = _mean(change)
    low, tenth, middle, ninth, high = _percentiles(change, (0.01, 0.1, 0.5, 0.9, 0.99))
    return Quality(
        model=model,
        source=source,
        kl=_divergence(_join(part.kl for part in parts)),
        top1=float(_join(part.same for part in parts).mean()),
        top5=float(_join(part.shared for part in parts).mean()),
        delta_p=DeltaP(mean, error, float(change.square().mean().sqrt()), low, tenth, middle, ninth, high),
        flips=Flips(float(_join(p.lost for p in parts).mean()), float(_join(p.gained for p in parts).mean())),
        increase=Increase(
            rise, rise_error, model.perplexity - source.perplexity, source.perplexity * math.exp(rise) * rise_error
        ),
    )


def _join(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.cpu() for part in parts]).double()


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), error


def _perplexity(nll: torch.Tensor) -> Perplexity:
    mean, error = _mean(nll)
    if mean > math.log(sys.float_info.max):
        raise NumericError(f"the mean negative log-likelihood is {mean:.4g} nats", mend="check the checkpoint")
    return Perplexity(math.exp(mean), mean, error, len(nll))


def _divergence(kl: torch.Tensor) -> Divergence:
    mean, error = _mean(kl)
    median, p90, p99, p999 = _percentiles(kl, (0.5, 0.9, 0.99, 0.999))
    return Divergence(mean, error, median, p90, p99, p999, float(kl.max()), len(kl))


def _percentiles(values: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """Interpolated between neighbours, as numpy's default; torch's own refuses more than 2^24 values."""
    ordered = values.sort().values
    found = []
    for share in shares:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        found.append(float(ordered[low] + (place - low) * (ordered[high] - ordered[low])))
    return found
