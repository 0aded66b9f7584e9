"""The quality gate: limits on what was measured, such as ``ppl_increase<0.5,kl_mean<0.02``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from bitwright.errors import InputError
from bitwright.evaluation.record import Quality, TaskScore

__all__ = ["DEFAULT_GATE", "NAMES", "Limit", "Relation", "parse_gate", "value_of"]

Relation = Literal["<", "<=", ">", ">="]

#: What the field calls usable: perplexity rises by half a point at most.
DEFAULT_GATE = "ppl_increase<=0.5"

_LIMIT = re.compile(r"\s*([A-Za-z_][\w:.\-]*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*(%?)\s*")
_TASK = "task:"


@dataclass(frozen=True)
class _Figure:
    """title: in a sentence; read: from the quality; good: which direction is better."""

    title: str
    read: Callable[[Quality], float | None]
    share: bool = False


def _increase(quality: Quality) -> float | None:
    return None if quality.source is None else quality.model.perplexity - quality.source.perplexity


def _ratio(quality: Quality) -> float | None:
    return None if quality.source is None else quality.model.perplexity / quality.source.perplexity - 1


def _kl(name: str) -> Callable[[Quality], float | None]:
    return lambda quality: None if quality.kl is None else float(getattr(quality.kl, name))


_FIGURES: Mapping[str, _Figure] = {
    "ppl": _Figure("perplexity", lambda q: q.model.perplexity),
    "ppl_increase": _Figure("the increase of perplexity", _increase),
    "ppl_ratio": _Figure("the relative increase of perplexity", _ratio, share=True),
    "kl_mean": _Figure("the mean KL divergence", _kl("mean")),
    "kl_median": _Figure("the median KL divergence", _kl("median")),
    "kl_90": _Figure("the KL divergence of the worst 10 %", _kl("p90")),
    "kl_99": _Figure("the KL divergence of the worst 1 %", _kl("p99")),
    "kl_999": _Figure("the KL divergence of the worst 0.1 %", _kl("p999")),
    "kl_max": _Figure("the largest KL divergence", _kl("max")),
    "top1": _Figure("agreement on the most likely token", lambda q: q.top1, share=True),
    "top5": _Figure("agreement on the five most likely tokens", lambda q: q.top5, share=True),
    "flips": _Figure(
        "the share of flipped predictions", lambda q: None if q.flips is None else q.flips.total, share=True
    ),
    "delta_p_rms": _Figure(
        "the root mean square change of probabilities", lambda q: None if q.delta_p is None else q.delta_p.rms
    ),
}
#: Every figure that a gate may limit; a task's score is ``task:NAME``.
NAMES = tuple(_FIGURES)


@dataclass(frozen=True)
class Limit:
    """One condition: the figure ``name`` stands in ``relation`` to ``bound``."""

    name: str
    relation: Relation
    bound: float

    def holds(self, value: float) -> bool:
        """True where the value keeps the limit; NaN never does."""
        return {
            "<": value < self.bound, "<=": value <= self.bound, ">": value > self.bound, ">=": value >= self.bound,
        }[self.relation]  # fmt: skip

    def sentence(self, value: float) -> str:
        """What it came to, in words.

        >>> Limit("kl_mean", "<", 0.02).sentence(0.031)
        'the mean KL divergence is 0.031, but must be below 0.02'
        """
        figure = _FIGURES.get(self.name)
        title = f"the score of {self.name.removeprefix(_TASK)}" if figure is None else figure.title
        share = figure is not None and figure.share
        words = {"<": "below", "<=": "at most", ">": "above", ">=": "at least"}[self.relation]
        link = ", as it must be" if self.holds(value) else ", but must be"
        bound = f"{words} {_number(self.bound, share)}"
        return f"{title} is {_number(value, share)}{link} {bound}"


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.4g} %" if share else f"{value:.4g}"


def parse_gate(text: str) -> tuple[Limit, ...]:
    """Limits from ``NAME<NUMBER,...``; ``default`` is ``DEFAULT_GATE``. InputError, with the known names, for anything else.

    >>> parse_gate("ppl_increase<0.5, top1>=95%")[1]
    Limit(name='top1', relation='>=', bound=0.95)
    """
    found = []
    for part in (DEFAULT_GATE if text.strip() == "default" else text).split(","):
        match = _LIMIT.fullmatch(part)
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            raise InputError(
                f"gate '{part}' is not a limit", mend='write for example --gate "ppl_increase<0.5,kl_mean<0.02"'
            )
        name = match[1]
        if name not in _FIGURES and not name.startswith(_TASK):
            known = ", ".join([*_FIGURES, f"{_TASK}NAME"])
            raise InputError(f"gate '{name}' is unknown", mend=f"use one of: {known}")
        found.append(Limit(name, cast(Relation, match[2]), bound / 100 if match[4] else bound))
    return tuple(found)


def value_of(limit: Limit, quality: Quality, tasks: Sequence[TaskScore] = ()) -> float:
    """The figure that a limit is about. InputError where it was not measured."""
    if limit.name.startswith(_TASK):
        name = limit.name.removeprefix(_TASK)
        scores = [score for score in tasks if name in (score.task, f"{score.task}:{score.metric}")]
        if not scores:
            raise InputError(f"gate: task {name} was not run", mend="name it with --tasks")
        return scores[0].value
    value = _FIGURES[limit.name].read(quality)
    if value is None:
        raise InputError(f"gate: {limit.name} compares with the original", mend="name it with --against MODEL")
    return value
