"""Which layout a config names: derived from what the layout classes state."""

from pathlib import Path

import pytest

from bitwright import catalog
from bitwright.errors import InputError
from bitwright.runtime.checkpoint import find_layout

PATH = Path("model")


@pytest.mark.parametrize("name", catalog.names("layouts"))
def test_every_layout_is_found_by_the_method_that_it_states(name):
    plugin = catalog.load("layouts", name)
    config = {"quantization_config": {"quant_method": plugin.quant_method.upper(), "load_in_8bit": True}}
    assert type(find_layout(config, PATH)[0]) is plugin


def test_methods_are_stated_once():
    methods = [catalog.load("layouts", name).quant_method for name in catalog.names("layouts")]
    assert len(set(methods)) == len(methods)


@pytest.mark.parametrize(
    ("method", "layout"),
    [("awq", "awq"), ("gptq", "gptq"), ("compressed-tensors", "compressed-tensors"), ("bitwright", "native")],
)
def test_names_in_the_field_mean_these_layouts(method, layout):
    config = {"text_config": {"quantization_config": {"quant_method": method}}}
    assert find_layout(config, PATH)[0].name == layout


def test_other_methods_are_refused_with_those_that_can_be_read():
    with pytest.raises(InputError, match="quant_method 'quip' cannot be read") as found:
        find_layout({"quantization_config": {"quant_method": "quip"}}, PATH)
    assert "awq" in found.value.mend
    assert "bitwright" in found.value.mend
    with pytest.raises(InputError, match="no quantization_config"):
        find_layout({}, PATH)
