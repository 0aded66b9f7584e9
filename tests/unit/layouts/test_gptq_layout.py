"""GPTQ files against AutoGPTQ's packing loop written out, worked words, and the readers' rules of matching names."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError
from bitwright.layouts.gptq import Gptq
from bitwright.schemes.affine import Affine
from bitwright.schemes.affine_indexed import AffineIndexed

NAME = "model.layers.0.self_attn.o_proj"
V1, V2 = Gptq(), Gptq(checkpoint_format="gptq_v2")


def autogptq_pack(fields: np.ndarray, bits: int) -> np.ndarray:
    """AutoGPTQ's ``QuantLinear.pack`` loop, down axis 0: ``(n, m)`` integers to ``(n*bits/32, m)`` uint32."""
    fields = fields.astype(np.uint32)
    out = np.zeros((fields.shape[0] * bits // 32, fields.shape[1]), dtype=np.uint32)
    i = row = 0
    while row < out.shape[0]:
        if bits != 3:
            for j in range(i, i + 32 // bits):
                out[row] |= fields[j] << np.uint32(bits * (j - i))
            i += 32 // bits
            row += 1
            continue
        for j in range(i, i + 10):
            out[row] |= fields[j] << np.uint32(3 * (j - i))
        i += 10
        out[row] |= fields[i] << np.uint32(30)
        row += 1
        out[row] |= (fields[i] >> np.uint32(2)) & np.uint32(1)
        i += 1
        for j in range(i, i + 10):
            out[row] |= fields[j] << np.uint32(3 * (j - i) + 1)
        i += 10
        out[row] |= fields[i] << np.uint32(31)
        row += 1
        out[row] |= (fields[i] >> np.uint32(1)) & np.uint32(3)
        i += 1
        for j in range(i, i + 10):
            out[row] |= fields[j] << np.uint32(3 * (j - i) + 2)
        i += 10
        row += 1
    return out


def foreign(codes, zeros, scales, g_idx, bits, *, shift):
    """A GPTQ file of another writer. codes (in, out), zeros (G, out), scales (G, out), g_idx (in,)."""
    return {
        f"{NAME}.qweight": torch.from_numpy(autogptq_pack(codes, bits).view(np.int32)),
        f"{NAME}.qzeros": torch.from_numpy(
            np.ascontiguousarray(autogptq_pack((zeros - shift).T, bits).T).view(np.int32)
        ),
        f"{NAME}.scales": torch.from_numpy(scales.astype(np.float16)),
        f"{NAME}.g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }


def dequantize(codes, zeros, scales, g_idx) -> torch.Tensor:
    """``W[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])`` in float64, element by element."""
    columns, rows = codes.shape
    out = np.empty((rows, columns))
    for o in range(rows):
        for i in range(columns):
            g = g_idx[i]
            out[o, i] = float(np.float16(scales[g, o])) * (int(codes[i, o]) - int(zeros[g, o]))
    return torch.from_numpy(out)


def specs_of(tensors):
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def unsigned(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32)


def quantized(scheme: Affine, shape=(64, 128), layout=V1) -> QuantizedTensor:
    scheme = scheme.limit(layout.limits(torch.float16))
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    params, codes = scheme.quantize(w)
    return QuantizedTensor(scheme, shape, codes, params)


def random_file(bits, *, rows=32, columns=64, groups=2, g_idx=None, shift=1, seed=0, symmetric=False):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (columns, rows))
    zeros = rng.integers(1, 2**bits, (groups, rows)) if not symmetric else np.full((groups, rows), 2 ** (bits - 1))
    scales = rng.uniform(0.001, 0.1, (groups, rows))
    if g_idx is None:
        g_idx = np.arange(columns) // (columns // groups)
    return foreign(codes, zeros, scales, g_idx, bits, shift=shift), dequantize(codes, zeros, scales, g_idx)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_stored_words_are_autogptqs(bits, symmetric, layout, group_size):
    where = {"granularity": "channel"} if group_size < 0 else {"group_size": group_size}
    q = quantized(Affine(bits=bits, symmetric=symmetric, **where), (32, 256), layout)
    stored = layout.pack(NAME, q)
    groups = 1 if group_size < 0 else 256 // group_size
    zero = q.params["zero"].numpy().astype(np.int64).T if not symmetric else np.full((groups, 32), 2 ** (bits - 1))
    zero = zero - (1 if layout is V1 else 0)
    np.testing.assert_array_equal(unsigned(stored[f"{NAME}.qweight"]), autogptq_pack(q.codes.numpy().T, bits))
    np.testing.assert_array_equal(unsigned(stored[f"{NAME}.qzeros"]), autogptq_pack(zero.T, bits).T)
    assert torch.equal(stored[f"{NAME}.scales"], q.params["scale"].T)
    assert stored[f"{NAME}.scales"].dtype == torch.float16
    expected = torch.zeros(256) if group_size < 0 else torch.arange(256) // group_size
    assert torch.equal(stored[f"{NAME}.g_idx"], expected.int())


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, [0x55555555], [0xAAAAAAAA]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x77777777], [0x88888888]),
        (8, [0x7F7F7F7F], [0x80808080]),
    ],
)
def test_symmetric_zero_words(bits, v1, v2):
    for layout, words in ((V1, v1), (V2, v2)):
        stored = layout.pack(NAME, quantized(Affine(bits=bits, group_size=32), (32, 64), layout))
        got = unsigned(stored[f"{NAME}.qzeros"])
        assert got.reshape(-1, len(words)).tolist() == [words] * (got.size // len(words))


def test_every_row_of_a_column_goes_down_the_words():
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    codes[5] = torch.arange(8)
    scheme = Affine(granularity="channel")
    q = QuantizedTensor(scheme, (8, 8), codes, {"scale": torch.ones(8, 1, dtype=torch.float16)})
    words = unsigned(V1.pack(NAME, q)[f"{NAME}.qweight"])
    assert words.shape == (1, 8)
    assert [hex(w) for w in words[0]] == ["0x0"] * 5 + ["0x76543210"] + ["0x0"] * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("checkpoint_format", "shift"), [("gptq", 1), ("gptq_v2", 0)])
