"""The verdict says in words what the figures bound, and speaks of the candidate that deserves it."""

from __future__ import annotations

import math

import pytest
from tests.documents import bare, quality, single, twelve

from bitwright.evaluation.record import Perplexity, Quality
from bitwright.report.document import Candidate, Document, GateLine, GateResult, Origin, Size
from bitwright.report.verdict import GRADES, grade, increase, kl_grade, perplexity_grade, pick, sentence, verdict


def sized(name: str, count: int, found: Quality | None = None, gate: bool | None = None) -> Candidate:
    line = GateLine(name="mean KL", relation="<", limit=1, value=0 if gate else 2, passed=bool(gate), sentence="")
    return Candidate(
        name=name,
        layout="native",
        size=Size(weight_file_bytes=count),
        quality=found,
        gate=None if gate is None else GateResult(passed=gate, lines=(line,)),
    )


def perplexities(model: float, source: float | None = None) -> Quality:
    def record(value: float) -> Perplexity:
        return Perplexity(value, math.log(value), 0.0, 10)

    return Quality(record(model), None if source is None else record(source))


# The table of the documentation, written out anew: bound, probability that Pinsker lets move, words.
@pytest.mark.parametrize(
    ("below", "moved", "words"),
    [
        (0.0001, 0.007, "practically the same as the original"),
        (0.005, 0.05, "hard to tell from the original"),
        (0.02, 0.10, "close to the original"),
        (0.1, 0.22, "noticeably different from the original"),
        (0.5, 0.50, "far from the original"),
    ],
)
def test_words_for_a_divergence_are_bound_to_what_it_can_move(below, moved, words):
    assert kl_grade(math.nextafter(below, 0)).words == words
    assert kl_grade(below).words != words
    assert math.sqrt(below / 2) == pytest.approx(moved, rel=0.02)


def test_words_get_worse_without_gaps():
    assert [one.level for one in GRADES] == list(range(6))
    for worse, better in zip(GRADES[1:], GRADES, strict=False):
        assert worse.kl > better.kl
        assert worse.increase > better.increase
    assert GRADES[-1].kl == GRADES[-1].increase == math.inf
    assert kl_grade(math.inf).level == kl_grade(math.nan).level == perplexity_grade(math.nan).level == 5
    assert kl_grade(0.0).level == 0


def test_the_worse_of_both_figures_counts():
    found = quality(0.0031)
    assert grade(found).level == 1
    torn = Quality(perplexities(20.0).model, perplexities(10.0).model, found.kl)
    assert grade(torn).level == 5
    assert increase(torn) == pytest.approx(1.0)


def test_unknown_quality_has_no_grade():
    assert grade(None) is None
    assert grade(perplexities(12.0)) is None
    assert increase(perplexities(12.0)) is None


def test_sentence_of_one_candidate_holds_size_quality_and_words():
    found = single()
    assert sentence(found.candidates[0], found.source) == (
        "4.13 bits a weight, 3.6x smaller; perplexity 35.41 -> 35.58 (+0.47 %), mean KL 0.0031: hard to tell from the original"
    )


def test_sentence_says_what_is_missing():
    assert sentence(bare().candidates[0], None) == "7.47 MB; quality was not measured"
    assert sentence(sized("a", 2000, perplexities(35.604)), None) == "2.00 kB; perplexity 35.60"
    assert sentence(sized("a", 2000, gate=False), None).endswith("; fails its limit")
    assert sentence(sized("a", 2000, gate=True), None).endswith("; within its limit")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(3600, 1000, "3.6x smaller"), (1000, 1001, "as large as the original"), (1000, 2000, "2.0x larger")],
)
def test_sizes_are_compared_with_the_original(before, after, words):
    source = Origin(name="o", size=Size(weight_file_bytes=before))
    assert sentence(sized("a", after), source).startswith(words + ";")


def test_perplexities_that_differ_little_keep_enough_decimals():
    text = sentence(sized("a", 1, perplexities(123.4301, 123.4312)), None)
    assert "perplexity 123.431 -> 123.430 (0.00 %)" in text


def test_without_limits_the_smallest_that_is_hard_to_tell_is_chosen():
    found = [sized("big", 9, quality(0.0001)), sized("right", 4, quality(0.004)), sized("small", 3, quality(0.03))]
    chosen, why = pick(found)
    assert chosen.name == "right"
    assert why == "the smallest of 3 that is hard to tell from the original"


def test_limits_come_before_words():
    found = [sized("fails", 2, quality(0.0001), False), sized("holds", 9, quality(0.03), True)]
    chosen, why = pick(found)
    assert (chosen.name, why) == ("holds", "the smallest of 2 within its limits")
    chosen, why = pick([sized("far", 2, quality(0.3), False), sized("near", 9, quality(0.03), False)])
    assert chosen.name == "near"
    assert "none is within its limits" in why


def test_where_all_are_bad_the_closest_is_chosen():
    chosen, why = pick([sized("far", 2, quality(0.3)), sized("near", 9, quality(0.03)), sized("unknown", 1)])
    assert (chosen.name, why) == ("near", "the closest of 3 to the original")
    chosen, why = pick([sized("a", 2, perplexities(11.0)), sized("b", 9, perplexities(10.0))])
    assert (chosen.name, why) == ("b", "the lowest perplexity of 2")
    chosen, why = pick([sized("a", 2, perplexities(math.nan)), sized("b", 9, perplexities(10.0))])
    assert chosen.name == "b"


def test_without_any_quality_the_smallest_is_chosen():
    assert pick([sized("a", 2), sized("b", 1)])[0].name == "b"
    assert pick([sized("a", 2)]) == (sized("a", 2), "")


def test_a_header_more_or_less_decides_nothing():
    found = [
        sized("far", 1000, quality(0.004)),
        sized("close", 1005, quality(0.001)),
        sized("large", 1100, quality(0.0005)),
    ]
    assert pick(found)[0].name == "close"


def test_verdict_of_a_document():
    found = verdict(twelve())
    # As large as gptq-int4-g128, and closer.
    assert found.candidate.name == "awq+gptq-int4-g128"
    assert found.grade.level == 1
    assert "within all 3 limits" in found.sentence
    empty = Document(bitwright="1", title="t", source=None, measurement=None, candidates=())
    assert verdict(empty) is None
