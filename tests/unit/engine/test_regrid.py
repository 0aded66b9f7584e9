"""Re-expressing weights on other layouts' grids: the numbers stay, or it is refused with the reason."""

import pytest
import torch

from bitwright import catalog
from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.engine.regrid import express, forms, regrid
from bitwright.errors import NumericError, PlanError
from bitwright.schemes.absmax_int8 import AbsmaxInt8
from bitwright.schemes.affine import Affine
from bitwright.schemes.affine_indexed import AffineIndexed

SHAPE = (32, 256)
GPTQ, AWQ, PACKED, NATIVE = ("gptq", "awq", "compressed-tensors", "native")


def layout(name, **options):
    return catalog.load("layouts", name)(**options)


def quantized(scheme, shape=SHAPE, seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    params, codes = scheme.quantize(w)
    return QuantizedTensor(scheme, shape, codes, params)


def by_formula(q):
    """The documented formula, element by element in float64 of float32 factors, rounded once."""
    scale = q.params["scale"].float().double().expand(q.shape[0], -1)
    zero = q.params.get("zero", torch.full((1, 1), 2 ** (q.scheme.bits - 1))).double().expand(scale.shape)
    repeat = q.shape[1] // scale.shape[1]
    steps = q.codes.double() - zero.repeat_interleave(repeat, 1)
    return (steps * scale.repeat_interleave(repeat, 1)).float()


def all_pairs():
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for where in ({"group_size": 32}, {"group_size": 128}, {"group_size": 256}, {"granularity": "channel"}):
                scheme = Affine(bits=bits, symmetric=symmetric, zero_min=1, **where)
                for name in (GPTQ, AWQ, PACKED, NATIVE):
                    if not (name == AWQ and bits != 4) and not (name == PACKED and bits == 3):
                        yield scheme, name


@pytest.mark.parametrize(("scheme", "name"), list(all_pairs()), ids=lambda v: v if isinstance(v, str) else v.describe())
def test_every_pair_keeps_codes_and_numbers(scheme, name):
    q, target = quantized(scheme), layout(name)
    result = regrid(q, target, torch.float16)
    assert target.accepts(result.scheme, SHAPE) is None
    assert torch.equal(result.codes, q.codes)
    stored = target.pack("m", result)
    back = target.unpack("m", result.scheme, SHAPE, stored)
    assert torch.equal(by_formula(back), by_formula(q))
    assert torch.equal(back.decode(), q.decode())


def test_zero_points_in_the_middle_may_become_symmetric_and_back():
    symmetric = quantized(Affine(group_size=32))
    asymmetric = express(symmetric, Affine(group_size=32, symmetric=False))[0]
    assert asymmetric.params["zero"].dtype == torch.uint8
    assert set(asymmetric.params["zero"].flatten().tolist()) == {8}
    assert torch.equal(asymmetric.decode(), symmetric.decode())
    assert express(asymmetric, Affine(group_size=32))[0].equals(symmetric)


def test_zero_points_off_the_middle_cannot_become_symmetric():
    with pytest.raises(PlanError, match="zero points lie off the middle"):
        express(quantized(Affine(group_size=32, symmetric=False)), Affine(group_size=32))


def test_one_group_a_row_is_per_channel_and_one_scale_serves_every_row():
    q = quantized(Affine(group_size=256))
    channel = Affine(granularity="channel")
    assert torch.equal(express(q, channel)[0].decode(), q.decode())
    whole = quantized(Affine(granularity="tensor", bits=4))
    result = regrid(whole, layout(AWQ), torch.float16)
    assert result.scheme.granularity == "channel"
    assert torch.equal(result.decode(), whole.decode())


def test_a_zero_point_of_0_needs_the_second_gptq_format():
    q = quantized(Affine(group_size=32, symmetric=False))
    params = {**q.params, "zero": q.params["zero"].clone()}
    params["zero"][3, 1] = 0
    q = QuantizedTensor(q.scheme, q.shape, q.codes, params)
    with pytest.raises(PlanError, match="of its zero points are 0") as found:
        regrid(q, layout(GPTQ), torch.float16)
    assert "gptq_v2" in found.value.mend
    assert torch.equal(regrid(q, layout(GPTQ, checkpoint_format="gptq_v2"), torch.float16).decode(), q.decode())


def test_scales_that_the_other_dtype_does_not_hold_are_refused_or_rounded():
    q = quantized(Affine(group_size=32, scale_dtype="float16"))
    with pytest.raises(PlanError, match="scales are not exact in bfloat16") as found:
        regrid(q, layout(PACKED), torch.bfloat16)
    assert "--lossy" in found.value.mend
    rounded, worst = express(q, Affine(group_size=32, scale_dtype="bfloat16"), lossy=True)
    before, after = q.params["scale"].double(), rounded.params["scale"].double()
    assert worst == float(((after - before) / before).abs().max())
    assert 0 < worst <= 2**-8  # half a step of a significand of 8 bits
    assert torch.equal(rounded.codes, q.codes)


def test_scales_that_the_other_dtype_holds_are_the_same_numbers():
    q = quantized(Affine(group_size=32, scale_dtype="bfloat16"))
    result = regrid(q, layout(AWQ), torch.bfloat16)
    assert result.params["scale"].dtype == torch.float16
    assert torch.equal(result.decode(), q.decode())


def test_a_scale_too_large_for_float16_is_an_error_even_where_rounding_is_allowed():
    q = quantized(Affine(group_size=32, scale_dtype="bfloat16"))
    params = {"scale": q.params["scale"].clone()}
    params["scale"][0, 0] = 2.0**20
    with pytest.raises(NumericError, match=r"1.049e\+06 overflows float16"):
        regrid(QuantizedTensor(q.scheme, q.shape, q.codes, params), layout(AWQ), torch.bfloat16, lossy=True)


def indexed(index, group_size=32):
    q = quantized(Affine(group_size=group_size, symmetric=False))
    scheme = AffineIndexed(group_size=group_size)
    return QuantizedTensor(scheme, q.shape, q.codes, {**q.params, "g_idx": torch.tensor(index, dtype=torch.int32)})


def test_a_group_index_in_whole_runs_becomes_plain_groups():
    plain = indexed([i // 32 for i in range(256)])
    turned = indexed([7 - i // 32 for i in range(256)])
    for q in (plain, turned):
        result = regrid(q, layout(AWQ), torch.float16)
        assert result.scheme == Affine(group_size=32, symmetric=False)
        index = q.params["g_idx"].long()
        expected = (q.codes.float() - q.params["zero"].float()[:, index]) * q.params["scale"].float()[:, index]
        assert torch.equal(result.decode(), expected)


@pytest.mark.parametrize("name", [GPTQ, AWQ, PACKED])
def test_act_order_goes_nowhere_but_native(name):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1)) // 32
    q = indexed(order.tolist())
    with pytest.raises(PlanError, match="act-order"):
        regrid(q, layout(name), torch.float16)
    assert regrid(q, layout(NATIVE), torch.float16).equals(q)


def test_a_short_last_group_goes_nowhere_but_native():
    q = quantized(Affine(group_size=32, symmetric=False), (32, 64))
    scheme = AffineIndexed(group_size=48)
    short = QuantizedTensor(scheme, (32, 64), q.codes, {**q.params, "g_idx": (torch.arange(64) // 48).to(torch.int32)})
    with pytest.raises(PlanError, match="not"):
        regrid(short, layout(AWQ), torch.float16)
    assert regrid(short, layout(NATIVE), torch.float16).equals(short)


def test_layouts_that_store_no_such_width_say_so_from_headers_alone():
    with pytest.raises(PlanError, match="layout awq cannot store it: it stores 4 bits, not 3"):
        forms(Affine(bits=3, group_size=32), SHAPE, layout(AWQ), torch.float16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_int8_per_channel_and_row_maxima_are_the_same_numbers(dtype):
    q = quantized(Affine(bits=8, granularity="channel", scale_dtype=dtype))
    int8 = regrid(q, layout("bitsandbytes"), torch.bfloat16)
    assert int8.scheme.kind == "absmax-int8"
    expected = (q.codes.float() - 128) * (int8.params["absmax"] / 127)
    assert torch.equal(int8.decode(), expected)
    assert torch.equal(q.decode(), expected)
    back = regrid(int8, layout(PACKED), torch.float32)
    assert torch.equal(back.decode(), expected)


def test_inputs_become_what_the_other_layout_can_say():
    tokens = InputScheme()
    q = quantized(Affine(bits=8, granularity="channel", inputs=tokens))
    assert regrid(q, layout("bitsandbytes"), torch.float16).scheme.inputs == tokens
    weight_only = regrid(quantized(Affine(bits=8, granularity="channel")), layout("bitsandbytes"), torch.float16)
    assert weight_only.scheme.inputs == InputScheme(threshold=6.0)
    assert regrid(weight_only, layout(PACKED), torch.float32).scheme.inputs == tokens
    assert regrid(weight_only, layout(GPTQ), torch.float32, lossy=True).scheme.inputs is None


def test_row_maxima_that_give_no_bfloat16_scale_are_rounded_only_when_asked():
    q = quantized(AbsmaxInt8(inputs=InputScheme(threshold=6.0)))
    with pytest.raises(PlanError, match="not exact in bfloat16"):
        regrid(q, layout(PACKED), torch.bfloat16)
    exact, rounded = q.decode(), regrid(q, layout(PACKED), torch.bfloat16, lossy=True).decode()
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, rtol=2**-8, atol=0)


def test_a_row_of_zeros_stays_a_row_of_zeros():
    q = quantized(AbsmaxInt8(inputs=InputScheme(threshold=6.0)))
    params = {"absmax": q.params["absmax"].clone()}
    params["absmax"][5] = 0
    zero = QuantizedTensor(q.scheme, q.shape, q.codes, params)
    assert not regrid(zero, layout(PACKED), torch.bfloat16, lossy=True).decode()[5].any()