def test_other_writers_files_decode(bits, checkpoint_format, shift):
    tensors, expected = random_file(bits, shift=shift)
    for keys in ({"checkpoint_format": checkpoint_format}, {"format": checkpoint_format}):
        config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "desc_act": False, **keys}
        layout = Gptq.from_config(config)
        found = layout.read_config(config, torch.float16, specs_of(tensors))
        scheme, shape = found[NAME]
        assert shape == (32, 64)
        assert (scheme.bits, scheme.group_size, scheme.symmetric) == (bits, 32, False)
        got = layout.unpack(NAME, scheme, shape, tensors).decode()
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_checkpoint_format_beats_format_and_absence_is_v1():
    assert Gptq.from_config({"quant_method": "gptq"}) == V1
    assert Gptq.from_config({"quant_method": "GPTQ", "checkpoint_format": "gptq_v2", "format": "gptq"}) == V2
    with pytest.raises(InputError, match="marlin"):
        Gptq.from_config({"quant_method": "gptq", "checkpoint_format": "marlin"})
    with pytest.raises(InputError, match="from_config"):
        V1.read_config({"checkpoint_format": "gptq_v2"}, torch.float16, {})
    with pytest.raises(InputError, match="checkpoint_format"):
        Gptq(checkpoint_format="v1")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_files_decode_by_their_group_index(bits, symmetric):
    rng = np.random.default_rng(5)
    g_idx = rng.permutation(np.arange(64) // 16)
    tensors, expected = random_file(bits, groups=4, g_idx=g_idx, symmetric=symmetric)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "sym": symmetric, "desc_act": True}
    scheme, shape = V1.read_config(config, torch.float16, specs_of(tensors))[NAME]
    q = V1.unpack(NAME, scheme, shape, tensors)
    assert isinstance(q.scheme, AffineIndexed)
    torch.testing.assert_close(q.decode().double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(PlanError, match="cannot store"):
        V1.pack(NAME, q)


def test_act_order_with_one_group_is_plain():
    tensors, expected = random_file(4, groups=1)
    config = {"bits": 4, "group_size": -1, "sym": False, "desc_act": True}
    q = V1.unpack(NAME, *V1.read_config(config, torch.float16, specs_of(tensors))[NAME], tensors)
    assert isinstance(q.scheme, Affine)
    assert q.scheme.granularity == "channel"
    torch.testing.assert_close(q.decode().double(), expected, rtol=1e-6, atol=0)


def test_a_short_last_group_decodes():
    g_idx = np.arange(64) // 24
    tensors, expected = random_file(4, groups=3, g_idx=g_idx)
    config = {"bits": 4, "group_size": 24, "sym": False}
    scheme, shape = V1.read_config(config, torch.float16, specs_of(tensors))[NAME]
    assert scheme == AffineIndexed(bits=4, group_size=24)
    torch.testing.assert_close(V1.unpack(NAME, scheme, shape, tensors).decode().double(), expected, rtol=1e-6, atol=0)


def test_a_file_without_g_idx_decodes():
    tensors, expected = random_file(4)
    del tensors[f"{NAME}.g_idx"]
    config = {"bits": 4, "group_size": 32, "sym": False}
    found = V1.read_config(config, torch.float16, specs_of(tensors))[NAME]
    torch.testing.assert_close(V1.unpack(NAME, *found, tensors).decode().double(), expected, rtol=1e-6, atol=0)


def test_symmetric_files_whose_zero_points_are_off_the_middle_decode_as_stored():
    tensors, expected = random_file(4)
    config = {"bits": 4, "group_size": 32, "sym": True}
    scheme, shape = V1.read_config(config, torch.float16, specs_of(tensors))[NAME]
    assert scheme.symmetric
    q = V1.unpack(NAME, scheme, shape, tensors)
    assert not q.scheme.symmetric
    torch.testing.assert_close(q.decode().double(), expected, rtol=1e-6, atol=0)


def test_a_stored_fifteen_means_sixteen_in_v1():
    codes, scales, g_idx = np.full((8, 8), 3), np.ones((1, 8)), np.zeros(8)
    tensors = foreign(codes, np.full((1, 8), 16), scales, g_idx, 4, shift=1)
    scheme = Affine(symmetric=False, granularity="channel", zero_min=1)
    assert V1.unpack(NAME, scheme, (8, 8), tensors).decode().tolist() == [[-13.0] * 8] * 8
    tensors = foreign(codes, np.full((1, 8), 256), scales, g_idx, 8, shift=1)
    with pytest.raises(InputError, match="255"):
        V1.unpack(NAME, Affine(bits=8, symmetric=False, granularity="channel"), (8, 8), tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_zero_in_v1_files_of_gptqmodel(bits):
    # By the rule of GPTQModel's utils/model.py: 1 is taken from whole words at 2, 4 and 8 bits, from each field at 3.
    zeros = np.arange(32).reshape(1, 32) % 2**bits
    stored = (zeros - 1) % 8 if bits == 3 else zeros
    tensors = foreign(np.zeros((32, 32)), stored, np.ones((1, 32)), np.zeros(32), bits, shift=0)
    if bits != 3:
        tensors[f"{NAME}.qzeros"] -= sum(1 << at for at in range(0, 32, bits))
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1,
        "sym": False,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    layout = Gptq.from_config(config)
    scheme, shape = layout.read_config(config, torch.float16, specs_of(tensors))[NAME]
    assert scheme.zero_min == 0
    assert layout.unpack(NAME, scheme, shape, tensors).params["zero"][:, 0].tolist() == zeros[0].tolist()
    assert layout.accepts(scheme, shape) is not None
    assert Gptq.from_config(config | {"checkpoint_format": "gptq_v2"}) == V2
    assert Gptq.from_config(config | {"meta": {"quantizer": ["other:1"]}}) == V1


def test_shapes_beat_a_config_that_contradicts_them():
    tensors, expected = random_file(8)
    config = {"bits": 4, "group_size": 128, "sym": False}
    scheme, shape = V1.read_config(config, torch.float16, specs_of(tensors))[NAME]
    assert (scheme.bits, scheme.group_size) == (8, 32)
    torch.testing.assert_close(V1.unpack(NAME, scheme, shape, tensors).decode().double(), expected, rtol=1e-6, atol=0)


def test_group_indices_outside_the_groups_are_refused():
    tensors, _ = random_file(4)
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].clone()
    tensors[f"{NAME}.g_idx"][7] = 2
    with pytest.raises(InputError, match="g_idx"):
        V1.unpack(NAME, Affine(group_size=32), (32, 64), tensors)


@pytest.mark.parametrize("drop", ["scales", "qweight"])
def test_incomplete_files_are_refused(drop):
    tensors, _ = random_file(4)
    names = {n: s for n, s in specs_of(tensors).items() if not n.endswith(drop)}
    if drop == "qweight":
        assert V1.read_config({"bits": 4}, torch.float16, names) == {}
    else:
        with pytest.raises(InputError, match="scales"):
            V1.read_config({"bits": 4}, torch.float16, names)


@pytest.mark.parametrize(
    ("options", "shape", "match"),
    [
        ({"bits": 5, "group_size": 32}, (32, 64), "2, 3, 4 or 8"),
        ({"bits": 6, "group_size": 32}, (32, 64), "2, 3, 4 or 8"),
        ({"granularity": "tensor"}, (32, 64), "per tensor"),
        ({"group_size": 32, "symmetric_range": "narrow"}, (32, 64), "full"),
        ({"group_size": 32, "scale_dtype": "bfloat16"}, (32, 64), "float16"),
        ({"group_size": 32, "symmetric": False}, (32, 64), "zero"),
        ({"group_size": 48}, (32, 64), "48"),
        ({"bits": 3, "group_size": 16}, (32, 48), "in_features 48"),
        ({"bits": 4, "group_size": 32}, (12, 64), "out_features 12"),
        ({"bits": 4, "group_size": 4}, (32, 4), "in_features 4"),
    ],
)
def test_what_it_cannot_store_is_refused_with_a_reason(options, shape, match):
    assert re.search(match, V1.accepts(Affine(**options), shape) or "")


def test_limits():
    assert V1.limits(torch.bfloat16) == Limits(scale_dtype=torch.float16, zero_min=1)
    assert V2.limits(torch.bfloat16) == Limits(scale_dtype=torch.float16, zero_min=0)
    assert V2.accepts(Affine(symmetric=False, group_size=32), (32, 64)) is None


def test_config_has_what_the_readers_require():
    entries = {f"model.layers.{b}.{leaf}": Affine() for b in (0, 1) for leaf in ("self_attn.q_proj", "mlp.up_proj")}
    config = V1.config(entries, ["lm_head"], {"damping": 0.01, "sequential": False, "version": "1.2.3"})
    assert config | {"dynamic": None} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": False,
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]],
        "dynamic": None,
        "meta": {"quantizer": ["bitwright:1.2.3"]},
    }
    assert json.loads(V1.side_files(config)["quantize_config.json"]) == config


