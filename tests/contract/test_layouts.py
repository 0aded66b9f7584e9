"""What every catalogued layout must do, with every catalogued scheme that it accepts. New files join by themselves."""

from __future__ import annotations

import json

import pytest
import torch

from bitwright import catalog
from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES, Layout
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import BitwrightError, InputError, PlanError

NAME = "model.layers.0.mlp.down_proj"
SHAPES = ((64, 512), (96, 160), (7, 36), (128, 256))
LAYOUTS = {
    "gptq": [{"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}],
}
SCHEMES = {
    "affine": [
        {"bits": bits, "symmetric": symmetric, **where}
        for bits in (2, 3, 4, 5, 6, 8)
        for symmetric in (True, False)
        for where in ({"group_size": 32}, {"group_size": 4}, {"granularity": "channel"}, {"granularity": "tensor"})
    ]
    + [{"symmetric_range": "narrow", "granularity": "channel"}]
    + [
        {"inputs": inputs, **where}
        for inputs in (
            {},
            {"symmetric": False},
            {"strategy": "tensor", "dynamic": False},
            {"strategy": "tensor", "dynamic": False, "symmetric": False},
            {"number": "float"},
            {"threshold": 6.0},
        )
        for where in (
            {"group_size": 32},
            {"granularity": "channel"},
            {"bits": 8, "granularity": "channel"},
            {"bits": 8, "granularity": "tensor"},
        )
    ],
    "float8": [
        {"inputs": inputs, **where}
        for where in (
            {"granularity": "tensor"},
            {"granularity": "channel"},
            {"granularity": "block"},
            {"granularity": "block", "block": (32, 16)},
            {"element": "e5m2"},
        )
        for inputs in (
            None,
            {"number": "float"},
            {"number": "float", "strategy": "tensor", "dynamic": False},
            {"number": "float", "strategy": "group", "group_size": 128},
        )
    ],
    "codebook": [
        {"book": book, "block_size": block, "double_quant": double}
        for book in ("nf4", "fp4", "kmeans")
        for block in (32, 64, 1024)
        for double in (False, True)
    ],
    "absmax-int8": [{}, {"inputs": {}}, {"inputs": {"threshold": 6.0}}, {"inputs": {"number": "float"}}],
    "bilevel": [
        {"outliers": 0.0, "group_size": 4},
        {"outliers": 0.0, "group_size": 32, "bits": 2, "zero_bits": 0, "super_group": 24},
    ],
    "ternary": [{"group_size": 32}, {"granularity": "tensor"}],
    "binary": [{"group_size": 32}, {"granularity": "channel"}],
    "ggml": [
        {"type": kind}
        for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
    ],
    "microscaling": [
        {"element": element, "inputs": inputs}
        for element in ("mxfp4", "mxfp8", "nvfp4")
        for inputs in (
            None,
            {"number": "float"},
            {"number": "float", "strategy": "group", "group_size": 32, "power_of_two": True},
            {"number": "float", "strategy": "group", "group_size": 128},
            {"number": "float", "bits": 4, "strategy": "group", "group_size": 32, "power_of_two": True},
            {"number": "float", "bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": False},
        )
    ],
}


def layouts() -> list[Layout]:
    return [catalog.load("layouts", name)(**o) for name in catalog.names("layouts") for o in LAYOUTS.get(name, [{}])]


def plain_schemes() -> list[Scheme]:
    return [
        catalog.load_scheme({"kind": name, **o}) for name in catalog.names("schemes") for o in SCHEMES.get(name, [{}])
    ]


def quantized(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor | None:
    """None where the scheme cannot be fitted to this shape or at all."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    try:
        scheme.grid(shape)
        params, codes = scheme.quantize(w, context=scheme.prepare([w]))
    except PlanError:
        return None
    # -1 .. 6 give a global scale of NVFP4 inputs whose reciprocal's reciprocal is itself: files hold the reciprocal.
    inputs = scheme.inputs.fit(-1.0, 6.0) if scheme.inputs is not None else {}
    return QuantizedTensor(scheme, shape, codes, params, inputs=inputs)


def storable(layout: Layout, shape: tuple[int, int]) -> Scheme:
    """The first scheme that a layout stores in this shape."""
    limited = [scheme.limit(layout.limits(torch.float16)) for scheme in plain_schemes()]
    return next(scheme for scheme in limited if layout.accepts(scheme, shape) is None and quantized(scheme, shape))


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


every_layout = pytest.mark.parametrize("layout", layouts(), ids=repr)
every_scheme = pytest.mark.parametrize(
    "scheme", plain_schemes(), ids=lambda s: json.dumps(s.to_spec())[1:-1].replace('"', "")
)


@every_layout
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_packed_comes_back(layout, scheme, dtype):
    scheme = scheme.limit(layout.limits(dtype))
    for shape in SHAPES:
        q = quantized(scheme, shape)
        if q is None:
            continue
        reason = layout.accepts(scheme, shape)
        if reason is not None:
            with pytest.raises(PlanError, match="cannot store"):
                layout.pack(NAME, q)
            continue
        before = (q.codes.clone(), {name: p.clone() for name, p in q.params.items()})
        stored = layout.pack(NAME, q)
        assert tuple(specs_of(stored).values()) == layout.tensors(NAME, scheme, shape)
        assert all(t.stride() == torch.empty(t.shape).stride() for t in stored.values())  # writers view it as bytes
        assert all(name.startswith(NAME + ".") for name in stored)
        back = layout.unpack(NAME, scheme, shape, stored)
        assert back.equals(q)
        assert torch.equal(q.codes, before[0])
        assert all(torch.equal(q.params[name], p) for name, p in before[1].items())


@every_layout
@every_scheme
def test_config_and_headers_say_everything(layout, scheme):
    """A reader that has config.json and the tensors finds the same schemes and shapes, and so the same weights."""
    scheme = scheme.limit(layout.limits(torch.bfloat16))
    for shape in SHAPES:
        q = quantized(scheme, shape)
        if q is None or layout.accepts(scheme, shape) is not None:
            continue
        kept = ["lm_head", "model.layers.0.mlp.gate"]
        config = json.loads(json.dumps(layout.config({NAME: scheme}, kept, {"damping": 0.01, "sequential": True})))
        assert config["quant_method"] == layout.quant_method
        stored = layout.pack(NAME, q) | {"model.norm.weight": torch.ones(4)}
        reader = type(layout).from_config(config)
        assert reader == layout
        found = reader.read_config(config, torch.bfloat16, specs_of(stored), stored.__getitem__)
        assert found == {NAME: (scheme, shape)}
        assert reader.unpack(NAME, *found[NAME], stored).equals(q)


@every_layout
def test_mixed_schemes_are_told_apart_by_module(layout):
    load = catalog.load("schemes", "affine")
    mixture = [
        load(bits=4, group_size=32),
        load(bits=8, group_size=64),
        load(bits=4, symmetric=False, granularity="channel"),
    ]
    limited = [scheme.limit(layout.limits(torch.float16)) for scheme in mixture]
    if any(layout.accepts(scheme, (32, 128)) is not None for scheme in limited):
        pytest.skip("it does not store all of these schemes")
    entries: dict[str, Scheme] = {}
    stored: dict[str, torch.Tensor] = {}
    for block in range(12):
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            if block == 1 and leaf == "mlp.down_proj":
                continue
            scheme = mixture[1] if block in (0, 11) else mixture[2] if leaf == "mlp.down_proj" else mixture[0]
            scheme = scheme.limit(layout.limits(torch.float16))
            name = f"model.layers.{block}.{leaf}"
            entries[name] = scheme
            q = quantized(scheme, (32, 128), seed=block)
            assert q is not None
            stored |= layout.pack(name, q)
    kept = ["lm_head", "model.layers.1.mlp.down_proj"]
    config = json.loads(json.dumps(layout.config(entries, kept, {})))
    found = layout.read_config(config, torch.float16, specs_of(stored), stored.__getitem__)
    assert found == {name: (scheme, (32, 128)) for name, scheme in entries.items()}


@every_layout
@every_scheme
def test_there_is_a_word_about_every_engine(layout, scheme):
    for words in (layout.loads_in(scheme, "llama"), layout.loads_together({NAME: scheme}, ["lm_head"])):
        assert set(words) == set(ENGINES)
        assert all(word is None or (isinstance(word, str) and word) for word in words.values())
    assert set(layout.support()) == set(ENGINES)


@every_layout
def test_damaged_files_are_refused_with_the_tensor_named(layout):
    shape = (256, 256)
    scheme = storable(layout, shape)
    q = quantized(scheme, shape)
    assert q is not None
    stored = layout.pack(NAME, q)
    for name in stored:
        if name.endswith(".g_idx"):
            continue  # the first AutoGPTQ files have none
        with pytest.raises(InputError, match=name.rpartition(".")[2]):
            layout.unpack(NAME, scheme, shape, {n: t for n, t in stored.items() if n != name})
        cut = stored[name][:1] if stored[name].dim() else stored[name][None]
        with pytest.raises(InputError, match=name.rpartition(".")[2]):
            layout.unpack(NAME, scheme, shape, stored | {name: cut})


@every_layout
def test_outliers_are_never_dropped_in_silence(layout):
    scheme = storable(layout, (128, 256))
    q = quantized(scheme, (128, 256))
    assert q is not None
    sparse = QuantizedTensor(scheme, q.shape, q.codes, q.params, (torch.tensor([3]), torch.tensor([9.0])))
    refused = None
    try:
        stored = layout.pack(NAME, sparse)
    except PlanError as error:
        refused = error.message
    if refused is None:
        assert torch.equal(layout.unpack(NAME, scheme, q.shape, stored).decode(), sparse.decode())
    else:
        assert "outliers" in refused


@every_layout
def test_another_layouts_config_is_refused(layout):
    with pytest.raises(InputError, match="quant_method 'hqq'"):
        type(layout).from_config({"quant_method": "hqq"})


@every_layout
def test_configs_without_modules_are_refused(layout):
    try:
        config = layout.config({}, ["lm_head"], {})
    except BitwrightError:
        return
    assert layout.read_config(config, torch.float16, {}) == {}


@every_layout
@every_scheme
def test_static_inputs_that_were_not_measured_are_refused(layout, scheme):
    scheme = scheme.limit(layout.limits(torch.bfloat16))
    q = quantized(scheme, (128, 256))
    if q is None or layout.accepts(scheme, (128, 256)) is not None or not q.inputs:
        return
    with pytest.raises(PlanError, match="not measured"):
        layout.pack(NAME, QuantizedTensor(scheme, q.shape, q.codes, q.params))


@every_layout
@pytest.mark.parametrize("number", ["int", "float"])
def test_a_kv_cache_is_stored_or_refused_with_a_reason(layout, number):
    scheme = InputScheme(number=number, strategy="tensor", dynamic=False)
    reason = layout.accepts_kv_cache(scheme)
    if reason is not None:
        assert reason
        return
    specs = layout.kv_cache_tensors("model.layers.0.self_attn", scheme)
    assert [spec.name for spec in specs] == [f"model.layers.0.self_attn.{part}_scale" for part in "kv"]
    assert {(spec.shape, spec.dtype) for spec in specs} == {((1,), torch.float32)}
    entries = {NAME: storable(layout, (128, 256))}
    with_cache = layout.config(entries, ["lm_head"], {"kv_cache": scheme})
    assert json.loads(json.dumps(with_cache)) != layout.config(entries, ["lm_head"], {})
