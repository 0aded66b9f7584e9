"""The Transform contract: function-preserving rewrites that come before the method.

A block-scope transform chooses one positive factor per channel of an *edge*: a producer (a norm, or a linear layer) whose output channels
reach the columns of its consumers linearly. The producer is divided by the factors and the consumers' columns are multiplied, so that the
block computes what it computed before. Model-scope transforms rewrite the whole checkpoint lazily, tensor by tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bitwright.core.rotation import Rotation
from bitwright.core.scheme import Scheme
from bitwright.core.stats import Statistic

__all__ = ["BlockTransform", "Consumer", "ConsumerView", "Edge", "EdgeView", "ModelTransform", "Producer", "Transform"]


def _as_it_is(factors: torch.Tensor) -> torch.Tensor:
    return factors


@dataclass(frozen=True, eq=False)
class Producer:
    """What an edge divides. Names are of parameters, relative to the block.

    weight: a norm's vector or a linear's matrix; bias: its bias or None. rows: ``(channels,)`` int64, the row of the matrix (in Linear
    orientation; the element of the vector) that makes each channel. expert: index into a 3-D parameter, or None. offset: a norm
    multiplies by ``weight + offset`` (1 in Gemma). transposed: the matrix is stored ``(in, out)``.
    """

    weight: str
    rows: torch.Tensor
    bias: str | None = None
    expert: int | None = None
    offset: float = 0.0
    norm: bool = False
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Consumer:
    """A matrix whose columns an edge multiplies. channel: ``(columns,)`` int64, the channel that reaches each column, -1 for none."""

    weight: str
    channel: torch.Tensor
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Edge:
    """A producer and everything that its channels reach. name: for messages, ``input_layernorm -> q_proj, k_proj, v_proj``."""

    name: str
    producer: Producer
    consumers: tuple[Consumer, ...]

    @property
    def channels(self) -> int:
        """How many channels the edge has."""
        return len(self.producer.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConsumerView:
    """A consumer as a transform sees it.

    weight: ``(out, in)`` float32; channel: as in ``Consumer``; stats: of its input, by name (those that the transform needs, and "gram"),
    with a count of 0 where no token reached it and empty where it stays as it is; scheme: what it will be quantized to, or None.
    feedback: by a method that feeds errors back (``Method.feeds_back``). searched: ranges are searched, not taken from the extremes.
    """

    name: str
    weight: torch.Tensor
    channel: torch.Tensor
    stats: Mapping[str, Statistic]
    scheme: Scheme | None
    feedback: bool = False
    searched: bool = True

    def per_channel(self, values: torch.Tensor, channels: int, reduce: Literal["amax", "mean"]) -> torch.Tensor:
        """``(columns,)`` values brought to the edge's channels: ``(channels,)``; several columns of a channel are reduced."""
        used = self.channel >= 0
        out = torch.zeros(channels, dtype=values.dtype)
        return out.scatter_reduce(0, self.channel[used], values[used], reduce, include_self=False)

    def expand(self, factors: torch.Tensor) -> torch.Tensor:
        """``(channels,)`` factors brought to the columns: ``(in,)``, one where no channel reaches."""
        found = factors[self.channel.clamp_min(0)]
        return torch.where(self.channel >= 0, found, torch.ones_like(found))


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeView:
    """An edge as a transform sees it.

    producer: ``(channels,)`` float32 for a norm (what it multiplies by), ``(channels, in)`` for a linear. storable: factors
    ``(channels,)`` as they can be stored: a producer that stays in 16 bits is rounded, and the factors with it. probe: the mean squared
    error of the block's true output if the consumers were these weights, by name; None where that would take too long. attention: the
    consumers' outputs go through a softmax, so that their own error says little about the block's.
    """

    name: str
    channels: int
    producer: torch.Tensor
    norm: bool
    consumers: tuple[ConsumerView, ...]
    storable: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    probe: Callable[[Mapping[str, torch.Tensor]], float] | None = None
    attention: bool = False


class Transform(ABC):
    """Base of every transform; a transform is a frozen dataclass of options."""

    name: ClassVar[str]
    scope: ClassVar[Literal["block", "model"]]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics of the consumers' inputs that it wants ("gram", or one of ``core.stats.SIMPLE``)."""
        return frozenset()


class BlockTransform(Transform):
    """A transform that rescales the channels of edges inside a block."""

    scope: ClassVar[Literal["block", "model"]] = "block"

    @abstractmethod
    def factors(self, edge: EdgeView) -> torch.Tensor | None:
        """``(channels,)`` positive float32: consumers' columns are multiplied, the producer is divided; None leaves the edge alone."""


class ModelTransform(Transform):
    """A transform that gives the residual stream another orthonormal basis; the engine finds who writes and reads the stream.

    rng: seeded by the recipe, the same in every call for the same purpose; everything random comes from it.
    """

    scope: ClassVar[Literal["block", "model"]] = "model"

    @abstractmethod
    def stream_rotation(self, width: int, *, rng: torch.Generator, keep_ones: bool) -> Rotation:
        """The rotation of the residual stream; keep_ones: it must keep the ones vector, for models with LayerNorm."""

    def head_rotation(self, head_dim: int, *, rng: torch.Generator) -> Rotation | None:
        """The rotation of every attention head's values, undone in the output projection; None leaves them."""
        return None
