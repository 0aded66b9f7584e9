"""int8 and small floats in compressed-tensors files: tensors by hand, the library's compressors, and the configs of its presets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.layouts.compressed_tensors import CompressedTensors
from bitwright.schemes.affine import Affine
from bitwright.schemes.float8 import Float8
from bitwright.schemes.microscaling import Microscaling

NAME = "model.layers.0.mlp.up_proj"
LAYOUT = CompressedTensors()
FP8_TOKEN = InputScheme(number="float")
FP8_STATIC = InputScheme(number="float", strategy="tensor", dynamic=False)
INT8_STATIC = InputScheme(strategy="tensor", dynamic=False)
MX = {"strategy": "group", "group_size": 32, "power_of_two": True}
NVFP4 = InputScheme(bits=4, number="float", strategy="tensor_group", group_size=16, dynamic=False)

#: format, scheme, and the library's preset of the same numbers
KINDS: dict[str, tuple[str, Scheme, str | None]] = {
    "W8A8": (
        "int-quantized",
        Affine(bits=8, granularity="channel", scale_dtype="float32", inputs=InputScheme()),
        "W8A8",
    ),
    "W8A8-static": (
        "int-quantized",
        Affine(bits=8, granularity="tensor", scale_dtype="float32", inputs=INT8_STATIC),
        None,
    ),
    "W8-asym": ("int-quantized", Affine(bits=8, granularity="tensor", scale_dtype="float32", symmetric=False), None),
    "W4A8": ("pack-quantized", Affine(scale_dtype="float32", inputs=InputScheme()), "W4A8"),
    "W4AFP8": ("pack-quantized", Affine(scale_dtype="float32", inputs=FP8_TOKEN), "W4AFP8"),
    "FP8": ("float-quantized", Float8(granularity="tensor", inputs=FP8_STATIC), "FP8"),
    "FP8_DYNAMIC": ("float-quantized", Float8(inputs=FP8_TOKEN), "FP8_DYNAMIC"),
    "FP8_BLOCK": (
        "float-quantized",
        Float8(granularity="block", inputs=InputScheme(number="float", strategy="group", group_size=128)),
        "FP8_BLOCK",
    ),
    "NVFP4": ("nvfp4-pack-quantized", Microscaling(element="nvfp4", inputs=NVFP4), "NVFP4"),
    "NVFP4A16": ("nvfp4-pack-quantized", Microscaling(element="nvfp4"), "NVFP4A16"),
    "MXFP4": ("mxfp4-pack-quantized", Microscaling(inputs=InputScheme(bits=4, number="float", **MX)), "MXFP4"),
    "MXFP4A16": ("mxfp4-pack-quantized", Microscaling(), "MXFP4A16"),
    "MXFP8": ("mxfp8-quantized", Microscaling(element="mxfp8", inputs=InputScheme(number="float", **MX)), "MXFP8"),
    "MXFP8A16": ("mxfp8-quantized", Microscaling(element="mxfp8"), "MXFP8A16"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def specs_of(tensors):
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def weight(shape=(128, 256), seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.003


def quantized(scheme: Scheme, shape=(128, 256)) -> QuantizedTensor:
    w = weight(shape)
    params, codes = scheme.quantize(w, context=scheme.prepare([w]))
    inputs = scheme.inputs.fit(-2.0, 5.0) if scheme.inputs is not None else {}
    return QuantizedTensor(scheme, shape, codes, params, inputs=inputs)


def parsed(scheme: Scheme, **meta: Any):
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(json.loads(json.dumps(LAYOUT.config({NAME: scheme}, ["lm_head"], meta))))


@kinds
def test_the_library_decompresses_the_same_weight(kind):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    form, scheme, _ = KINDS[kind]
    q = quantized(scheme)
    config = parsed(scheme)
    assert config.format == form
    stored = {name.removeprefix(f"{NAME}."): value for name, value in LAYOUT.pack(NAME, q).items()}
    compressor = BaseCompressor.get_value_from_registry(form)
    theirs = compressor.decompress(stored, config.config_groups["group_0"])["weight"]
    # bfloat16 is what MX and NVFP4 weights become; the rest keeps the dtype of the scale.
    assert torch.equal(theirs, q.decode().to(theirs.dtype))
    assert theirs.dtype == (torch.bfloat16 if isinstance(scheme, Microscaling) else torch.float32)


@kinds
def test_the_library_compresses_into_the_same_tensors(kind):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    form, scheme, _ = KINDS[kind]
    q = quantized(scheme)
    ours = {name.removeprefix(f"{NAME}."): value for name, value in LAYOUT.pack(NAME, q).items()}
    step = q.params["scale"].float()
    if isinstance(scheme, Microscaling):
        step = (
            q.params["scale"].view(torch.float8_e4m3fn if scheme.element == "nvfp4" else torch.float8_e8m0fnu).float()
        )
    # Integers are rounded after the zero point was added, which may turn a tie; floats are rounded as they are.
    original = q.decode() if isinstance(scheme, Affine) else weight()
    state = {"weight": original, "weight_scale": step.view(1) if step.shape == (1, 1) else step}
    if "zero" in q.params:
        state["weight_zero_point"] = (q.params["zero"].to(torch.int16) - 128).to(torch.int8).view(1)
    if "global_scale" in q.params:
        state["weight_global_scale"] = q.params["global_scale"].view(1)
    theirs = BaseCompressor.get_value_from_registry(form).compress(state, parsed(scheme).config_groups["group_0"])
    weights = {name: value for name, value in ours.items() if not name.startswith("input")}
    assert set(theirs) == set(weights)
    for name, value in weights.items():
        assert (theirs[name].dtype, theirs[name].shape) == (value.dtype, value.shape), name
        raw = [part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part for part in (theirs[name], value)]
        assert torch.equal(*raw), name


@kinds
def test_the_config_says_what_the_preset_says(kind):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import preset_name_to_scheme

    _, scheme, preset = KINDS[kind]
    config = parsed(scheme)
    assert config.quantization_status.value == "compressed"
    group = config.config_groups["group_0"]
    if preset is None:
        return
    wanted = preset_name_to_scheme(preset, ["Linear"])
    fields = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "scale_dtype")
    for ours, theirs in ((group.weights, wanted.weights), (group.input_activations, wanted.input_activations)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert {key: getattr(ours, key) for key in fields} == {key: getattr(theirs, key) for key in fields}


@kinds
def test_the_library_takes_the_format_that_is_stored(kind):
    """Its loader infers a group's format from the numbers where the group does not name one."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.format import infer_module_format

    form, scheme, _ = KINDS[kind]
    group = parsed(scheme).config_groups["group_0"]
    assert str(group.format or infer_module_format(torch.nn.Linear, group).value) == form


