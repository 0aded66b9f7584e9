r"""SmoothQuant: outliers of a layer's inputs move into its weights, so that both can be 8-bit (arXiv:2211.10438).

Column j of the consumers is multiplied by s_j and the producer's channel j divided (equation 4 of the paper):

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

with the largest input of calibration tokens, and the largest weight of column j in all consumers. alpha 0 equalises the weights' columns,
1 the inputs'; the paper takes 0.5.

``alpha: search`` takes, edge by edge, the alpha with the smallest expected error of the consumers' outputs. With the scaled weight W S, its
rounded Q = W S + dW S, the scaled input z = x / s and its rounding error e, an output is wrong by

    Q (z + e) - W x = dW x + Q e

Rounding errors are taken as independent of the input and of each other, with variance v_j in column j. Over T tokens with the Gram
matrix H = sum x x^T the expected squared error is then

    tr(dW H dW^T) + T sum_j v_j |Q_j|^2                                    Q_j: column j of Q

Integers with the step d (a scale; per tensor (max - min) / 255 or max / 127 of z, over the columns that share it): v_j = d^2 / 12, but no
more than the mean of z_j^2, which is the error of a column that rounds to zero. Floats with m bits of mantissa: the relative error of a
number whose mantissa is spread like 1 / mantissa has the mean square 2^(-2 m) / 12 * 3 / (8 ln 2); below the normal numbers the step is
that of the smallest ones. For scales that follow each token the largest token's is taken, which overstates v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.stats import Gram, MinMax
from bitwright.core.transform import BlockTransform, ConsumerView, EdgeView
from bitwright.errors import InputError

__all__ = ["TRANSFORM", "SmoothQuant"]

#: Smallest magnitudes in the formula; the reference implementation clamps at the same value.
_SMALLEST = 1e-5
#: Mean of 1 / mantissa² for mantissas in [1, 2) whose logarithm is spread evenly.
_MANTISSA = 3 / (8 * math.log(2))
#: Bits of mantissa and exponent of the smallest normal number: float8 e4m3 and float4 e2m1.
_FLOATS = {8: (3, -6), 4: (1, 0)}


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(BlockTransform):
    """alpha: between 0 and 1, or "search" for the best of ``grid`` + 1 values, edge by edge. linears: also edges from linear layers (values
    into the output projection, up into down), not from norms alone. rows: of each weight, evenly spaced, that the search looks at.
    """

    name: ClassVar[str] = "smoothquant"
    alpha: float | str = 0.5
    grid: int = 20
    linears: bool = False
    rows: int = 256

    def __post_init__(self) -> None:
        if self.alpha != "search" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1):
            raise InputError(f"alpha {self.alpha!r} is not between 0 and 1", mend="use 0.5 to 0.8, or search")
        if self.grid < 1 or self.rows < 1:
            raise InputError("smoothquant needs grid >= 1 and rows >= 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "min_max"} if self.alpha == "search" else {"min_max"})

    def factors(self, edge: EdgeView) -> torch.Tensor | None:
        if not edge.norm and not self.linears:
            return None
        active = [c for c in edge.consumers if c.scheme is not None and _range(c).count > 0]
        if not active:
            return None
        x = _largest(edge.channels, active, [_magnitude(c) for c in active])
        weighed = [c for c in edge.consumers if c.scheme is not None]
        w = _largest(edge.channels, weighed, [c.weight.abs().amax(0) for c in weighed])
        if self.alpha != "search":
            return smoothed(x, w, float(self.alpha))
        sampled = [_Sampled(c, self.rows) for c in active]
        best, least = torch.ones_like(x), sum(s.error(torch.ones_like(x)) for s in sampled)
        for step in range(self.grid + 1):
            candidate = edge.storable(smoothed(x, w, step / self.grid))
            error = sum(s.error(candidate) for s in sampled)
            if error < least:
                best, least = candidate, error
        return best


def smoothed(x: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
    """``x^alpha / w^(1 - alpha)`` for the largest magnitudes of inputs and weights ``(channels,)``; 1 where either is zero.

    >>> smoothed(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0]), 0.5).tolist()
    [4.0, 0.5, 1.0]
    """
    factors = x.clamp_min(_SMALLEST).pow(alpha) / w.clamp_min(_SMALLEST).pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), factors, torch.ones_like(factors))


def rounding_variance(
    inputs: InputScheme, low: torch.Tensor, high: torch.Tensor, mean_square: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of rounding inputs, column by column: all ``(columns,)``.

    low, high: smallest and largest value of each column; mean_square: E[z²].

    >>> rounding_variance(InputScheme(), torch.tensor([-127.0]), torch.tensor([12.0]), torch.tensor([100.0])).tolist()
    [0.0833333358168602]
    """
    shape = (-1, inputs.group_size) if inputs.group_size is not None else (1, -1)
    low, high = low.clamp_max(0).view(shape).amin(1), high.clamp_min(0).view(shape).amax(1)
    scale = (torch.maximum(-low, high) / inputs.largest) if inputs.symmetric else (high - low) / 255
    step = scale.repeat_interleave(len(mean_square) // len(scale))
    if inputs.number == "int":
        variance = step.square() / 12
    else:
        bits, smallest = _FLOATS[inputs.bits]
        relative = 2.0 ** (-2 * bits) / 12 * _MANTISSA
        variance = torch.maximum((step * 2.0 ** (smallest - bits)).square() / 12, relative * mean_square)
    return torch.minimum(variance, mean_square)


class _Sampled:
    """Some rows of a consumer, and the error that factors would cause there."""

    def __init__(self, view: ConsumerView, rows: int) -> None:
        assert view.scheme is not None
        gram = view.stats["gram"]
        assert isinstance(gram, Gram)
        self.view, self.scheme, self.gram = view, view.scheme, gram
        # Only where rows do not share parameters, which a part of them would not have.
        every = -(-len(view.weight) // rows) if view.scheme.tile.rows == 1 else 1
        self.weight, self.share = view.weight[::every], len(view.weight[::every]) / len(view.weight)

    def error(self, factors: torch.Tensor) -> float:
        scales = self.view.expand(factors)
        scaled = self.weight * scales
        params, codes = self.scheme.quantize(scaled, context=self.scheme.prepare([scaled]))
        rounded = self.scheme.decode(codes, params)
        change = rounded / scales - self.weight
        error = ((change @ self.gram.matrix) * change).sum(dtype=torch.float64)
        if self.scheme.inputs is not None:
            seen, count = _range(self.view), self.gram.count
            mean_square = self.gram.mean_square / scales.square()
            variance = rounding_variance(self.scheme.inputs, seen.low / scales, seen.high / scales, mean_square)
            error += count * (variance.double() @ rounded.double().square().sum(0))
        return float(error) / self.share


def _range(view: ConsumerView) -> MinMax:
    found = view.stats.get("min_max")
    return found if isinstance(found, MinMax) else MinMax(view.weight.shape[1])


def _magnitude(view: ConsumerView) -> torch.Tensor:
    seen = _range(view)
    return torch.maximum(-seen.low, seen.high).clamp_min(0)


def _largest(channels: int, views: Sequence[ConsumerView], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest of all consumers' ``(columns,)`` values for every channel: ``(channels,)``."""
    parts = [view.per_channel(value, channels, "amax") for view, value in zip(views, values, strict=True)]
    return torch.stack(parts).amax(0)


TRANSFORM = SmoothQuant