@pytest.mark.parametrize("damping", [0.0, 1.0, -0.1, None, "x"])
def test_damping_that_transformers_refuses_is_left_out(damping):
    assert "damp_percent" not in V1.config({NAME: Affine()}, [], {"damping": damping})


def first_rule(config, module):
    """GPTQModel's and vLLM's rule: ``re.match`` in order; False = skip, None = no rule."""
    for pattern, values in config.get("dynamic", {}).items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), module):
                return False
        elif re.match(pattern.removeprefix("+:"), module):
            return values
    return None


def in_positive_list(config, module, how):
    entries = [entry for group in config["modules_in_block_to_quantize"] for entry in group]
    return any(module.endswith(entry) if how == "optimum" else entry in module for entry in entries)


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def mixture():
    base, wide = Affine(), Affine(bits=8, group_size=64)
    entries = {}
    for block in range(12):
        for leaf in [f"self_attn.{p}" for p in ATTENTION] + [f"mlp.{p}" for p in MLP]:
            entries[f"model.layers.{block}.{leaf}"] = wide if block in (1, 11) else base
    entries = {n: s for n, s in entries.items() if not (n.startswith("model.layers.5.") and "down_proj" not in n)}
    kept = ["lm_head", "model.vision.layers.5.self_attn.q_proj"]
    kept += [f"model.layers.5.self_attn.{p}" for p in ATTENTION] + [f"model.layers.5.mlp.{p}" for p in MLP[:2]]
    return entries, kept


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_rules_say_for_every_module_what_became_of_it(prefix):
    entries, kept = mixture()
    config = V1.config(entries, kept, {})
    for name, scheme in entries.items():
        rule = first_rule(config, prefix + name)
        expected = None if scheme == Affine() else {"bits": 8, "group_size": 64, "desc_act": False, "sym": True}
        assert rule == expected, name
        assert in_positive_list(config, name, "optimum"), name
        assert in_positive_list(config, name, "vllm"), name
    for name in kept:
        assert first_rule(config, prefix + name) is False, name
        assert not in_positive_list(config, name, "optimum"), name
        assert not in_positive_list(config, name, "vllm"), name
    assert first_rule(config, "model.layers.15.self_attn.q_proj") is None
    assert first_rule(config, "model.layers.1.self_attn.q_proj.extra") is None


