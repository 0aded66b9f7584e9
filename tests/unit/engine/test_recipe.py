"""Recipes: unknown keys are refused by name, flags come on top of the file."""

import json

import pytest

from bitwright.cli.options import build_recipe, parse_bytes
from bitwright.engine.recipe import Recipe, load_recipe, make_recipe
from bitwright.errors import InputError


def test_unknown_keys_are_refused_by_name(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("bits: 4\nbitz: 3\ncalibration: {samplez: 3}\noverrides: [{pattern: a, bitts: 3}]\n")
    with pytest.raises(InputError) as caught:
        load_recipe(file)
    for name in ("bitz", "calibration.samplez", "overrides.0.bitts"):
        assert name in caught.value.message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": "four"}, "bits"),
        ({"method": "magic"}, "method 'magic' is unknown"),
        ({"layout": "magic"}, "layout 'magic' is unknown"),
        ({"scheme": "magic"}, "scheme 'magic' is unknown"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"method": "gptq", "method_options": {"dampening": 0.1}}, "no option 'dampening'"),
        ({"method": "gptq", "method_options": {"damping": "much"}}, "'damping'"),
        ({"method": "gptq", "method_options": {"act_order": 1}}, "'act_order'"),
        ({"method": "gptq", "method_options": {"damping": 2.0}}, "damping 2.0"),
        ({"group_size": "row"}, "group_size"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
    ],
)
def test_wrong_values_are_refused_by_name(values, words):
    with pytest.raises(InputError, match=words):
        make_recipe(values)


def test_wrong_method_option_lists_the_options():
    from dataclasses import fields

    from bitwright.methods.gptq import Gptq

    with pytest.raises(InputError) as caught:
        make_recipe({"method": "gptq", "method_options": {"dampening": 0.1}})
    for field in fields(Gptq):
        assert field.name in caught.value.mend


def test_flags_come_on_top_of_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("bits: 3\nmethod: rtn\ncalibration: {samples: 7, length: 99}\n")
    made = build_recipe(file, bits=8, samples=5, group_size="channel")
    assert (made.bits, made.method, made.group_size) == (8, "rtn", "channel")
    assert (made.calibration.samples, made.calibration.length) == (5, 99)
    assert build_recipe(file).bits == 3
    assert build_recipe(None) == Recipe()


def test_flags_of_the_command_line_reach_the_recipe(bitwright_cli, llama, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("bits: 3\nmethod: rtn\nlayout: native\ngroup_size: 32\n")
    code, out, _ = bitwright_cli("plan", llama, "--recipe", file, "--bits", "8", "--json")
    assert code == 0
    schemes = {tensor["scheme"] for tensor in json.loads(out)["tensors"] if tensor["scheme"]}
    assert schemes == {"int8 sym g32"}


def test_wrong_method_option_on_the_command_line_exits_2(bitwright_cli, llama):
    code, _, err = bitwright_cli("plan", llama, "--method-option", "dampening=0.1")
    assert code == 2
    assert "dampening" in err
    assert "damping" in err.split("mend:")[1]


@pytest.mark.parametrize("value", [-1, "-1", "channel"])
def test_channel_has_three_spellings(value):
    assert make_recipe({"group_size": value}).group_size == "channel"
    assert make_recipe({"group_size": "64"}).group_size == 64


def test_override_that_matches_nothing_is_refused(bitwright_cli, llama):
    code, _, err = bitwright_cli("plan", llama, "--group-size", "32", "--keep", "*.nonsense")
    assert code == 2
    assert "'*.nonsense' matches no layer" in err


@pytest.mark.parametrize(("text", "value"), [("4GB", 4 * 10**9), ("512MiB", 2**29), ("10", 10), ("1.5 kb", 1500)])
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1XB", "nan", "inf", "1e30"])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="size"):
        parse_bytes(text)
