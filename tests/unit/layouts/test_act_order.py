"""GPTQModel's act-order files: what bitwright reads them to, against the weights that GPTQModel itself decodes them to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests import decoders

from bitwright.core.tensor import TensorSpec
from bitwright.engine.regrid import regrid
from bitwright.errors import PlanError
from bitwright.layouts.awq import Awq
from bitwright.layouts.gptq import Gptq
from bitwright.layouts.native import Native

FILE = Path(__file__).parents[2] / "data" / "act_order.safetensors"
MODULES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}


@pytest.fixture(scope="module")
def stored():
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def weights(stored):
    config, tensors = stored
    layout = Gptq.from_config(config)
    specs = {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()}
    found = layout.read_config(config, torch.float16, specs, tensors.__getitem__)
    return {name: layout.unpack(name, *found[name], tensors) for name in found}


def test_decoded_weights_are_those_of_gptqmodel(stored, weights):
    tensors = stored[1]
    assert {name: q.shape for name, q in weights.items()} == MODULES
    for name, q in weights.items():
        theirs = tensors[f"decoded:{name}"]
        assert theirs.dtype == torch.float16
        assert torch.equal(q.decode().to(torch.float16), theirs)
        assert torch.equal(q.decode(), decoders.gptq(tensors, name))


def test_the_group_index_is_one_that_no_grouping_of_neighbours_gives(weights):
    for q in weights.values():
        runs = q.params["g_idx"].view(-1, 16)
        assert not bool((runs == runs[:, :1]).all())


def test_native_holds_them_and_layouts_without_an_index_refuse(weights):
    for name, q in weights.items():
        native = Native()
        same = regrid(q, native, torch.bfloat16)
        back = native.unpack(name, same.scheme, same.shape, native.pack(name, same))
        assert torch.equal(back.decode(), q.decode())
        with pytest.raises(PlanError, match="act-order"):
            regrid(q, Awq(), torch.bfloat16)
