"""Perplexity and KL divergence from logits, all in float32 log-softmax."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitwright.errors import InputError, NumericError
from bitwright.evaluation.windows import Window

__all__ = ["Comparison", "Perplexity", "compare", "compare_logits", "perplexity"]

#: ``(batch, tokens)`` int64 -> logits ``(batch, tokens, vocabulary)``
Model = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over ``tokens`` predictions; error: standard error of the mean nll."""

    perplexity: float
    nll: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """A model against its source on the same windows. kl_*: KL(source || model) in nats per token; top1: share of equal argmax."""

    source: Perplexity
    model: Perplexity
    kl_mean: float
    kl_median: float
    kl_99: float
    kl_max: float
    top1: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise NumericError("the model's logits are not finite", mend="evaluate in float32, or check the checkpoint")
    return torch.log_softmax(logits.float(), dim=-1)


def _nll(log_probabilities: torch.Tensor, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Negative log-likelihood of tokens ``first ..`` of one window: ``(counted,)``."""
    predicted = log_probabilities[0, first - 1 : -1]
    return -predicted.gather(1, tokens[0, first:, None])[:, 0]


def _summary(parts: list[torch.Tensor]) -> Perplexity:
    values = torch.cat(parts).double()
    mean = float(values.mean())
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    if mean > math.log(sys.float_info.max):
        raise NumericError(f"the mean negative log-likelihood is {mean:.4g} nats", mend="check the checkpoint")
    return Perplexity(math.exp(mean), mean, error, len(values))


def perplexity(model: Model, windows: Iterable[Window]) -> Perplexity:
    """Token-weighted perplexity over windows."""
    parts = [_nll(_log_probabilities(model(w.tokens)), w.tokens, w.first) for w in windows]
    if not parts:
        raise InputError("there is no window to evaluate", mend="give a longer text")
    return _summary(parts)


def _kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) for every position: ``(positions,)``; both are log-probabilities.

    Float32 rounds the normalisers: a position is right to about 1e-6 nats (128,000 entries), the mean of many to 1e-7, and equal
    distributions may come out slightly below zero. Float64 costs ten times as much.
    """
    return (reference.exp() * (reference - other)).sum(-1)


def compare(source: Model, model: Model, windows: Iterable[Window]) -> Comparison:
    """Both models on the same windows. KL and top-1 agreement count every position that is new to its window."""
    source_nll, model_nll, divergences = [], [], []
    same = total = 0
    for window in windows:
        reference = _log_probabilities(source(window.tokens))
        other = _log_probabilities(model(window.tokens))
        if reference.shape != other.shape:
            raise InputError(
                f"the vocabularies differ: {reference.shape[-1]} and {other.shape[-1]}",
                mend="compare a model with the one it was made from",
            )
        source_nll.append(_nll(reference, window.tokens, window.first))
        model_nll.append(_nll(other, window.tokens, window.first))
        reference, other = reference[0, window.new :], other[0, window.new :]
        divergences.append(_kl(reference, other))
        same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        total += len(divergences[-1])
    if not divergences:
        raise InputError("there is no window to evaluate", mend="give a longer text")
    kl = torch.cat(divergences).double()
    return Comparison(
        source=_summary(source_nll),
        model=_summary(model_nll),
        kl_mean=float(kl.mean()),
        kl_median=float(kl.median()),
        kl_99=float(kl.quantile(0.99)) if len(kl) <= 1 << 24 else float(kl.sort().values[int(0.99 * len(kl))]),
        kl_max=float(kl.max()),
        top1=same / total,
        tokens=total,
    )


def compare_logits(reference: torch.Tensor, other: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Means over one window of what ``compare`` measures, and the entropy of the reference's own predictions, in nats.

    The mean entropy is the negative log-likelihood that text sampled from the reference itself would have.
    """
    a, b = _log_probabilities(reference), _log_probabilities(other)
    return {
        "nll_reference": float(_nll(a, tokens, 1).mean()),
        "nll": float(_nll(b, tokens, 1).mean()),
        "kl": float(_kl(a[0], b[0]).mean()),
        "entropy_reference": float(-(a[0].exp() * a[0]).sum(-1).mean()),
    }