def test_rules_hit_the_fused_names_of_vllm():
    config = V1.config(*mixture(), {})
    wide = {"bits": 8, "group_size": 64, "desc_act": False, "sym": True}
    assert first_rule(config, "model.layers.11.self_attn.qkv_proj") == wide
    assert first_rule(config, "model.layers.1.mlp.gate_up_proj") == wide
    assert first_rule(config, "model.layers.5.self_attn.qkv_proj") is False
    assert first_rule(config, "model.layers.5.mlp.gate_up_proj") is False
    assert first_rule(config, "model.layers.10.mlp.gate_up_proj") is None


def test_blocks_treated_alike_make_few_rules():
    """One rule per set of leaves, however many blocks: readers try every rule on every module."""
    entries = {f"model.layers.{b}.mlp.{p}": Affine(bits=8 if b % 2 else 4) for b in range(81) for p in MLP}
    config = V1.config(entries, ["lm_head"], {})
    assert len(config["dynamic"]) == 2
    assert config["modules_in_block_to_quantize"] == [[f"mlp.{p}" for p in MLP]]


def test_experts_of_a_block_are_one_module_in_vllm():
    base, wide = Affine(), Affine(bits=8)
    entries = {
        f"model.layers.{b}.mlp.experts.{e}.{p}": wide if b == 1 else base
        for b in range(3)
        for e in range(16)
        for p in MLP
    }
    kept = [f"model.layers.3.mlp.experts.{e}.{p}" for e in range(16) for p in MLP] + ["model.layers.0.mlp.gate"]
    config = V1.config(entries, kept, {})
    assert len(config["dynamic"]) <= 5
    assert first_rule(config, "model.layers.0.mlp.experts") is None
    assert (first_rule(config, "model.layers.1.mlp.experts") or {})["bits"] == 8
    assert first_rule(config, "model.layers.3.mlp.experts") is False
    assert first_rule(config, "model.layers.0.mlp.gate") is False
    assert first_rule(config, "model.layers.0.mlp.gate_proj") is None
    for name, scheme in entries.items():
        assert (first_rule(config, name) or {"bits": 4})["bits"] == scheme.bits
    partly = V1.config(
        {n: s for n, s in entries.items() if "layers.1." not in n or "experts.3." not in n},
        [n for n in entries if "layers.1." in n and "experts.3." in n],
        {},
    )
    assert first_rule(partly, "model.layers.1.mlp.experts") is None


