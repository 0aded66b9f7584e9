"""AWQ's GEMM form, against the formula written out and worked words."""

import pytest
import torch
from tests import decoders

from bitwright.core.quantized import QuantizedTensor
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError
from bitwright.layouts.awq import Awq
from bitwright.schemes.affine import Affine
from bitwright.schemes.affine_indexed import AffineIndexed

NAME = "model.layers.0.self_attn.q_proj"
LAYOUT = Awq()
AUTOAWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None,
}  # fmt: skip


def quantized(scheme, shape=(16, 64), seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    params, codes = scheme.quantize(w)
    return QuantizedTensor(scheme, shape, codes, params)


def specs_of(tensors):
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def read(stored, config):
    found = LAYOUT.read_config(config, torch.float16, specs_of(stored))
    return found[NAME], LAYOUT.unpack(NAME, *found[NAME], stored)


def test_eight_outputs_of_a_column_are_one_interleaved_word():
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32).contiguous()
    zero = torch.arange(8, dtype=torch.uint8).flip(0)[:, None].contiguous()
    q = QuantizedTensor(
        Affine(group_size=32, symmetric=False),
        (8, 32),
        codes,
        {"scale": torch.ones(8, 1, dtype=torch.float16), "zero": zero},
    )
    stored = LAYOUT.pack(NAME, q)
    assert stored[f"{NAME}.qweight"].tolist() == [[0x75316420]] * 32
    # columns 0..7 hold 7..0: nibble k holds 7 - (0, 2, 4, 6, 1, 3, 5, 7)[k]
    assert [hex(word & 0xFFFFFFFF) for word in stored[f"{NAME}.qzeros"][0].tolist()] == ["0x2461357"]


def test_symmetric_weights_get_zero_points_of_eight():
    stored = LAYOUT.pack(NAME, quantized(Affine(group_size=32)))
    assert {word & 0xFFFFFFFF for word in stored[f"{NAME}.qzeros"].flatten().tolist()} == {0x88888888}
    assert LAYOUT.config({NAME: Affine(group_size=32)}, ["lm_head"], {})["zero_point"] is True


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("where", [{"group_size": 32}, {"group_size": 128}, {"granularity": "channel"}], ids=str)
def test_stored_tensors_mean_the_same_by_the_formula(symmetric, where):
    q = quantized(Affine(symmetric=symmetric, **where), (24, 256))
    assert torch.equal(decoders.awq(LAYOUT.pack(NAME, q), NAME), q.decode())


def test_autoawqs_files_are_read_as_asymmetric():
    q = quantized(Affine(group_size=32, symmetric=False))
    (scheme, shape), back = read(LAYOUT.pack(NAME, q), AUTOAWQ)
    assert (scheme, shape) == (Affine(group_size=32, symmetric=False), (16, 64))
    assert back.equals(q)


def test_older_names_of_the_keys_and_gptqmodels_symmetric_files_are_read():
    q = quantized(Affine(group_size=32))
    stored = LAYOUT.pack(NAME, q)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": False}
    assert read(stored, config)[1].equals(q)


def test_zero_points_off_the_middle_win_over_a_config_that_says_symmetric():
    q = quantized(Affine(group_size=32, symmetric=False))
    back = read(LAYOUT.pack(NAME, q), {**AUTOAWQ, "zero_point": False})[1]
    assert not back.scheme.symmetric
    assert torch.equal(back.decode(), q.decode())


def test_shapes_win_over_a_group_size_that_contradicts_them():
    stored = LAYOUT.pack(NAME, quantized(Affine(group_size=16, symmetric=False)))
    assert read(stored, AUTOAWQ)[0][0].group_size == 16
    channel = LAYOUT.pack(NAME, quantized(Affine(granularity="channel", symmetric=False)))
    assert read(channel, AUTOAWQ)[0][0].granularity == "channel"


