"""Limits: how they are read, what they compare, what they say."""

from __future__ import annotations

import math

import pytest

from bitwright.errors import InputError
from bitwright.evaluation.gate import DEFAULT_GATE, NAMES, Limit, parse_gate, value_of
from bitwright.evaluation.record import DeltaP, Divergence, Flips, Perplexity, Quality, TaskScore

QUALITY = Quality(
    model=Perplexity(10.6, math.log(10.6), 0.01, 100),
    source=Perplexity(10.0, math.log(10.0), 0.01, 100),
    kl=Divergence(0.02, 0.001, 0.01, 0.05, 0.2, 0.4, 0.9, 100),
    top1=0.93,
    top5=0.9,
    delta_p=DeltaP(-0.001, 0.0001, 0.03, -0.1, -0.01, 0.0, 0.01, 0.1),
    flips=Flips(0.02, 0.01),
)


def test_several_limits_are_read_in_order():
    assert parse_gate(" ppl_increase < 0.5 ,kl_mean<=2e-2,top1>=95%,task:mine:acc>0.3") == (
        Limit("ppl_increase", "<", 0.5),
        Limit("kl_mean", "<=", 0.02),
        Limit("top1", ">=", 0.95),
        Limit("task:mine:acc", ">", 0.3),
    )


def test_the_default_is_half_a_point_of_perplexity():
    assert parse_gate("default") == parse_gate(DEFAULT_GATE) == (Limit("ppl_increase", "<=", 0.5),)


@pytest.mark.parametrize(
    "text", ["", "kl_mean", "kl_mean<", "kl_mean=0.1", "kl_mean<abc", "kl_mean<nan", "kl_mean<0.1;top1>0", "<1"]
)
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(InputError, match="is not a limit"):
        parse_gate(text)


def test_an_unknown_figure_is_refused_with_the_known_ones():
    with pytest.raises(InputError) as caught:
        parse_gate("klmean<0.1")
    assert all(name in caught.value.mend for name in NAMES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ppl", 10.6), ("ppl_increase", 0.6), ("ppl_ratio", 0.06), ("kl_mean", 0.02), ("kl_median", 0.01), ("kl_90", 0.05),
        ("kl_99", 0.2), ("kl_999", 0.4), ("kl_max", 0.9), ("top1", 0.93), ("top5", 0.9), ("flips", 0.03), ("delta_p_rms", 0.03),
    ],
)  # fmt: skip
def test_every_figure_is_the_one_it_says(name, value):
    assert value_of(Limit(name, "<", 1.0), QUALITY) == pytest.approx(value)


def test_every_name_is_tested_above():
    assert len(NAMES) == 13


@pytest.mark.parametrize(("relation", "kept"), [("<", (True, False, False)), ("<=", (True, True, False)),
                                                (">", (False, False, True)), (">=", (False, True, True))])  # fmt: skip
def test_relations_hold_at_their_bounds_as_written(relation, kept):
    assert tuple(Limit("kl_mean", relation, 0.5).holds(value) for value in (0.4, 0.5, 0.6)) == kept
    assert not Limit("kl_mean", relation, 0.5).holds(math.nan)


def test_sentences_say_what_it_came_to():
    assert Limit("top1", ">=", 0.95).sentence(0.93) == (
        "agreement on the most likely token is 93 %, but must be at least 95 %"
    )
    assert Limit("ppl_increase", "<=", 0.5).sentence(0.25) == (
        "the increase of perplexity is 0.25, as it must be at most 0.5"
    )


def test_a_task_s_score_is_found_by_name_and_metric():
    scores = [TaskScore("mine", "acc", 0.4, 0.1, 20), TaskScore("mine", "acc_norm", 0.5, 0.1, 20)]
    assert value_of(parse_gate("task:mine:acc_norm>0")[0], QUALITY, scores) == 0.5
    assert value_of(parse_gate("task:mine>0")[0], QUALITY, scores) == 0.4
    with pytest.raises(InputError, match="other was not run"):
        value_of(parse_gate("task:other>0")[0], QUALITY, scores)


def test_figures_that_need_the_original_ask_for_it():
    alone = Quality(model=QUALITY.model)
    assert value_of(parse_gate("ppl<20")[0], alone) == 10.6
    with pytest.raises(InputError, match="compares with the original"):
        value_of(parse_gate("kl_mean<1")[0], alone)