def test_int8_tensors_by_hand():
    codes = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    scheme = Affine(bits=8, granularity="tensor", scale_dtype="bfloat16", symmetric=False, inputs=InputScheme())
    params = {"scale": torch.full((1, 1), 0.5).bfloat16(), "zero": torch.full((1, 1), 130, dtype=torch.uint8)}
    stored = LAYOUT.pack(NAME, QuantizedTensor(scheme, (1, 4), codes, params))
    assert stored[f"{NAME}.weight"].tolist() == [[-128, -1, 0, 127]]
    assert stored[f"{NAME}.weight_zero_point"].tolist() == [2]
    assert stored[f"{NAME}.weight_scale"].tolist() == [0.5]


def test_fp4_tensors_by_hand():
    codes = torch.tensor([[0, 1, 2, 3, 15, 14, 13, 12] * 2], dtype=torch.uint8)
    params = {
        "scale": torch.tensor([[1.5]]).to(torch.float8_e4m3fn).view(torch.uint8),
        "global_scale": torch.tensor([[448.0]]),
    }
    inputs = {"input_scale": torch.tensor([0.25])}
    q = QuantizedTensor(Microscaling(element="nvfp4", inputs=NVFP4), (1, 16), codes, params, inputs=inputs)
    stored = LAYOUT.pack(NAME, q)
    assert [hex(byte) for byte in stored[f"{NAME}.weight_packed"][0, :4].tolist()] == ["0x10", "0x32", "0xef", "0xcd"]
    assert stored[f"{NAME}.weight_scale"].float().tolist() == [[1.5]]
    assert stored[f"{NAME}.weight_global_scale"].tolist() == [448.0]
    assert stored[f"{NAME}.input_global_scale"].tolist() == [4.0]  # the divisor
    assert q.decode()[0, :4].tolist() == [0.0, *(float(torch.tensor(x) * (1.5 / 448)) for x in (0.5, 1.0, 1.5))]


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_inputs_by_hand(symmetric):
    inputs = InputScheme(strategy="tensor", dynamic=False, symmetric=symmetric)
    q = quantized(Affine(bits=8, granularity="channel", inputs=inputs))
    stored = LAYOUT.pack(NAME, q)
    scale = stored[f"{NAME}.input_scale"]
    assert (scale.dtype, scale.shape) == (torch.float32, (1,))
    assert float(scale) == pytest.approx(5 / 127 if symmetric else 7 / 255)
    assert (f"{NAME}.input_zero_point" in stored) is (not symmetric)
    if not symmetric:
        zero = stored[f"{NAME}.input_zero_point"]
        assert (zero.dtype, zero.tolist()) == (torch.int8, [round(-128 + 2 / (7 / 255))])