def test_some_symmetric_modules_are_told_from_the_others():
    entries = {"model.layers.0.a": Affine(group_size=32), "model.layers.0.b": Affine(group_size=32, symmetric=False)}
    stored = {}
    for name, scheme in entries.items():
        stored |= LAYOUT.pack(name, quantized(scheme))
    config = LAYOUT.config(entries, [], {})
    assert config["meta"]["symmetric"] == ["model.layers.0.a"]
    found = LAYOUT.read_config(config, torch.float16, specs_of(stored))
    assert {name: scheme for name, (scheme, _) in found.items()} == entries


def test_several_group_sizes_are_refused_because_the_config_has_place_for_one():
    entries = {"model.layers.0.a": Affine(group_size=32), "model.layers.0.b": Affine(group_size=64)}
    with pytest.raises(PlanError, match=r"one group size.*32 \(model.layers.0.a\), 64 \(model.layers.0.b\)"):
        LAYOUT.config(entries, [], {})


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (Affine(bits=8, group_size=32), (16, 64), "4 bits, not 8"),
        (Affine(bits=3, group_size=32), (16, 64), "4 bits, not 3"),
        (Affine(granularity="tensor"), (16, 64), "not per tensor"),
        (Affine(group_size=32, symmetric_range="narrow"), (16, 64), "range is 'full'"),
        (Affine(group_size=32, scale_dtype="bfloat16"), (16, 64), "float16, not bfloat16"),
        (Affine(group_size=48), (16, 64), "not a multiple of group_size 48"),
        (Affine(group_size=32), (12, 64), "out_features 12"),
        (AffineIndexed(group_size=32), (16, 64), "affine integers"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_reason(scheme, shape, reason):
    assert reason in LAYOUT.accepts(scheme, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "version 'gemv'"),
        ({"version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"backend": "llm-awq"}, "not read here"),
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
    ],
)
def test_files_in_other_forms_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Awq.from_config({**AUTOAWQ, **change})


def test_files_of_other_widths_or_packed_otherwise_are_refused():
    stored = LAYOUT.pack(NAME, quantized(Affine(group_size=32)))
    with pytest.raises(InputError, match="8 bits"):
        LAYOUT.read_config({**AUTOAWQ, "bits": 8}, torch.float16, specs_of(stored))
    gptq = stored | {f"{NAME}.qweight": torch.zeros(8, 16, dtype=torch.int32)}
    with pytest.raises(InputError, match="not eight codes to a word"):
        LAYOUT.read_config(AUTOAWQ, torch.float16, specs_of(gptq))
    with pytest.raises(InputError, match="no matrices"):
        LAYOUT.read_config(AUTOAWQ, torch.float16, specs_of({f"{NAME}.qweight": stored[f"{NAME}.qweight"]}))


def test_kept_modules_are_listed_in_full_and_for_gptqmodel_by_rule():
    kept = ["lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts.0.w1", "model.layers.1.mlp.experts.1.w1"]
    config = LAYOUT.config({NAME: Affine(group_size=32)}, kept, {})
    assert config["modules_to_not_convert"] == [*kept, "model.layers.1.mlp.experts"]
    assert all(rule.startswith("-:") for rule in config["dynamic"])
    assert "dynamic" not in LAYOUT.config({NAME: Affine(group_size=32)}, ["lm_head"], {})


def test_kept_names_that_are_part_of_quantized_ones_are_reported():
    """vLLM compares with ``in``, transformers with ``endswith`` (beside whole leading components)."""
    scheme = Affine(group_size=32)
    words = LAYOUT.loads_together({"model.layers.0.mlp.gate_proj": scheme}, ["model.layers.0.mlp.gate"])
    assert "gate_proj" in words["vllm"]
    assert words["transformers"] is None
    words = LAYOUT.loads_together({"model.layers.0.mlp.up_proj": scheme}, ["lm_head", "model.layers.0.mlp.gate"])
    assert words == {"vllm": None, "transformers": None, "gptqmodel": None, "bitwright": None}


def test_transformers_takes_the_config_as_it_is():
    from transformers import AwqConfig

    config = LAYOUT.config({NAME: Affine(granularity="channel")}, ["lm_head"], {"version": "1"})
    made = AwqConfig.from_dict(config)
    assert (made.bits, made.group_size, made.zero_point, str(made.format)) == (4, -1, True, "gemm")
    assert made.modules_to_not_convert == ["lm_head"]
