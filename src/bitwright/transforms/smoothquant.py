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

Static ranges end where the calibration tokens ended, and what lies beyond is clipped. Calibration tokens are not, so this part has to be
expected: the larger alpha, the more columns come near the common limit. Magnitudes beyond u are taken to be as rare as
P(u) = exp(-L (u / M)^k), which is 1 / T at the largest magnitude M seen (L = ln T), with k such that E[x^2] is right:
M^2 / E[x^2] = L^(2 / k) / Gamma(1 + 2 / k). Beyond u they fall off over u / (k L (u / M)^k) =: r, and v_j grows by

    E[(|x_j| - u)^2 above u]  ~  2 r^2 P(u)
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
#: Exponents k of tails: heavier than exponential (1), as far as one extreme value should be believed, to lighter than Gaussian (2).
_TAILS = torch.linspace(0.7, 4.0, 67)


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
        best, least = None, sum(s.error(torch.ones_like(x)) for s in sampled)
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


def input_variance(
    inputs: InputScheme, low: torch.Tensor, high: torch.Tensor, mean_square: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Mean squared error of rounding and clipping inputs, column by column: ``(columns,)``.

    low, high: smallest and largest value of each column among ``tokens``; mean_square: E[z²]; all ``(columns,)``.

    >>> dynamic, seen = InputScheme(), torch.tensor([127.0, 0.1])
    >>> [round(value, 4) for value in input_variance(dynamic, -seen, seen, seen.square() / 4, 1000).tolist()]
    [0.0833, 0.0025]
    """
    shape = (-1, inputs.group_size) if inputs.group_size is not None else (1, -1)
    least, most = low.clamp_max(0).view(shape).amin(1), high.clamp_min(0).view(shape).amax(1)
    if inputs.symmetric:
        most = torch.maximum(-least, most)
        least = -most
    scale = most / inputs.largest if inputs.symmetric else (most - least) / 255
    step, least, most = (part.repeat_interleave(len(low) // len(part)) for part in (scale, least, most))
    if inputs.number == "int":
        variance = step.square() / 12
    else:
        bits, smallest = _FLOATS[inputs.bits]
        relative = 2.0 ** (-2 * bits) / 12 * _MANTISSA
        variance = torch.maximum((step * 2.0 ** (smallest - bits)).square() / 12, relative * mean_square)
    variance = torch.minimum(variance, mean_square)
    if inputs.dynamic:
        return variance
    above = clipping_variance(most, high.clamp_min(0), mean_square, tokens)
    return variance + above + clipping_variance(-least, (-low).clamp_min(0), mean_square, tokens)


def clipping_variance(
    limit: torch.Tensor, largest: torch.Tensor, mean_square: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Mean squared error of clipping unseen values at ``limit``, when ``tokens`` seen ones reached ``largest``: all ``(columns,)``.

    A tail that falls off exponentially, ``E[x²] = 2``, has ``largest = ln T``; what it loses at that limit is 2 / T:

    >>> seen = torch.tensor([math.log(1000)])
    >>> round(1000 * float(clipping_variance(seen, seen, torch.tensor([2.0]), 1000)), 2)
    2.0
    """
    log = math.log(max(tokens, 3))
    spread = log ** (1 / _TAILS) / torch.lgamma(1 + 2 / _TAILS).div(2).exp()
    seen = largest / mean_square.clamp_min(1e-30).sqrt()
    # The wider the seen values are spread, the heavier the tail; spread falls with k.
    at = torch.searchsorted(-spread, -seen).clamp_max(len(_TAILS) - 1)
    power = _TAILS[at]
    depth = log * (limit / largest.clamp_min(1e-30)).pow(power)
    lost = 2 * (limit / (power * depth.clamp_min(1e-30))).square() * (-depth).exp()
    return torch.where(largest > 0, lost, torch.zeros_like(lost))


class _Sampled:
    """Some rows of a consumer, and the error that factors would cause there."""

    def __init__(self, view: ConsumerView, rows: int) -> None:
        assert view.scheme is not None
        gram = view.stats["gram"]
        assert isinstance(gram, Gram)
        self.view, self.scheme, self.gram = view, view.scheme, gram
        # Only where rows do not share parameters, which a part of them would not have.
        alone = view.scheme.by_rows((view.weight.shape[0], view.weight.shape[1]))
        every = -(-len(view.weight) // rows) if alone else 1
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
            variance = input_variance(self.scheme.inputs, seen.low / scales, seen.high / scales, mean_square, count)
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
