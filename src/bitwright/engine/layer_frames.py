"""Channels that were scaled before a model was quantized (AWQ, SmoothQuant), found again, so that its weights can be compared.

Such a transform divides a producer's channels (a norm's vector, the rows of a linear) by factors f and multiplies the columns of its
consumers. The block computes what it computed before, but its weights are others: ``W' = diag(r) W diag(c)`` before rounding, with c the
factors of the linear's inputs and r one over the factors of its outputs. The error that rounding has made is that of ``W'_ij / (r_i c_j)``.

A norm is stored in 16 bits, so its factors are known exactly: the source's vector over the model's. Those of a linear producer are the
least-squares fit over the consumers' columns of a channel, ``f = <W', W> / <W, W>``, taken where it explains the difference: a column of n
weights loses 1/n of its error to the fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bitwright.core.transform import Consumer, Edge
from bitwright.model.edges import find_edges
from bitwright.model.observe import Slot

__all__ = ["Frame", "changed_outside", "find_frames"]

#: Relative difference of a kept vector that no rounding to 16 bits explains.
_CHANGED = 0.01
#: A fit is a fold where it leaves less than this of the difference; the fit of mere rounding errors leaves nearly all.
_EXPLAINED = 0.8


@dataclass
class Frame:
    """Factors of one matrix in Linear orientation. rows: ``(out,)``; columns: ``(in,)``; float32, None: all one."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def back(self, weight: torch.Tensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The model's weight ``(out, in)`` without the factors; rows: which of the matrix these are."""
        if self.columns is not None:
            weight = weight / self.columns
        if self.rows is not None:
            weight = weight / (self.rows if rows is None else self.rows[rows[0] : rows[1]]).unsqueeze(1)
        return weight


def changed_outside(source: nn.Module, model: nn.Module, matrices: set[str]) -> bool:
    """Whether vectors of a block other than the parameters ``matrices`` differ by more than rounding."""
    theirs = dict(model.named_parameters())
    return any(
        float((value - theirs[name]).abs().max()) > _CHANGED * float(value.abs().max())
        for name, value in source.named_parameters()
        if name not in matrices and value.dim() == 1
    )


def find_frames(
    source: nn.Module, model: nn.Module, run: Callable[[], torch.Tensor], residual: torch.Tensor
) -> dict[Slot, Frame]:
    """Factors of every matrix that has some. run: the source's block on a sample of one sequence; residual: what enters it."""
    edges, _ = find_edges(source, run, residual=residual)
    found: dict[Slot, Frame] = {}
    for edge in edges:
        factors = _of_norm(edge, source, model) if edge.producer.norm else _fitted(edge, source, model)
        if factors is None or bool((factors == 1).all()):
            continue
        for consumer in edge.consumers:
            frame = found.setdefault((consumer.weight, consumer.expert), Frame())
            columns = _expand(consumer, factors)
            frame.columns = columns if frame.columns is None else frame.columns * columns
        if not edge.producer.norm:
            producer = edge.producer
            matrix = _matrix(source, producer.weight, producer.expert, producer.transposed)
            frame = found.setdefault((producer.weight, producer.expert), Frame())
            rows = torch.ones(len(matrix)) if frame.rows is None else frame.rows
            rows[producer.rows] /= factors
            frame.rows = rows
    return found


def _of_norm(edge: Edge, source: nn.Module, model: nn.Module) -> torch.Tensor:
    """The source's vector over the model's; 1 where either is zero."""
    name, rows, offset = edge.producer.weight, edge.producer.rows, edge.producer.offset
    old, new = (block.get_parameter(name)[rows].double() + offset for block in (source, model))
    return _usable(old, new)


def _fitted(edge: Edge, source: nn.Module, model: nn.Module) -> torch.Tensor | None:
    """The least-squares fit over all columns of each channel; None where it explains too little of the difference."""
    product = torch.zeros(edge.channels, dtype=torch.float64)
    square, before = product.clone(), 0.0
    pairs = []
    for consumer in edge.consumers:
        old, new = (_matrix(block, consumer.weight, consumer.expert, consumer.transposed) for block in (source, model))
        used = consumer.channel >= 0
        product.index_add_(0, consumer.channel[used], (old * new).sum(0, dtype=torch.float64)[used])
        square.index_add_(0, consumer.channel[used], old.square().sum(0, dtype=torch.float64)[used])
        before += float((new - old).double().square().sum())
        pairs.append((consumer, old, new))
    factors = _usable(product, square)
    after = sum(float((new - old * _expand(c, factors)).double().square().sum()) for c, old, new in pairs)
    return factors if after < _EXPLAINED * before else None


def _usable(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    good = (above * below > 0) & torch.isfinite(above) & torch.isfinite(below)
    return torch.where(good, above / torch.where(good, below, torch.ones_like(below)), 1.0).float()


def _expand(consumer: Consumer, factors: torch.Tensor) -> torch.Tensor:
    return torch.where(consumer.channel >= 0, factors[consumer.channel.clamp_min(0)], 1.0)


def _matrix(block: nn.Module, name: str, expert: int | None, transposed: bool) -> torch.Tensor:
    value: torch.Tensor = block.get_parameter(name)
    value = value if expert is None else value[expert]
    return value.T if transposed else value