def test_input_scales_in_the_dtype_of_the_model_are_read():
    q = quantized(Float8(granularity="tensor", inputs=FP8_STATIC))
    stored = LAYOUT.pack(NAME, q)
    stored[f"{NAME}.input_scale"] = torch.tensor(0.5, dtype=torch.bfloat16)
    stored[f"{NAME}.weight_scale"] = stored[f"{NAME}.weight_scale"].view(())
    back = LAYOUT.unpack(NAME, q.scheme, q.shape, stored)
    assert back.inputs["input_scale"].tolist() == [0.5]
    assert torch.equal(back.decode(), q.decode())
    with pytest.raises(InputError, match="input_scale"):
        LAYOUT.unpack(NAME, q.scheme, q.shape, {n: t for n, t in stored.items() if not n.endswith("input_scale")})


def test_formats_are_named_by_group_where_they_differ():
    entries: dict[str, Scheme] = {f"model.layers.{i}.mlp.up_proj": Float8(inputs=FP8_TOKEN) for i in range(3)}
    entries["model.layers.0.mlp.down_proj"] = Microscaling(element="nvfp4")
    config = LAYOUT.config(entries, ["lm_head"], {})
    assert config["format"] == "mixed-precision"
    groups = [(g["targets"], g["format"], g["input_activations"] is None) for g in config["config_groups"].values()]
    assert groups == [
        (["Linear"], "float-quantized", False),
        (["model.layers.0.mlp.down_proj"], "nvfp4-pack-quantized", True),
    ]
    stored = {name: t for module, s in entries.items() for name, t in LAYOUT.pack(module, quantized(s)).items()}
    found = LAYOUT.read_config(json.loads(json.dumps(config)), torch.bfloat16, specs_of(stored), stored.__getitem__)
    assert found == {module: (scheme, (128, 256)) for module, scheme in entries.items()}


def test_weight_only_bytes_are_read_and_written_as_bytes():
    """Other writers store 8-bit weights without quantized inputs as int-quantized; the layout is told by their config."""
    q = quantized(Affine(bits=8, granularity="channel", scale_dtype="bfloat16"))
    writer = CompressedTensors(int8_bytes=True)
    stored = writer.pack(NAME, q)
    assert stored[f"{NAME}.weight"].dtype == torch.int8
    config = writer.config({NAME: q.scheme}, ["lm_head"], {})
    assert config["format"] == "int-quantized"
    reader = CompressedTensors.from_config(json.loads(json.dumps(config)))
    assert reader == writer
    assert reader.tensors(NAME, q.scheme, q.shape) == tuple(specs_of(stored).values())
    [(module, (scheme, shape))] = reader.read_config(config, torch.bfloat16, specs_of(stored)).items()
    assert reader.unpack(module, scheme, shape, stored).equals(q)
    assert "quantized inputs alone" in (writer.loads_in(q.scheme, "llama")["vllm"] or "")
    assert CompressedTensors.from_config(LAYOUT.config({NAME: q.scheme}, [], {})) == LAYOUT


