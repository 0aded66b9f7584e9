"""Mixtures against llama.cpp's own quantizer: the types that its dry runs print, for every mixture and shape of model."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.mixture_models import SKELETONS, Skeleton

from bitwright.errors import InputError, PlanError
from bitwright.gguf.mixture import MIXTURES, Facts, Override, assign, by_layer, mixture, quantizable

DATA = Path(__file__).parents[2] / "data" / "llamacpp_mixtures.json.gz"


@cache
def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(DATA.read_bytes()))["models"]
    return found


@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("skeleton", SKELETONS, ids=lambda s: s.name)
def test_every_mixture_gives_every_tensor_the_type_that_llama_quantize_gives_it(
    skeleton: Skeleton, imatrix: bool
) -> None:
    known = reference()[skeleton.name]
    for mix in MIXTURES.values():
        runs = known[mix.name + ("+imatrix" if imatrix else "")]
        expected = dict(zip(known["tensors"], [kind for kind, count in runs for _ in range(count)], strict=True))
        shapes = skeleton.shapes()
        found = assign(mix, shapes, skeleton.facts, imatrix=imatrix)
        assert found == {name: expected[name] for name in found}
        assert {expected[name] for name in shapes.keys() - found.keys()} <= {"F32", "F16"}


def test_the_order_of_the_tensors_does_not_matter() -> None:
    skeleton = SKELETONS[2]
    shuffled = list(skeleton.shapes().items())
    random.Random(1).shuffle(shuffled)
    mix = mixture("Q4_K_M")
    assert assign(mix, dict(shuffled), skeleton.facts) == assign(mix, skeleton.shapes(), skeleton.facts)


def test_the_first_pattern_that_matches_counts_and_widths_that_do_not_fit_fall_back() -> None:
    shapes = {"blk.0.ffn_down.weight": (8, 288), "blk.1.ffn_down.weight": (8, 256), "blk.1.ffn_up.weight": (8, 256)}
    facts = Facts(architecture="llama", blocks=2, heads=8, kv_heads=8)
    overrides = [Override.parse("ffn_down=q6_k"), Override.parse(r"blk\.1\.=Q2_K")]
    found = assign(mixture("Q4_K_S"), shapes, facts, overrides=overrides)
    assert found == {"blk.0.ffn_down.weight": "Q8_0", "blk.1.ffn_down.weight": "Q6_K", "blk.1.ffn_up.weight": "Q2_K"}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    facts = Facts(architecture="llama", blocks=1, heads=1, kv_heads=1)
    with pytest.raises(PlanError, match="nothing=Q6_K"):
        assign(mixture("Q4_0"), {"output.weight": (8, 32)}, facts, overrides=[Override("nothing", "Q6_K")])


@pytest.mark.parametrize("text", ["Q6_K", "=Q6_K", "ffn=Q9", "(=Q6_K"])
def test_wrong_patterns_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        Override.parse(text)


def test_embeddings_and_head_can_be_chosen_and_pure_means_one_type() -> None:
    skeleton = SKELETONS[0]
    found = assign(mixture("Q4_K_M"), skeleton.shapes(), skeleton.facts, pure=True, embedding="Q3_K", output="Q8_0")
    assert found.pop("token_embd.weight") == "Q3_K"
    assert found.pop("output.weight") == "Q8_0"
    assert set(found.values()) == {"Q4_K"}


def test_blocks_sort_by_number_and_norms_stay_plain() -> None:
    names = ["blk.10.attn_q.weight", "output.weight", "blk.9.attn_q.weight"]
    assert sorted(names, key=by_layer) == ["output.weight", "blk.9.attn_q.weight", "blk.10.attn_q.weight"]
    assert not quantizable("blk.0.ffn_gate_inp.weight", (8, 256))
    assert not quantizable("blk.0.attn_q.bias", (8, 256))
    assert not quantizable("blk.0.attn_q.weight", (1, 256))
