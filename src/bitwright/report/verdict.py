"""What the figures come to, in one sentence, for the page and for the terminal.

The words for a divergence are bound to what it can do. Over one position, no set of next tokens gains or loses more probability than
the total variation distance, which Pinsker's inequality bounds by ``sqrt(KL / 2)`` (Csiszár and Körner, Information Theory, 2nd ed.,
problem 3.18); by Jensen's inequality the same holds for the means. Changes of perplexity have no such bound, and one text can lower
them by luck; their limits are rules of thumb, placed so that both usually agree.

======================  ======================  ===========================  =======================================
mean KL below, nats     moved probability       perplexity up by less than   words
======================  ======================  ===========================  =======================================
0.0001                  0.7 %                   0.1 %                        practically the same as the original
0.005                   5 %                     1 %                          hard to tell from the original
0.02                    10 %                    3 %                          close to the original
0.1                     22 %                    10 %                         noticeably different from the original
0.5                     50 %                    50 %                         far from the original
more                                            more                         no longer the same model
======================  ======================  ===========================  =======================================

Where both are known, the worse one counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.evaluation.record import Quality
from bitwright.report.document import Candidate, Document, Origin
from bitwright.report.numbers import bytes_text, decimals, fixed, percent, significant

__all__ = [
    "GRADES",
    "Grade",
    "Verdict",
    "grade",
    "increase",
    "kl_grade",
    "perplexity_grade",
    "pick",
    "sentence",
    "verdict",
]


@dataclass(frozen=True)
class Grade:
    """level: 0 is best. kl, increase: what both must stay below, in nats and as a share."""

    level: int
    kl: float
    increase: float
    words: str
    short: str


#: Sizes that differ by less than this factor count as equal.
_SAME_SIZE = 1.01
#: Best first; the last one has no limits.
GRADES = (
    Grade(0, 0.0001, 0.001, "practically the same as the original", "practically the same"),
    Grade(1, 0.005, 0.01, "hard to tell from the original", "hard to tell"),
    Grade(2, 0.02, 0.03, "close to the original", "close"),
    Grade(3, 0.1, 0.1, "noticeably different from the original", "noticeably different"),
    Grade(4, 0.5, 0.5, "far from the original", "far"),
    Grade(5, math.inf, math.inf, "no longer the same model", "no longer the same"),
)


@dataclass(frozen=True)
class Verdict:
    """candidate: the one that the sentence speaks of; lead: why this one, where there are several. grade: None without a measurement."""

    candidate: Candidate
    lead: str
    sentence: str
    grade: Grade | None


def kl_grade(mean: float) -> Grade:
    """Of a mean divergence in nats.

    >>> kl_grade(0.0031).words, kl_grade(0.03).words
    ('hard to tell from the original', 'noticeably different from the original')
    """
    return next((found for found in GRADES if mean < found.kl), GRADES[-1])


def perplexity_grade(change: float) -> Grade:
    """Of a change of perplexity as a share; one that fell is as good as one that stayed.

    >>> perplexity_grade(0.0054).level, perplexity_grade(-0.2).level, perplexity_grade(0.2).words
    (1, 0, 'far from the original')
    """
    return next((found for found in GRADES if change < found.increase), GRADES[-1])


def increase(quality: Quality) -> float | None:
    """Change of perplexity as a share of the original's; None without an original."""
    if quality.source is None or quality.source.perplexity <= 0:
        return None
    return quality.model.perplexity / quality.source.perplexity - 1


def grade(quality: Quality | None) -> Grade | None:
    """The worse of both grades; None where neither figure is known."""
    if quality is None:
        return None
    found = [] if quality.kl is None else [kl_grade(quality.kl.mean)]
    change = increase(quality)
    if change is not None:
        found.append(perplexity_grade(change))
    return max(found, key=lambda one: one.level, default=None)


def sentence(candidate: Candidate, source: Origin | None) -> str:
    """Size, quality, and what that comes to.

    ``4.13 bits a weight, 3.6x smaller; perplexity 35.41 -> 35.60 (+0.54 %), mean KL 0.0031: hard to tell from the original``
    """
    size = []
    if candidate.size.bits_per_weight is not None:
        size.append(f"{fixed(candidate.size.bits_per_weight, 2)} bits a weight")
    if source is not None and source.size is not None and candidate.size.weight_file_bytes > 0:
        size.append(_ratio(source.size.weight_file_bytes / candidate.size.weight_file_bytes))
    else:
        size.append(bytes_text(candidate.size.weight_file_bytes))
    return "; ".join([", ".join(size), _quality_text(candidate.quality), *_gate_text(candidate)])


