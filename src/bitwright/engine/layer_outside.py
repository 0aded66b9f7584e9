"""Errors of a quantized embedding and output head, which belong to no block.

An embedding reads one-hot inputs: its output error is that of the rows of the tokens that were read, and its channels are the vocabulary.
The head reads what the source's last block leaves behind, after the final norm. A head that is tied to the embeddings counts as a layer
of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from bitwright.engine.layer_sides import Side
from bitwright.evaluation.layer_error import OutputError, energy, ratio, snr_db, top_share
from bitwright.evaluation.record import LayerError
from bitwright.model.structure import LinearUnit

__all__ = ["outside_errors"]

#: Rows of the head that are multiplied at a time.
_ROWS = 8192


def outside_errors(
    source: Side,
    model: Side,
    units: Sequence[LinearUnit],
    batches: Sequence[torch.Tensor],
    last: Iterable[torch.Tensor],
) -> list[LayerError]:
    """Records of quantized embeddings and of a quantized head. last: the source's hidden states after the last block."""
    found = []
    for unit in units:
        stored = model.stored.get(unit.place) if unit.place is not None else None
        if unit.role == "embedding" and stored is not None and stored.quantized:
            found.append(_embedding(source, model, unit, stored.scheme, batches))
    head = source.skeleton.model.get_output_embeddings()
    path = next((name for name, module in source.skeleton.model.named_modules() if module is head), None)
    origin = model.origin(f"{path}.weight") if path is not None else None
    kinds = [stored for place, stored in model.stored.items() if place.parameter == origin]
    if path is not None and kinds and kinds[0].quantized:
        found.append(_head(source, model, path, kinds[0].scheme, last))
    return found


def _pair(source: Side, model: Side, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs = source.parameter(name), model.parameter(name)
    assert ours is not None
    assert theirs is not None
    return ours, theirs


def _embedding(source: Side, model: Side, unit: LinearUnit, scheme: str, batches: Sequence[torch.Tensor]) -> LayerError:
    assert unit.place is not None
    weight, difference = _pair(source, model, unit.place.parameter)
    difference = difference - weight
    counts = torch.zeros(len(weight), dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.flatten(), minlength=len(weight))
    parts, signal = (
        counts * torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square() for rows in (difference, weight)
    )
    relative = ratio(float(parts.sum()), float(signal.sum()))
    return LayerError(
        unit.name, None, "embedding", scheme, relative, snr_db(relative), ratio(energy(difference), energy(weight)),
        top_share(parts),
    )  # fmt: skip


class _HeadReachedError(Exception):
    """The head's input is known; its product need not be computed."""


def _head(source: Side, model: Side, path: str, scheme: str, last: Iterable[torch.Tensor]) -> LayerError:
    inputs: list[torch.Tensor] = []

    def note(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].reshape(-1, args[0].shape[-1]))
        raise _HeadReachedError

    with source.runner.head() as logits:
        hook = source.skeleton.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            for hidden in last:
                try:
                    logits(hidden)
                except _HeadReachedError:
                    continue
        finally:
            hook.remove()
    weight, difference = _pair(source, model, f"{path}.weight")
    difference = difference - weight
    sums = [OutputError(weight.shape[1]) for _ in range(0, len(weight), _ROWS)]
    for x in inputs:
        for one, rows, changed in zip(sums, torch.split(weight, _ROWS), torch.split(difference, _ROWS), strict=True):
            one.update(x, rows, changed)
    relative = ratio(sum(one.error for one in sums), sum(one.signal for one in sums))
    return LayerError(
        path, None, "head", scheme, relative, snr_db(relative), ratio(energy(difference), energy(weight)),
        sums[0].top_channels(difference),
    )  # fmt: skip
