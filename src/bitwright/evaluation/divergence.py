"""What a model predicts at every position of a window, and how far that is from a source: the arithmetic, all in float32 log-softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bitwright.errors import InputError, NumericError
from bitwright.evaluation.windows import Window

__all__ = ["Model", "Predictions", "Values", "compare_logits", "compare_predictions", "predictions"]

#: ``(batch, tokens)`` int64 -> logits ``(batch, tokens, vocabulary)``
Model = Callable[[torch.Tensor], torch.Tensor]

_TOP = 5


@dataclass(frozen=True)
class Predictions:
    """What one model says about one window.

    log_probs: ``(positions, vocabulary)`` float32, of the positions that count; top: ``(positions, 5)`` int64, their most likely tokens in
    order. nll: ``(predictions,)`` float32, negative log-likelihood of the tokens whose prediction counts; right: ``(predictions,)`` bool,
    where that token was the most likely one.
    """

    log_probs: torch.Tensor
    top: torch.Tensor
    nll: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Values:
    """One window's figures, position by position, before they are summarized; see ``evaluation.record`` for their meaning.

    kl, same, shared: ``(positions,)``, with ``shared`` between 0 and 1; the others: ``(predictions,)``. Without a source all but nll
    are empty.
    """

    nll: torch.Tensor
    source_nll: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor
    shared: torch.Tensor
    lost: torch.Tensor
    gained: torch.Tensor


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise NumericError("the model's logits are not finite", mend="evaluate in float32, or check the checkpoint")
    return torch.log_softmax(logits.float(), dim=-1)


def predictions(logits: torch.Tensor, window: Window) -> Predictions:
    """From logits ``(tokens, vocabulary)`` of one window. NumericError where they are not finite."""
    log_probs = _log_probabilities(logits)
    targets = window.tokens[0, window.first :].to(log_probs.device)
    predicting = log_probs[window.first - 1 : -1]
    counted = log_probs[window.positions]
    return Predictions(
        log_probs=counted,
        top=counted.topk(min(_TOP, counted.shape[-1]), dim=-1).indices,
        nll=-predicting.gather(1, targets[:, None])[:, 0],
        right=predicting.argmax(-1) == targets,
    )


def compare_predictions(found: Predictions, source: Predictions | None) -> Values:
    """A model's predictions, against its source's where there are any."""
    none = torch.empty(0)
    if source is None:
        return Values(found.nll, none, none, none, none, none, none)
    if source.log_probs.shape != found.log_probs.shape:
        raise InputError(
            f"the vocabularies differ: {source.log_probs.shape[-1]} and {found.log_probs.shape[-1]}",
            mend="compare a model with the one it was made from",
        )
    shared = (source.top[:, :, None] == found.top[:, None, :]).any(-1).float().mean(-1)
    return Values(
        nll=found.nll,
        source_nll=source.nll,
        kl=_kl(source.log_probs, found.log_probs),
        same=source.top[:, 0] == found.top[:, 0],
        shared=shared,
        lost=source.right & ~found.right,
        gained=found.right & ~source.right,
    )


def _kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) for every position: ``(positions,)``; both are log-probabilities.

    Float32 rounds the normalisers: a position is right to about 1e-6 nats (128,000 entries), the mean of many to 1e-7, and equal
    distributions may come out slightly below zero. Float64 costs ten times as much.
    """
    return (reference.exp() * (reference - other)).sum(-1)


def compare_logits(reference: torch.Tensor, other: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Means over one window of what is compared, and the entropy of the reference's own predictions, in nats.

    The mean entropy is the negative log-likelihood that text sampled from the reference itself would have.
    """
    window = Window(tokens)
    a, b = predictions(reference[0], window), predictions(other[0], window)
    return {
        "nll_reference": float(a.nll.mean()),
        "nll": float(b.nll.mean()),
        "kl": float(_kl(a.log_probs, b.log_probs).mean()),
        "entropy_reference": float(-(a.log_probs.exp() * a.log_probs).sum(-1).mean()),
    }