def test_a_quantized_head_is_named():
    entries = {NAME: Affine(), "lm_head": Affine()}
    config = V1.config(entries, [], {})
    assert config["lm_head"] is True
    assert "dynamic" not in config
    assert ["lm_head"] in config["modules_in_block_to_quantize"]
    assert "head" in (V1.loads_together(entries, [])["transformers"] or "")


def test_who_loads_what():
    vllm = {
        (bits, symmetric, group): V1.loads_in(
            Affine(
                bits=bits, symmetric=symmetric, **({"granularity": "channel"} if group < 0 else {"group_size": group})
            ),
            "llama",
        )["vllm"]
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
        for group in (-1, 16, 32, 64, 128, 256)
    }
    assert {key for key, reason in vllm.items() if reason is None} == {
        (bits, True, group) for bits in (4, 8) for group in (-1, 32, 64, 128)
    }
    assert V1.loads_in(Affine(bits=3), "llama")["gptqmodel"] is None
    assert "gptq_v2" in (V1.loads_in(Affine(bits=3, symmetric=False), "llama")["gptqmodel"] or "")
    assert V2.loads_in(Affine(bits=3, symmetric=False), "llama")["gptqmodel"] is None
    assert V1.loads_in(Affine(group_size=96), "llama")["gptqmodel"] is not None
    assert "dynamic" in (V1.loads_together({"a": Affine(), "b": Affine(bits=8)}, [])["transformers"] or "")
