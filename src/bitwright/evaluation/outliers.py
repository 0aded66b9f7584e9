"""Outliers among the inputs of layers, and what they cost when inputs become int8.

With m_i the largest magnitude of channel i and m that of the whole input, a scale for the whole tensor leaves channel i
``2⁸ m_i / m`` of the 256 levels (SmoothQuant, arXiv:2211.10438, section 3). The typical channel, the median m_i, loses

    lost_bits_tensor = log2(m / median m_i)

of its 8 bits. With one scale per token m is that token's own largest magnitude m_t, and the mean over tokens is lost:

    lost_bits_token = mean_t log2(m_t / median m_i), at least 0

The two tell a few huge tokens (a scale per token helps) from a few huge channels (it does not; moving their size into the weights
does, which halves the bits that are lost at strength 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from bitwright.core.stats import AbsMax, Histogram, Moments, ShareAbove
from bitwright.errors import InputError

__all__ = ["Advice", "Channel", "InputProbe", "LayerInput", "OutlierReport", "advise", "summarize"]

Advice = Literal["fine", "per-token", "smoothquant", "keep"]

#: Bits that int8 may lose: six left are as many as 6-bit inputs have, whose cost is small.
_FINE_BITS = 2.0
#: Bits that SmoothQuant can still bring down to about that, by halving them.
_SMOOTH_BITS = 5.0
#: Bins of magnitude: fine enough for 6 sigma beside values thousands of sigmas large.
_BINS = 1 << 15
#: Multiples of sigma that count as outliers whatever the scale of the input.
_SIGMAS = 6.0

_MEANING: dict[Advice, str] = {
    "fine": "int8 with one scale per tensor is fine",
    "per-token": "a few tokens set the range: use a scale per token",
    "smoothquant": "a few channels set the range of every token: use SmoothQuant",
    "keep": "the channels differ too much for int8: keep this input in 16 bits",
}


@dataclass(frozen=True, slots=True)
class Channel:
    """One input channel. largest: its largest magnitude; ratio: that over the median channel's."""

    index: int
    largest: float
    ratio: float


@dataclass(frozen=True)
class LayerInput:
    """What was seen of one input that one or more linears read.

    label: the linears' names inside the block. sigma and kurtosis (3: normal; None: constant) are those of all values;
    share_above: of values with magnitudes above the report's threshold; share_above_6_sigma: above 6 sigma. lost_bits_*: see the
    module. profile: ``(columns,)`` float32, the largest magnitude of every channel.
    """

    block: int
    label: str
    layers: tuple[str, ...]
    columns: int
    tokens: int
    largest: float
    sigma: float
    kurtosis: float | None
    share_above: float
    share_above_6_sigma: float
    lost_bits_tensor: float
    lost_bits_token: float
    advice: Advice
    channels: tuple[Channel, ...]
    profile: torch.Tensor = field(repr=False, compare=False)

    @property
    def meaning(self) -> str:
        """The advice as a sentence."""
        return _MEANING[self.advice]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the profile."""
        values = asdict(self)
        del values["profile"]
        return {
            **values,
            "layers": list(self.layers),
            "channels": [asdict(c) for c in self.channels],
            "meaning": self.meaning,
        }


@dataclass(frozen=True)
class OutlierReport:
    """Every layer input of a model, in the order in which the model reads them.

    text: where the tokens came from. tokens: how many. threshold: the magnitude that ``share_above`` counts from.
    """

    model: str
    text: str
    tokens: int
    threshold: float
    inputs: tuple[LayerInput, ...]

    @property
    def worst(self) -> LayerInput:
        """The input that loses most with one scale per tensor; of equals, the first."""
        return max(self.inputs, key=lambda seen: seen.lost_bits_tensor)

    def to_json(self) -> dict[str, Any]:
        """Plain values. ``schema`` changes when the meaning of a key does."""
        advice: dict[str, int] = dict.fromkeys(_MEANING, 0)
        for seen in self.inputs:
            advice[seen.advice] += 1
        return {
            "schema": "bitwright-analyze-1",
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "threshold": self.threshold,
            "advice": advice,
            "worst": {"block": self.worst.block, "label": self.worst.label},
            "inputs": [seen.to_json() for seen in self.inputs],
        }


class InputProbe:
    """Everything that is collected of one layer input. Its size depends on the number of columns alone."""

    def __init__(self, columns: int, threshold: float) -> None:
        if not threshold > 0:
            raise InputError(f"threshold {threshold} is not above 0", mend="use 6.0")
        self.largest = AbsMax(columns)
        #: of log2 of every token's largest magnitude, tokens that are all zero left out
        self.tokens = Moments(1)
        self.moments = Moments(columns)
        self.histogram = Histogram(columns, bins=_BINS)
        self.above = ShareAbove(columns, threshold=threshold)

    def update(self, x: torch.Tensor) -> None:
        """Add ``(tokens, columns)`` activations."""
        if not len(x):
            return
        x = x.float()
        for statistic in (self.largest, self.moments, self.histogram, self.above):
            statistic.update(x)
        token = x.abs().amax(1, keepdim=True)
        self.tokens.update(token[token[:, 0] > 0].log2())

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self.largest.count

    @property
    def finite(self) -> bool:
        """False where a value was NaN or infinite."""
        return not self.histogram.lost


def summarize(probe: InputProbe, *, block: int, label: str, layers: Sequence[str], top: int) -> LayerInput:
    """The record of one input. top: how many of the worst channels are listed. Raises InputError where no token was seen."""
    if not probe.count:
        raise InputError(f"no token reached {label} of block {block}", mend="use more text")
    profile = probe.largest.value
    median = _live_median(profile)
    worst = torch.sort(profile, descending=True, stable=True).indices[:top].tolist()
    _, sigma, kurtosis = probe.moments.overall()
    tensor = token = 0.0
    if median:
        tensor = math.log2(float(profile.max()) / median)
        token = max(float(probe.tokens.mean) - math.log2(median), 0.0)
    return LayerInput(
        block=block,
        label=label,
        layers=tuple(layers),
        columns=len(profile),
        tokens=probe.count,
        largest=float(profile.max()),
        sigma=sigma,
        kurtosis=None if math.isnan(kurtosis) else kurtosis,
        share_above=probe.above.overall,
        share_above_6_sigma=probe.histogram.share_above(_SIGMAS * sigma) if sigma else 0.0,
        lost_bits_tensor=tensor,
        lost_bits_token=token,
        advice=advise(tensor, token),
        channels=tuple(Channel(i, float(profile[i]), float(profile[i]) / median if median else 0.0) for i in worst),
        profile=profile,
    )


def advise(lost_bits_tensor: float, lost_bits_token: float) -> Advice:
    """What to do about an input, from the bits that its typical channel loses. Rules of thumb; docs/analyze.md has the reasons.

    >>> advise(1.2, 1.0), advise(6.0, 1.5), advise(4.0, 3.8), advise(9.0, 8.0)
    ('fine', 'per-token', 'smoothquant', 'keep')
    """
    if lost_bits_tensor <= _FINE_BITS:
        return "fine"
    if lost_bits_token <= _FINE_BITS:
        return "per-token"
    return "smoothquant" if lost_bits_token <= _SMOOTH_BITS else "keep"


def _live_median(largest: torch.Tensor) -> float:
    """Median over the channels that are not always zero; 0 where all are.

    >>> _live_median(torch.tensor([0.0, 0.0, 1.0, 2.0, 8.0]))
    2.0
    """
    live = largest[largest > 0].double()
    return float(live.quantile(0.5)) if len(live) else 0.0
