"""Checkpoints of every format of small floats and int8, loaded by transformers: the weights are those decoded by hand."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.core.inputs import InputScheme
from bitwright.core.layout import Layout
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.layouts.compressed_tensors import CompressedTensors
from bitwright.layouts.fp8 import Fp8
from bitwright.schemes.affine import Affine
from bitwright.schemes.float8 import Float8
from bitwright.schemes.microscaling import Microscaling

FP8_TOKEN = InputScheme(number="float")
FP8_STATIC = InputScheme(number="float", strategy="tensor", dynamic=False)
FP8_GROUPS = InputScheme(number="float", strategy="group", group_size=128)
INT8_STATIC = InputScheme(strategy="tensor", dynamic=False)
MX = {"strategy": "group", "group_size": 32, "power_of_two": True}
NVFP4 = InputScheme(bits=4, number="float", strategy="tensor_group", group_size=16, dynamic=False)

SCHEMES: dict[str, Scheme] = {
    "int8-channel-token": Affine(bits=8, granularity="channel", inputs=InputScheme()),
    "int8-tensor-token": Affine(bits=8, granularity="tensor", inputs=InputScheme(symmetric=False)),
    "int8-channel-static": Affine(bits=8, granularity="channel", inputs=INT8_STATIC),
    "int8-static-asym": Affine(
        bits=8, granularity="channel", inputs=InputScheme(strategy="tensor", dynamic=False, symmetric=False)
    ),
    "int8-asym": Affine(bits=8, granularity="channel", symmetric=False, inputs=InputScheme()),
    "int8-tensor": Affine(bits=8, granularity="tensor"),
    "w4a8": Affine(group_size=32, inputs=InputScheme()),
    "w4a8-fp8": Affine(group_size=32, inputs=FP8_TOKEN),
    "fp8-channel": Float8(inputs=FP8_TOKEN),
    "fp8-static": Float8(granularity="tensor", inputs=FP8_STATIC),
    "fp8-block": Float8(granularity="block", inputs=FP8_GROUPS),
    "fp8-a16": Float8(granularity="block"),
    "nvfp4": Microscaling(element="nvfp4", inputs=NVFP4),
    "nvfp4-a16": Microscaling(element="nvfp4"),
    "mxfp4": Microscaling(inputs=InputScheme(bits=4, number="float", **MX)),
    "mxfp4-a16": Microscaling(),
    "mxfp4-a8": Microscaling(inputs=FP8_GROUPS),
    "mxfp8": Microscaling(element="mxfp8", inputs=InputScheme(number="float", **MX)),
    "mxfp8-a16": Microscaling(element="mxfp8"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bfloat16 Llama of one block whose linears are 128 or 256 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=64, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def write(source, folder, layout: Layout, schemes: dict[str, Scheme], kv: InputScheme | None = None):
    """A checkpoint with these schemes by module name. Returns the quantized tensors."""
    tensors = load_file(source / "model.safetensors")
    stored, quantized = dict(tensors), {}
    for name, scheme in schemes.items():
        w = stored.pop(f"{name}.weight").float()
        params, codes = scheme.quantize(w, context=scheme.prepare([w]))
        inputs = scheme.inputs.fit(-1.0, 6.0) if scheme.inputs is not None else {}
        quantized[name] = QuantizedTensor(scheme, tuple(w.shape), codes, params, inputs=inputs)
        stored |= layout.pack(name, quantized[name])
    if kv is not None:
        for spec in layout.kv_cache_tensors("model.layers.0.self_attn", kv):
            stored[spec.name] = torch.full(spec.shape, 0.03, dtype=spec.dtype)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["lm_head", *(name for name in linears(tensors) if name not in schemes)]
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = layout.config(schemes, kept, {"kv_cache": kv} if kv else {})
    (folder / "config.json").write_text(json.dumps(config))
    return quantized


def load(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = model(torch.arange(16)[None], use_cache=False).logits  # also decodes a compressed model
    assert logits.isfinite().all()
    return model


def unequal(model, quantized: dict[str, QuantizedTensor]) -> list[str]:
    state = model.state_dict()
    return [name for name, q in quantized.items() if not torch.equal(state[f"{name}.weight"], expected(q))]


def expected(q: QuantizedTensor) -> torch.Tensor:
    return q.decode().to(torch.bfloat16)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_files_decode_to_the_same_weights(name, model, tmp_path):
    pytest.importorskip("compressed_tensors")
    layout = CompressedTensors()
    scheme = SCHEMES[name].limit(layout.limits(torch.bfloat16))
    quantized = write(
        model, tmp_path / "out", layout, dict.fromkeys(linears(load_file(model / "model.safetensors")), scheme)
    )
    loaded = load(tmp_path / "out")
    assert unequal(loaded, quantized) == []
    module = loaded.model.layers[0].mlp.down_proj
    assert module.quantization_scheme.weights is not None
    q = quantized["model.layers.0.mlp.down_proj"]
    if "input_scale" in q.inputs:
        static = getattr(module, "input_global_scale", None)
        found = 1 / static if static is not None else module.input_scale
        torch.testing.assert_close(found.float(), q.inputs["input_scale"], rtol=2**-8, atol=0)
    if "input_zero" in q.inputs:
        assert torch.equal(module.input_zero_point, q.inputs["input_zero"])


def test_groups_of_different_formats_load_together(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    layout = CompressedTensors()
    chosen = {
        "q_proj": "fp8-channel", "k_proj": "fp8-channel", "v_proj": "fp8-channel", "o_proj": "nvfp4-a16", "gate_proj": "w4a8",
        "up_proj": "w4a8", "down_proj": "int8-channel-token",
    }  # fmt: skip
    names = linears(load_file(model / "model.safetensors"))
    schemes = {name: SCHEMES[chosen[name.rpartition(".")[2]]].limit(layout.limits(torch.bfloat16)) for name in names}
    quantized = write(model, tmp_path / "out", layout, schemes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert unequal(load(tmp_path / "out"), quantized) == []


def test_a_module_left_out_keeps_its_weight(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    layout, scheme = CompressedTensors(), SCHEMES["fp8-channel"].limit(CompressedTensors().limits(torch.bfloat16))
    tensors = load_file(model / "model.safetensors")
    write(model, tmp_path / "out", layout, {n: scheme for n in linears(tensors) if not n.endswith("down_proj")})
    state = load(tmp_path / "out").state_dict()
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(state[down], tensors[down])


def test_scales_of_a_kv_cache_arrive(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    layout, scheme = CompressedTensors(), SCHEMES["fp8-channel"].limit(CompressedTensors().limits(torch.bfloat16))
    cache = InputScheme(number="float", strategy="tensor", dynamic=False)
    assert layout.accepts_kv_cache(cache) is None
    assert "int8" in (layout.accepts_kv_cache(InputScheme(strategy="tensor", dynamic=False)) or "")
    names = linears(load_file(model / "model.safetensors"))
    quantized = write(model, tmp_path / "out", layout, dict.fromkeys(names, scheme), cache)
    loaded = load(tmp_path / "out")
    assert unequal(loaded, quantized) == []
    attention = loaded.model.layers[0].self_attn
    for part in (attention.k_scale, attention.v_scale):
        assert part.flatten().tolist() == [float(torch.tensor(0.03).to(torch.bfloat16))]


def test_fine_grained_fp8_files_decode_to_the_same_weights(model, tmp_path):
    layout = Fp8()
    scheme = Float8(granularity="block", inputs=FP8_GROUPS)
    tensors = load_file(model / "model.safetensors")
    names = [name for name in linears(tensors) if not name.endswith("v_proj")]
    assert all(layout.accepts(scheme, tuple(tensors[f"{name}.weight"].shape)) is None for name in names)
    quantized = write(model, tmp_path / "out", layout, dict.fromkeys(names, scheme))
    loaded = load(tmp_path / "out")
    assert unequal(loaded, quantized) == []
    kept = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(loaded.state_dict()[kept], tensors[kept])
    assert not torch.equal(loaded.state_dict()[f"{names[0]}.weight"], tensors[f"{names[0]}.weight"])
