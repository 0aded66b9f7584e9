"""Fine-grained FP8 files against the formula, and per-tensor files of other writers."""

from __future__ import annotations

import json

import pytest
import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError
from bitwright.layouts.fp8 import Fp8
from bitwright.schemes.affine import Affine
from bitwright.schemes.float8 import Float8

NAME = "model.layers.0.mlp.up_proj"
LAYOUT = Fp8()
INPUTS = InputScheme(number="float", strategy="group", group_size=128)
SCHEME = Float8(granularity="block", inputs=INPUTS)
SCALE = f"{NAME}.weight_scale_inv"


def specs_of(tensors):
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def quantized(shape=(256, 384)) -> QuantizedTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    params, codes = SCHEME.quantize(w)
    return QuantizedTensor(SCHEME, shape, codes, params)


def test_stored_tensors_follow_the_formula():
    q = quantized()
    stored = LAYOUT.pack(NAME, q)
    weight, scale = stored[f"{NAME}.weight"], stored[SCALE]
    assert set(stored) == {f"{NAME}.weight", SCALE}
    assert (weight.dtype, weight.shape) == (torch.float8_e4m3fn, (256, 384))
    assert (scale.dtype, scale.shape) == (torch.float32, (2, 3))
    for o, i in ((0, 0), (127, 128), (128, 127), (255, 383)):
        assert float(weight[o, i]) * float(scale[o // 128, i // 128]) == pytest.approx(
            float(q.decode()[o, i]), rel=1e-6
        )


def test_the_config_is_that_of_published_files():
    config = LAYOUT.config({NAME: SCHEME}, ["lm_head", "model.layers.0.mlp.gate", "lm_head"], {})
    assert config == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }


def test_transformers_understands_the_config():
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(**LAYOUT.config({NAME: SCHEME}, ["lm_head", "model.layers.1.mlp.gate"], {}))
    assert list(config.weight_block_size) == [128, 128]
    kept = config.modules_to_not_convert
    names = ("lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate")
    assert [should_convert_module(name, kept) for name in names] == [False, False, True, True]


@pytest.mark.parametrize(
    ("scheme", "shape", "match"),
    [
        (Affine(), (256, 256), "int4"),
        (Float8(granularity="block", element="e5m2", inputs=INPUTS), (256, 256), "e5m2"),
        (Float8(granularity="channel"), (256, 256), "compressed-tensors"),
        (Float8(granularity="block", block=(64, 64)), (256, 256), "128x128"),
        (Float8(granularity="block", scale_dtype="bfloat16", inputs=INPUTS), (256, 256), "float32"),
        (Float8(granularity="block"), (256, 256), "fp8 group 128"),
        (SCHEME, (300, 256), "out_features 300"),
        (SCHEME, (256, 192), "keep this layer"),
        (SCHEME, (0, 256), "out_features 0"),
    ],
)
def test_what_it_cannot_store_is_refused_with_a_reason(scheme, shape, match):
    assert match in (LAYOUT.accepts(scheme, shape) or "")


def test_scales_are_float32():
    assert LAYOUT.limits(torch.bfloat16) == Limits(scale_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [[128, 128], [64, 32]])
def test_block_files_of_other_writers_decode(dtype, block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 96, generator=generator).to(torch.float8_e4m3fn)
    down, across = -(-200 // block[0]), -(-96 // block[1])
    scale = torch.exp2(torch.randint(-9, 0, (down, across), generator=generator).float()).to(dtype)
    stored = {f"{NAME}.weight": weight, SCALE: scale, "model.norm.weight": torch.ones(4)}
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    layout = Fp8.from_config(config)
    found = layout.read_config(config, torch.bfloat16, specs_of(stored))
    assert list(found) == [NAME]
    whole = scale.float().repeat_interleave(block[0], 0)[:200].repeat_interleave(block[1], 1)[:, :96]
    q = layout.unpack(NAME, *found[NAME], stored)
    torch.testing.assert_close(q.decode(), weight.float() * whole, rtol=0, atol=0)
    assert q.scheme.inputs == InputScheme(number="float", strategy="group", group_size=block[1])


def test_blocks_are_128_wide_where_the_config_is_silent():
    stored = LAYOUT.pack(NAME, quantized())
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert LAYOUT.read_config(config, torch.bfloat16, specs_of(stored)) == {NAME: (SCHEME, (256, 384))}


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("writer", ["vllm", "transformers"])
def test_per_tensor_files_of_other_writers_decode(writer, static, shape):
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    names = {"vllm": ("weight_scale", "input_scale"), "transformers": ("weight_scale_inv", "activation_scale")}[writer]
    stored = {f"{NAME}.weight": weight, f"{NAME}.{names[0]}": torch.full(shape, 0.25)}
    if static:
        stored[f"{NAME}.{names[1]}"] = torch.full(shape, 0.5)
    config = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
    if writer == "transformers":
        config["weight_block_size"] = None
    layout = Fp8.from_config(json.loads(json.dumps(config)))
    scheme, found_shape = layout.read_config(config, torch.bfloat16, specs_of(stored))[NAME]
    assert {spec.name for spec in layout.tensors(NAME, scheme, found_shape)} == set(stored)
    q = layout.unpack(NAME, scheme, found_shape, stored)
    assert torch.equal(q.decode(), weight.float() * 0.25)
    assert {name: value.tolist() for name, value in q.inputs.items()} == ({"input_scale": [0.5]} if static else {})
    other = {"vllm": "transformers", "transformers": "vllm"}[writer]
    assert writer in (layout.loads_in(scheme, "llama")[other] or "")
    with pytest.raises(PlanError, match="cannot store"):
        layout.pack(NAME, q)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fmt": "e5m2"}, "e5m2"),
        ({"expert_dtype": "fp4"}, "fp4"),
        ({"activation_scheme": "magic"}, "magic"),
        ({"activation_scheme": "static"}, "static"),
        ({"weight_block_size": [128]}, r"\[128\]"),
    ],
)
def test_configs_that_mean_something_else_are_refused(change, match):
    stored = LAYOUT.pack(NAME, quantized())
    config = LAYOUT.config({NAME: SCHEME}, ["lm_head"], {}) | change
    with pytest.raises(InputError, match=match):
        LAYOUT.read_config(config, torch.bfloat16, specs_of(stored))


def test_float8_tensors_without_their_scale_are_refused():
    stored = LAYOUT.pack(NAME, quantized())
    del stored[SCALE]
    with pytest.raises(InputError, match="weight_scale"):
        LAYOUT.read_config(LAYOUT.config({NAME: SCHEME}, [], {}), torch.bfloat16, specs_of(stored))


def test_who_loads_what():
    words = LAYOUT.loads_in(SCHEME, "llama")
    assert (words["vllm"], words["transformers"], words["bitwright"]) == (None, None, None)
    assert "Conv1D" in (LAYOUT.loads_in(SCHEME, "gpt2")["transformers"] or "")
    assert "head" in (LAYOUT.loads_together({"lm_head": SCHEME, NAME: SCHEME}, ["a"])["vllm"] or "")
    assert LAYOUT.loads_together({NAME: SCHEME}, ["lm_head"])["vllm"] is None
