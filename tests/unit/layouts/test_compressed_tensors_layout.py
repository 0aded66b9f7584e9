"""compressed-tensors files against formulas, worked words and (where installed) the library itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.layouts.compressed_tensors import CompressedTensors
from bitwright.schemes.affine import Affine

NAME = "model.layers.0.mlp.up_proj"
LAYOUT = CompressedTensors()


def specs_of(tensors):
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def words_of(fields, bits) -> list[int]:
    stream = sum(int(field) << (bits * i) for i, field in enumerate(fields))
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(fields) * bits // 32))]


def unsigned(tensor: torch.Tensor) -> list[list[int]]:
    return np.ascontiguousarray(tensor.numpy()).view(np.uint32).tolist()


def quantized(scheme: Affine, shape=(48, 128), seed=0) -> QuantizedTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.003
    params, codes = scheme.quantize(w)
    return QuantizedTensor(scheme, shape, codes, params)


def config_of(args, targets=("Linear",), **more):
    group = {"targets": list(targets), "weights": args, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def test_worked_words():
    scale = torch.ones(1, 1, dtype=torch.bfloat16)
    four = QuantizedTensor(
        Affine(granularity="channel", scale_dtype="bfloat16"),
        (1, 8),
        (torch.arange(-8, 0) + 8).to(torch.uint8)[None],
        {"scale": scale},
    )
    assert unsigned(LAYOUT.pack(NAME, four)[f"{NAME}.weight_packed"]) == [[0x76543210]]
    eight = QuantizedTensor(
        Affine(bits=8, granularity="channel", scale_dtype="bfloat16"),
        (1, 4),
        (torch.tensor([[-128, -1, 0, 127]]) + 128).to(torch.uint8),
        {"scale": scale},
    )
    assert unsigned(LAYOUT.pack(NAME, eight)[f"{NAME}.weight_packed"]) == [[0xFF807F00]]
    zeros = QuantizedTensor(
        Affine(symmetric=False, granularity="channel", scale_dtype="bfloat16"),
        (16, 8),
        torch.zeros(16, 8, dtype=torch.uint8),
        {"scale": scale.expand(16, 1), "zero": (torch.arange(-8, 8) + 8).to(torch.uint8)[:, None]},
    )
    assert unsigned(LAYOUT.pack(NAME, zeros)[f"{NAME}.weight_zero_point"]) == [[0x76543210], [0xFEDCBA98]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("shape", [(48, 128), (13, 96)])
def test_stored_tensors_follow_the_formulas(bits, symmetric, group_size, shape):
    where = {"granularity": "channel"} if group_size < 0 else {"group_size": group_size}
    q = quantized(Affine(bits=bits, symmetric=symmetric, scale_dtype="bfloat16", **where), shape)
    stored = LAYOUT.pack(NAME, q)
    rows, columns = shape
    groups = 1 if group_size < 0 else columns // group_size
    assert unsigned(stored[f"{NAME}.weight_packed"]) == [words_of(row, bits) for row in q.codes.tolist()]
    assert stored[f"{NAME}.weight_scale"].shape == (rows, groups)
    assert stored[f"{NAME}.weight_scale"].dtype == torch.bfloat16
    assert stored[f"{NAME}.weight_shape"].tolist() == [rows, columns]
    assert (f"{NAME}.weight_zero_point" in stored) is (not symmetric)
    if not symmetric:
        zero = stored[f"{NAME}.weight_zero_point"]
        assert zero.shape == (-(-rows * bits // 32), groups)
        columns_of_words = [words_of(column, bits) for column in q.params["zero"].T.tolist()]
        assert unsigned(zero.T) == columns_of_words


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_library_unpacks_the_same_weight(bits, symmetric, group_size):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import pack_quantized
    from compressed_tensors.compressors.pack_quantized import helpers

    del pack_quantized
    where = {"granularity": "channel"} if group_size < 0 else {"group_size": group_size}
    q = quantized(Affine(bits=bits, symmetric=symmetric, scale_dtype="float32", **where))
    stored = LAYOUT.pack(NAME, q)
    rows, columns = q.shape
    signed = helpers.unpack_from_int32(stored[f"{NAME}.weight_packed"], bits, torch.Size(q.shape))
    span = columns if group_size < 0 else group_size
    scale = stored[f"{NAME}.weight_scale"].repeat_interleave(span, dim=1)
    zero = torch.zeros(rows, columns // span, dtype=torch.int8)
    if not symmetric:
        packed = stored[f"{NAME}.weight_zero_point"]
        zero = helpers.unpack_from_int32(packed, bits, torch.Size(zero.shape), packed_dim=0)
        assert torch.equal(helpers.pack_to_int32(zero, bits, packed_dim=0), packed)
    weight = (signed.float() - zero.float().repeat_interleave(span, dim=1)) * scale
    torch.testing.assert_close(weight, q.decode(), rtol=0, atol=0)
    assert torch.equal(helpers.pack_to_int32(signed, bits), stored[f"{NAME}.weight_packed"])


def test_the_library_accepts_the_config():
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    del library
    entries = {f"model.layers.{i}.mlp.up_proj": Affine(bits=8 if i == 3 else 4) for i in range(5)}
    entries["model.layers.4.mlp.down_proj"] = Affine(symmetric=False, granularity="channel")
    config = LAYOUT.config(entries, ["lm_head"], {})
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    assert parsed.format == "pack-quantized"
    assert parsed.quantization_status.value == "compressed"
    assert parsed.ignore == ["lm_head"]
    by_target = {t: group.weights for group in parsed.config_groups.values() for t in group.targets}
    for name, scheme in entries.items():
        found = by_target[match_targets(name, torch.nn.Linear(2, 2), list(by_target))[0]]
        assert (found.num_bits, found.symmetric) == (scheme.bits, scheme.symmetric)
        assert found.group_size == (128 if scheme.granularity == "group" else None)
        assert found.model_dump(mode="json")["strategy"] == scheme.granularity


def test_config_of_one_scheme_is_the_plain_one():
    config = LAYOUT.config({NAME: Affine()}, ["lm_head", "model.layers.0.mlp.gate", "lm_head"], {"damping": 0.1})
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def test_exceptions_are_listed_by_name_and_the_rest_by_class():
    entries = {f"model.layers.{i}.mlp.up_proj": Affine(bits=8 if i == 3 else 4) for i in range(5)}
    groups = LAYOUT.config(dict(reversed(entries.items())), ["lm_head"], {})["config_groups"]
    assert [(g["targets"], g["weights"]["num_bits"]) for g in groups.values()] == [
        (["Linear"], 4),
        (["model.layers.3.mlp.up_proj"], 8),
    ]
    first = {"model.layers.3.mlp.up_proj": Affine(bits=8), **entries}
    assert list(LAYOUT.config(first, [], {})["config_groups"].values()) == list(groups.values())


def test_scales_take_the_model_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert LAYOUT.limits(dtype) == Limits(scale_dtype=dtype)
    assert LAYOUT.limits(torch.float64) == Limits(scale_dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "shape", "match"),
    [
        ({"bits": 3}, (8, 128), "2, 4 and 8"),
        ({"bits": 5}, (8, 128), "2, 4 and 8"),
        ({"bits": 6}, (8, 128), "2, 4 and 8"),
        ({"granularity": "tensor"}, (8, 128), "per tensor"),
        ({"bits": 8, "granularity": "tensor", "symmetric_range": "narrow"}, (8, 128), "full"),
        ({"bits": 8, "group_size": 32, "inputs": InputScheme()}, (8, 128), "weight-only"),
        ({"symmetric": False, "inputs": InputScheme()}, (8, 128), "weight-only"),
        ({"inputs": InputScheme(threshold=6.0)}, (8, 128), "per token"),
        ({"granularity": "channel", "inputs": InputScheme(number="float")}, (8, 128), "groups"),
        ({"bits": 8, "granularity": "channel", "inputs": InputScheme(number="float")}, (8, 128), "int8 inputs"),
        ({"symmetric_range": "narrow"}, (8, 128), "full"),
        ({"group_size": 128}, (8, 192), "192"),
        ({"granularity": "channel"}, (0, 192), "empty"),
    ],
)
def test_what_it_cannot_store_is_refused_with_a_reason(options, shape, match):
    assert match in (LAYOUT.accepts(Affine(**options), shape) or "")


@pytest.mark.parametrize(
    ("target", "hit"),
    [
        (NAME, True),
        ("re:.*up_proj$", True),
        ("re:model[.]layers", True),
        ("re:up_proj", False),
        ("Linear", True),
        ("model.layers.0.mlp.down_proj", False),
    ],
)
def test_targets_by_name_pattern_and_class(target, hit):
    q = quantized(Affine(group_size=32, scale_dtype="bfloat16"))
    stored = LAYOUT.pack(NAME, q)
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = config_of(args, [target])
    if hit:
        assert LAYOUT.read_config(config, torch.bfloat16, specs_of(stored)) == {NAME: (q.scheme, q.shape)}
    else:
        with pytest.raises(InputError, match="targets"):
            LAYOUT.read_config(config, torch.bfloat16, specs_of(stored))


def test_names_beat_patterns_and_patterns_beat_classes():
    args = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {
        "class": {"targets": ["Linear"], "weights": {**args, "num_bits": 8}},
        "pattern": {"targets": ["re:.*layers[.]1[.].*"], "weights": {**args, "num_bits": 4}},
        "name": {"targets": ["model.layers.1.b"], "weights": {**args, "num_bits": 2}},
    }
    wanted = {"model.layers.0.a": 8, "model.layers.1.a": 4, "model.layers.1.b": 2}
    stored = {}
    for name, bits in wanted.items():
        stored |= LAYOUT.pack(name, quantized(Affine(bits=bits, group_size=32)))
    found = LAYOUT.read_config(config_of({}) | {"config_groups": groups}, torch.float16, specs_of(stored))
    assert {name: scheme.bits for name, (scheme, _) in found.items()} == wanted


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "scale_shape"), [("channel", (48, 1)), ("tensor", (1,))])
def test_int_quantized_files_of_other_writers_decode(symmetric, strategy, scale_shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (48, 40), generator=generator, dtype=torch.int8)
    scale = torch.rand(scale_shape, generator=generator).to(torch.bfloat16)
    zero = torch.randint(-128, 128, scale_shape, generator=generator, dtype=torch.int8)
    stored = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}
    if not symmetric:
        stored[f"{NAME}.weight_zero_point"] = zero
    args = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    config = config_of(args, format="int-quantized")
    found = LAYOUT.read_config(config, torch.bfloat16, specs_of(stored))
    scheme, shape = found[NAME]
    expected = (weight.double() - (0 if symmetric else zero.double())) * scale.double()
    got = LAYOUT.unpack(NAME, scheme, shape, stored).decode()
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_padded_columns_are_read_from_the_shape_tensor():
    q = quantized(Affine(granularity="channel"), (16, 13))
    stored = LAYOUT.pack(NAME, q)
    config = LAYOUT.config({NAME: q.scheme}, [], {})
    found = LAYOUT.read_config(config, torch.float16, specs_of(stored), stored.__getitem__)
    assert found == {NAME: (q.scheme, (16, 13))}
    blind = LAYOUT.read_config(config, torch.float16, specs_of(stored))
    with pytest.raises(InputError, match="weight_shape"):
        LAYOUT.unpack(NAME, *blind[NAME], stored)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "mxfp6-pack-quantized"}, "mxfp6"),
        ({"format": "marlin-24"}, "marlin-24"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "format": "sparse-24-bitmask"}}}, "sparse-24"),
        ({"config_groups": None}, "config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups"),
    ],
)
def test_other_formats_are_refused(change, match):
    stored = LAYOUT.pack(NAME, quantized(Affine(group_size=32)))
    with pytest.raises(InputError, match=match):
        LAYOUT.read_config(config_of({}) | change, torch.float16, specs_of(stored))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, "float"),
        ({"num_bits": 4, "type": "int", "strategy": "block"}, "block"),
        ({"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}, "3 bits"),
        ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}, "group_size"),
    ],
)
def test_weights_that_mean_something_else_are_refused(args, match):
    stored = LAYOUT.pack(NAME, quantized(Affine(group_size=32)))
    with pytest.raises(InputError, match=match):
        LAYOUT.read_config(config_of(args), torch.float16, specs_of(stored))


def test_a_group_index_is_refused_as_its_readers_do():
    stored = LAYOUT.pack(NAME, quantized(Affine(group_size=32)))
    stored[f"{NAME}.weight_g_idx"] = torch.zeros(128, dtype=torch.int32)
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    with pytest.raises(InputError, match="group index"):
        LAYOUT.read_config(config_of(args), torch.float16, specs_of(stored))


def test_who_loads_what():
    assert LAYOUT.loads_in(Affine(), "llama") | {"gptqmodel": None} == dict.fromkeys(LAYOUT.loads_in(Affine(), "llama"))
    assert "dequantize=True" in (LAYOUT.loads_in(Affine(symmetric=False), "llama")["transformers"] or "")
    assert LAYOUT.loads_in(Affine(symmetric=False), "llama")["vllm"] is None
    assert "Conv1D" in (LAYOUT.loads_in(Affine(), "gpt2")["transformers"] or "")
    mixed = {"a": Affine(), "b": Affine(symmetric=False)}
    assert "first group" in (LAYOUT.loads_together(mixed, [])["transformers"] or "")
    assert LAYOUT.loads_together({"a": Affine(), "b": Affine(bits=8)}, [])["transformers"] is None
    assert "48" in (LAYOUT.loads_in(Affine(group_size=48), "llama")["vllm"] or "")
