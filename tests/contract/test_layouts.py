"""What every catalogued layout must do, with every catalogued scheme that it accepts. New files join by themselves."""

from __future__ import annotations

import json

import pytest
import torch

from bitwright import catalog
from bitwright.core.layout import ENGINES, Layout
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import BitwrightError, InputError, PlanError

NAME = "model.layers.0.mlp.down_proj"
SHAPES = ((64, 512), (96, 160), (7, 36))
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
    + [{"symmetric_range": "narrow", "granularity": "channel"}],
}


def layouts() -> list[Layout]:
    return [catalog.load("layouts", name)(**o) for name in catalog.names("layouts") for o in LAYOUTS.get(name, [{}])]


def plain_schemes() -> list[Scheme]:
    return [catalog.load("schemes", name)(**o) for name in catalog.names("schemes") for o in SCHEMES.get(name, [{}])]


def quantized(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor | None:
    """None where the scheme cannot be fitted to this shape or at all."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    try:
        scheme.grid(shape)
        params, codes = scheme.quantize(w, context=scheme.prepare([w]))
    except PlanError:
        return None
    return QuantizedTensor(scheme, shape, codes, params)


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
    scheme = catalog.load("schemes", "affine")(group_size=32).limit(layout.limits(torch.float16))
    q = quantized(scheme, (64, 128))
    assert q is not None
    stored = layout.pack(NAME, q)
    for name in stored:
        if name.endswith(".g_idx"):
            continue  # the first AutoGPTQ files have none
        with pytest.raises(InputError, match=name.rpartition(".")[2]):
            layout.unpack(NAME, scheme, (64, 128), {n: t for n, t in stored.items() if n != name})
        with pytest.raises(InputError, match=name.rpartition(".")[2]):
            layout.unpack(NAME, scheme, (64, 128), stored | {name: stored[name][:1]})


@every_layout
def test_outliers_are_never_dropped_in_silence(layout):
    scheme = catalog.load("schemes", "affine")(group_size=32).limit(layout.limits(torch.float16))
    q = quantized(scheme, (64, 128))
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
    with pytest.raises(InputError, match="quant_method 'fp8'"):
        type(layout).from_config({"quant_method": "fp8"})


@every_layout
def test_configs_without_modules_are_refused(layout):
    try:
        config = layout.config({}, ["lm_head"], {})
    except BitwrightError:
        return
    assert layout.read_config(config, torch.float16, {}) == {}
