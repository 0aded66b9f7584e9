"""What quantizing one linear's weights does to its output, from streamed inputs.

With the source's weight W, the quantized one W' and the inputs x that the source model gives this layer, over all tokens:

    relative = sum |(W' - W) x|^2 / sum |W x|^2        snr_db = -10 log10(relative)        weight = |W' - W|^2 / |W|^2

Both sums are taken directly, product by product; no Gram matrix is held. ``top_channels`` needs to know where the error comes from, which
the cross terms between channels do not tell. It is taken from the diagonal part of the Gram matrix, with d_j column j of W' - W:

    share of channel j = |d_j|^2 sum x_j^2 / sum_k |d_k|^2 sum x_k^2
"""

from __future__ import annotations

import math

import numpy as np
import torch

from bitwright.evaluation.record import WeightHistogram

__all__ = ["OutputError", "energy", "ratio", "snr_db", "top_share", "weight_histogram"]

#: Tokens that are multiplied at a time.
_TOKENS = 512
#: Share of the channels whose part of the error is told.
_TOP = 0.01


def energy(tensor: torch.Tensor) -> float:
    """Sum of squares, in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def ratio(error: float, signal: float) -> float:
    """``error / signal``; without any signal 0 where there is no error either, else 1.

    >>> ratio(1.0, 4.0), ratio(0.0, 0.0), ratio(2.0, 0.0)
    (0.25, 0.0, 1.0)
    """
    return error / signal if signal else float(error > 0)


def snr_db(relative: float) -> float | None:
    """Signal to noise in decibels; None where there is no noise.

    >>> snr_db(0.01), snr_db(0.0)
    (20.0, None)
    """
    return -10 * math.log10(relative) if relative > 0 else None


def top_share(parts: torch.Tensor) -> float:
    """Share of the sum that the largest 1 % of the parts have, at least one of them; 0 where all are 0.

    >>> top_share(torch.tensor([1.0, 6.0, 1.0]))
    0.75
    """
    total = float(parts.sum(dtype=torch.float64))
    count = max(1, math.ceil(_TOP * len(parts)))
    return float(parts.topk(count).values.sum(dtype=torch.float64)) / total if total else 0.0


class OutputError:
    """Sums over tokens for one linear with ``columns`` inputs. tokens: how many were seen."""

    def __init__(self, columns: int) -> None:
        self.error = self.signal = 0.0
        self.tokens = 0
        self._inputs = torch.zeros(columns, dtype=torch.float64)

    def update(self, x: torch.Tensor, weight: torch.Tensor, difference: torch.Tensor) -> None:
        """Add inputs ``(tokens, in)``. weight, difference: W and W' - W, ``(out, in)`` each, all float32."""
        for piece in torch.split(x, _TOKENS):
            self.signal += energy(piece @ weight.T)
            self.error += energy(piece @ difference.T)
            self._inputs += piece.double().square().sum(0)
        self.tokens += len(x)

    @property
    def relative(self) -> float:
        """Error over signal."""
        return ratio(self.error, self.signal)

    def top_channels(self, difference: torch.Tensor) -> float:
        """Share of the error's diagonal part that comes from the worst 1 % of the input channels."""
        return top_share(torch.linalg.vector_norm(difference, dim=0, dtype=torch.float64).square() * self._inputs)


def weight_histogram(
    module: str, source: torch.Tensor, model: torch.Tensor, *, bins: int = 64, rows: int = 1024
) -> WeightHistogram:
    """Shares of weights in ``bins`` equal bins over the source's range; model's weights beyond it are in none.

    rows: how many are counted at a time.

    >>> found = weight_histogram("up", torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([[0.0, 3.5, 4.0, 5.0]]), bins=2)
    >>> found.edges, found.source, found.model
    ((0.0, 2.0, 4.0), (0.5, 0.5), (0.25, 0.5))
    """
    low, high = float(source.min()), float(source.max())
    if low == high:
        low, high = low - 0.5, high + 0.5

    def shares(weight: torch.Tensor) -> tuple[float, ...]:
        counts = np.zeros(bins, np.int64)
        for piece in torch.split(weight, rows):
            counts += np.histogram(piece.numpy(), bins=bins, range=(low, high))[0]
        return tuple((counts / weight.numel()).tolist())

    edges = tuple(np.linspace(low, high, bins + 1).tolist())
    return WeightHistogram(module, edges, shares(source), shares(model))