def _ratio(times: float) -> str:
    """How much smaller.

    >>> _ratio(3.62), _ratio(1.004), _ratio(0.5)
    ('3.6x smaller', 'as large as the original', '2.0x larger')
    """
    if 0.995 < times < 1.005:
        return "as large as the original"
    return (
        f"{times:.3g}x smaller"
        if times >= 100
        else f"{times:.1f}x smaller"
        if times > 1
        else f"{1 / max(times, 1e-9):.1f}x larger"
    )


def _quality_text(quality: Quality | None) -> str:
    if quality is None:
        return "quality was not measured"
    change = increase(quality)
    if quality.source is None or change is None:
        parts = [f"perplexity {significant(quality.model.perplexity, 4)}"]
    else:
        parts = [f"perplexity {_pair(quality.source.perplexity, quality.model.perplexity)} ({percent(change)})"]
    if quality.kl is not None:
        parts.append(f"mean KL {significant(quality.kl.mean, 2)}")
    found = grade(quality)
    return ", ".join(parts) + (f": {found.words}" if found else "")


def _pair(before: float, after: float) -> str:
    """Both with the same decimals, and enough of them to tell the two apart, if four do.

    >>> _pair(35.412, 35.604), _pair(123.4312, 123.4301)
    ('35.41 -> 35.60', '123.431 -> 123.430')
    """
    places = min(4, decimals([before, after], 4))
    while places < 4 and before != after and fixed(before, places) == fixed(after, places):
        places += 1
    return f"{fixed(before, places)} -> {fixed(after, places)}"


def _gate_text(candidate: Candidate) -> list[str]:
    gate = candidate.gate
    if gate is None or not gate.lines:
        return []
    total, failed = len(gate.lines), sum(not line.passed for line in gate.lines)
    if failed:
        return [f"fails {failed} of {total} limits" if total > 1 else "fails its limit"]
    return ["within its limit" if total == 1 else "within both limits" if total == 2 else f"within all {total} limits"]


def pick(candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The candidate to speak of, and why this one.

    1. With gates: the smallest of those that pass; where none does, the closest to the original.
    2. Else the smallest that is hard to tell from the original, or better.
    3. Else the closest: least mean KL, then least perplexity.
    4. Where quality was measured nowhere: the smallest.

    candidates: at least one. Sizes within 1 % of each other count as equal, and the closest of those is taken; ties go to the first.
    """
    if len(candidates) == 1:
        return candidates[0], ""
    count = len(candidates)
    gated = [one for one in candidates if one.gate is not None]
    passed = [one for one in gated if one.gate is not None and one.gate.passed]
    if passed:
        return _smallest(passed), f"the smallest of {count} within its limits"
    measured = [one for one in candidates if one.quality is not None]
    if gated and measured:
        return min(measured, key=_distance), f"the closest of {count} to the original; none is within its limits"
    good = [one for one in candidates if (found := grade(one.quality)) is not None and found.level <= 1]
    if good:
        return _smallest(good), f"the smallest of {count} that is {GRADES[1].words}"
    if measured:
        compared = any(grade(one.quality) for one in measured)
        closest = f"the closest of {count} to the original" if compared else f"the lowest perplexity of {count}"
        return min(measured, key=_distance), closest
    return _smallest(candidates), f"the smallest of {count}"


def _smallest(candidates: Sequence[Candidate]) -> Candidate:
    """The closest to the original among those that are as good as the smallest: a header's length decides nothing."""
    least = min(one.size.weight_file_bytes for one in candidates)
    return min((one for one in candidates if one.size.weight_file_bytes <= least * _SAME_SIZE), key=_distance)


def _distance(candidate: Candidate) -> tuple[float, float]:
    """Mean KL, then perplexity; what is unknown or no number comes last."""
    quality = candidate.quality
    if quality is None:
        return math.inf, math.inf
    kl = math.inf if quality.kl is None or math.isnan(quality.kl.mean) else quality.kl.mean
    perplexity = quality.model.perplexity
    return kl, math.inf if math.isnan(perplexity) else perplexity


def verdict(document: Document) -> Verdict | None:
    """Of the whole document; None where it has no candidate."""
    if not document.candidates:
        return None
    chosen, lead = pick(document.candidates)
    return Verdict(chosen, lead, sentence(chosen, document.source), grade(chosen.quality))
