"""Mixed precision by hand: exceptions by name, role and block, and what is refused at plan time."""

from __future__ import annotations

import pytest
from tests.zoo import make

from bitwright.engine.plan import make_plan
from bitwright.engine.recipe import block_numbers, make_recipe
from bitwright.engine.run import open_source
from bitwright.errors import InputError, PlanError
from bitwright.model.roles import role_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overrides")
    return lambda name: folder / name if (folder / name).exists() else make(name, folder / name)


def planned(path, **fields):
    with open_source(path) as source:
        plan = make_plan(make_recipe({"method": "rtn", "group_size": 32, **fields}), source)
    return {e.unit.name: e for e in plan.entries if e.unit is not None and e.action == "quantize"}


def bits(entries):
    return {name: entry.scheme.bits for name, entry in entries.items()}


def test_role_and_blocks_choose_together(models):
    found = bits(planned(models("llama"), overrides=[{"role": "down_proj", "layers": "0,-1", "bits": 8}]))
    eights = {name for name, width in found.items() if width == 8}
    assert eights == {"model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    assert set(found.values()) == {4, 8}


def test_the_first_exception_that_holds_counts(models):
    overrides = [{"layers": "0", "bits": 8}, {"role": "down_proj", "bits": 2}]
    found = bits(planned(models("llama"), overrides=overrides))
    assert found["model.layers.0.mlp.down_proj"] == 8
    assert found["model.layers.1.mlp.down_proj"] == 2
    assert found["model.layers.1.mlp.up_proj"] == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "falcon", "phi3", "mixtral"])
def test_every_architecture_has_an_attention_output_and_a_down_projection(models, name):
    entries = planned(models(name))
    for role in ("attn_output", "down_proj"):
        hits = [n for n, e in entries.items() if role in role_of(n, e.unit.role)]
        assert len(hits) in (3, 3 * 4), (name, role, hits)  # three blocks, four experts


def test_another_scheme_takes_nothing_over_from_the_recipe(models):
    overrides = [{"role": "down_proj", "scheme": "float8"}]
    entries = planned(models("llama"), bits=3, overrides=overrides, layout="native")
    down = entries["model.layers.0.mlp.down_proj"].scheme
    assert down.kind == "float8"
    assert entries["model.layers.0.mlp.up_proj"].scheme.bits == 3


@pytest.mark.parametrize(
    "overrides",
    [[{"role": "attn_v", "bits": 8}], [{"pattern": "*.q_proj", "keep": True}], [{"role": "up_proj", "bits": 8}]],
)
def test_parts_of_a_fused_layer_that_would_differ_are_refused(models, overrides):
    with pytest.raises(PlanError, match="fuse"):
        planned(models("llama"), overrides=overrides)
    assert planned(models("llama"), overrides=overrides, layout="native")


def test_an_exception_that_no_layer_meets_is_refused(models):
    with pytest.raises(PlanError, match=r"layers 7.*matches no layer"):
        planned(models("llama"), overrides=[{"layers": "7", "bits": 8}])


def test_asking_for_what_a_scheme_does_not_have_is_refused(models):
    with pytest.raises(PlanError, match="no bits to choose"):
        planned(models("llama"), scheme="float8", bits=4, group_size=None, layout="native")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"overrides": [{"role": "attn_w"}]}, "role 'attn_w' is unknown"),
        ({"overrides": [{"layers": "first"}]}, "layers 'first'"),
        ({"transforms": ["magic"]}, "transform 'magic' is unknown"),
        ({"method": "awq"}, "awq is a transform"),
        ({"inputs": "int7-token"}, "int7-token"),
        ({"inputs": {"strategy": "token", "dynamic": False}}, "cannot be static"),
        ({"inputs": {"colour": "red"}}, "no option 'colour'"),
        ({"inputs": "int8-tensor-static", "input_range": "magic"}, "range 'magic' is unknown"),
    ],
)
def test_wrong_choices_are_refused_by_name(fields, words):
    with pytest.raises((InputError, PlanError), match=words):
        make_recipe(fields)


def test_blocks_count_from_either_end():
    assert block_numbers("0-2,-1", 8) == {0, 1, 2, 7}
    assert block_numbers("-3--1", 8) == {5, 6, 7}


def test_a_preset_is_a_recipe_by_name():
    from bitwright import catalog
    from bitwright.engine.recipe import load_recipe

    for name in catalog.names("presets"):
        load_recipe(name)
    with pytest.raises(InputError, match="preset 'w3a3' is unknown"):
        load_recipe("w3a3")