def test_a_kv_cache_goes_into_the_config():
    pytest.importorskip("compressed_tensors")
    cache = InputScheme(number="float", strategy="tensor", dynamic=False)
    found = parsed(Float8(inputs=FP8_TOKEN), kv_cache=cache).kv_cache_scheme
    assert (found.num_bits, found.type, found.strategy, found.dynamic, found.symmetric) == (
        8,
        "float",
        "tensor",
        False,
        True,
    )
    for other in (INT8_STATIC, FP8_TOKEN, InputScheme(number="float", strategy="group", group_size=32)):
        assert "float8 per tensor alone" in (LAYOUT.accepts_kv_cache(other) or "")


@pytest.mark.parametrize(
    ("scheme", "shape", "match"),
    [
        (Float8(element="e5m2"), (8, 128), "e5m2"),
        (Float8(inputs=InputScheme()), (8, 128), "float8 inputs"),
        (Float8(inputs=InputScheme(number="float", strategy="tensor")), (8, 128), "float8 inputs"),
        (Float8(granularity="block", inputs=FP8_TOKEN), (8, 128), "groups of 128"),
        (Float8(granularity="block", inputs=FP8_STATIC), (8, 128), "groups of 128"),
        (Microscaling(element="nvfp4", inputs=FP8_TOKEN), (8, 128), "nvfp4"),
        (Microscaling(element="mxfp8", inputs=FP8_TOKEN), (8, 128), "mxfp8"),
        (Microscaling(inputs=InputScheme()), (8, 128), "mxfp4"),
        (Microscaling(), (8, 48), "48"),
        (Float8(), (0, 128), "empty"),
    ],
)
def test_what_it_cannot_store_is_refused_with_a_reason(scheme, shape, match):
    assert match in (LAYOUT.accepts(scheme, shape) or "")


@pytest.mark.parametrize(
    ("weights", "inputs", "match"),
    [
        ({"type": "float", "num_bits": 8, "strategy": "group", "group_size": 64}, None, "float group"),
        ({"type": "int", "num_bits": 8, "strategy": "channel"}, None, "int channel"),
        ({"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": False}, None, "float channel"),
        ({"type": "float", "num_bits": 8, "strategy": "channel"}, {"num_bits": 4, "type": "int"}, "4 bits"),
        ({"type": "float", "num_bits": 8, "strategy": "channel"}, {"strategy": "attn_head"}, "attn_head"),
        ({"type": "float", "num_bits": 8, "strategy": "channel"}, ["x"], "input_activations"),
    ],
)
def test_float8_weights_that_mean_something_else_are_refused(weights, inputs, match):
    stored = LAYOUT.pack(NAME, quantized(Float8()))
    config = LAYOUT.config({NAME: Float8()}, [], {})
    config["config_groups"]["group_0"] |= {"weights": weights, "input_activations": inputs}
    with pytest.raises(InputError, match=match):
        LAYOUT.read_config(config, torch.bfloat16, specs_of(stored))


def test_who_loads_what():
    for _, scheme, _ in KINDS.values():
        words = LAYOUT.loads_in(scheme, "llama")
        assert words["bitwright"] is None
        assert words["transformers"] is None
    assert LAYOUT.loads_in(Float8(), "llama")["vllm"] is None
    assert "9.0" in (LAYOUT.loads_in(KINDS["W4AFP8"][1], "llama")["vllm"] or "")
    assert "symmetric" in (
        LAYOUT.loads_in(Affine(bits=8, granularity="channel", symmetric=False, inputs=InputScheme()), "llama")["vllm"]
        or ""
    )
    assert "128x128" in (LAYOUT.loads_in(Float8(granularity="block", block=(64, 64)), "llama")["vllm"] or "")
    # Zero points in bytes are read in place; only packed ones need dequantize=True.
    mixed = {"a": KINDS["W8-asym"][1], "b": Float8()}
    assert LAYOUT.loads_together(mixed, [])["transformers"] is None
    assert "first group" in (
        LAYOUT.loads_together({"a": Affine(symmetric=False), "b": Float8()}, [])["transformers"] or ""
    )
