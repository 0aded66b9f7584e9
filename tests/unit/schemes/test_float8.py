"""float8 weights against formulas in float64, the format's definition and compressed-tensors' own quantizer."""

from __future__ import annotations

import json

import pytest
import torch

from bitwright import catalog
from bitwright.core.inputs import InputScheme
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.schemes._floats import decode_element, encode_element, table
from bitwright.schemes.float8 import Float8

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
MANTISSA = {"e4m3": 3, "e5m2": 2}
BIAS = {"e4m3": 7, "e5m2": 15}


def value_of(byte: int, element: str) -> float:
    """The value of a byte by the formats' definition (arXiv:2209.05433, table 1)."""
    mantissa_bits = MANTISSA[element]
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte & 0x7F) >> mantissa_bits, byte & (2**mantissa_bits - 1)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - BIAS[element] - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - BIAS[element])


def is_finite(byte: int, element: str) -> bool:
    return (byte & 0x7F) != 0x7F if element == "e4m3" else (byte & 0x7F) < 0x7C


def weight(shape=(96, 200), seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_bytes_stand_for_the_values_of_the_format(element):
    codes = torch.tensor([byte for byte in range(256) if is_finite(byte, element)], dtype=torch.uint8)
    wanted = torch.tensor([value_of(byte, element) for byte in codes.tolist()])
    assert torch.equal(decode_element(codes, element), wanted)
    assert torch.equal(encode_element(wanted, element), codes)
    values, order = table(element)
    assert values.tolist() == sorted(set(wanted.tolist()))
    assert 0x80 not in order.tolist()


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_rounding_is_to_the_nearest_value_and_ties_to_the_even_code(element):
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * LARGEST[element] / 3
    values[:5000] *= 2.0**-14
    finite = torch.tensor([value_of(byte, element) for byte in range(128) if is_finite(byte, element)])
    distance = (values.abs().double()[:, None] - finite.double()).abs().min(1).values
    rounded = decode_element(encode_element(values, element), element)
    assert torch.equal((values.double() - rounded.double()).abs(), distance)
    middles = (finite[1:].double() + finite[:-1].double()) / 2
    codes = encode_element(middles.float(), element)
    assert bool((codes % 2 == 0).all())


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_large_values_saturate_and_never_become_nan(element):
    large = torch.tensor([1.01, 1.1, 4.0, 1e30, float("inf")]) * LARGEST[element]
    decoded = decode_element(encode_element(torch.cat([large, -large]), element), element)
    assert decoded.tolist() == [LARGEST[element]] * 5 + [-LARGEST[element]] * 5


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_scales_follow_the_formula(element, granularity, scale_dtype):
    w = weight()
    scheme = Float8(element=element, granularity=granularity, block=(32, 64), scale_dtype=scale_dtype)
    params, codes = scheme.quantize(w)
    boxes = {
        "tensor": [[(0, 96, 0, 200)]],
        "channel": [[(row, row + 1, 0, 200)] for row in range(96)],
        "block": [[(r, r + 32, c, min(c + 64, 200)) for c in range(0, 200, 64)] for r in range(0, 96, 32)],
    }[granularity]
    wanted = torch.tensor([[float(w[a:b, c:d].abs().max()) / LARGEST[element] for a, b, c, d in row] for row in boxes])
    torch.testing.assert_close(params["scale"], wanted.to(getattr(torch, scale_dtype)), rtol=2e-7, atol=0)
    decoded = scheme.decode(codes, params)
    for row, scales in zip(boxes, params["scale"].double(), strict=True):
        for (a, b, c, d), scale in zip(row, scales, strict=True):
            values = torch.tensor([[value_of(x, element) for x in line] for line in codes[a:b, c:d].tolist()])
            torch.testing.assert_close(decoded[a:b, c:d].double(), values.double() * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_compressed_tensors_finds_the_same_scales_and_codes(granularity):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    w = weight((256, 384))
    more = {"block_structure": [128, 128]} if granularity == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=granularity, **more)
    low, high = {
        "tensor": lambda: (w.min(), w.max()),
        "channel": lambda: (w.amin(1, keepdim=True), w.amax(1, keepdim=True)),
        "block": lambda: (
            w.view(2, 128, 3, 128).amin((1, 3)),
            w.view(2, 128, 3, 128).amax((1, 3)),
        ),
    }[granularity]()
    scale, _ = calculate_qparams(low, high, args)
    theirs = quantize(w, scale, None, args, dtype=torch.float8_e4m3fn)
    params, codes = Float8(granularity=granularity).quantize(w)
    assert torch.equal(params["scale"].flatten(), scale.flatten())
    assert torch.equal(codes, theirs.view(torch.uint8))


def test_one_scale_serves_the_tensors_of_a_fused_layer():
    scheme = Float8(granularity="tensor")
    assert scheme.shares
    assert not Float8(granularity="channel").shares
    tensors = [weight((8, 32), seed) * factor for seed, factor in ((0, 1.0), (1, 3.0), (2, 0.2))]
    context = scheme.prepare(tensors)
    scales = {float(scheme.fit(w, context=context)["scale"]) for w in tensors}
    assert scales == {float(max(w.abs().max() for w in tensors) / torch.tensor(448.0))}
    # Neither a clip search nor a refit may tear them apart.
    for w in tensors:
        tried = list(scheme.clipped(w, [1.0, 0.9, 0.5], context))
        assert [float(params["scale"]) for params in tried] == [*scales]
        assert float(scheme.fit(w, context=context, clip=0.5)["scale"]) in scales
        codes = scheme.encode(w, tried[0])
        assert scheme.refit(w, codes, tried[0], weights=None) is tried[0]
    alone = scheme.prepare(tensors[:1])
    assert len({float(p["scale"]) for p in scheme.clipped(tensors[0], [1.0, 0.9], alone)}) == 2


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_a_refit_is_weighted_least_squares(granularity):
    w, importance = weight(), torch.rand(200, generator=torch.Generator().manual_seed(1))
    scheme = Float8(granularity=granularity, block=(32, 64))
    params, codes = scheme.quantize(w)
    found = scheme.refit(w, codes, params, weights=importance)["scale"].double()
    values = scheme.decode(codes, {"scale": torch.ones_like(params["scale"])}).double()
    height, width = (1, 200) if granularity == "channel" else (32, 64)
    for down in range(found.shape[0]):
        for across in range(found.shape[1]):
            box = (slice(down * height, (down + 1) * height), slice(across * width, (across + 1) * width))
            h = importance.double()[box[1]]
            v, x = values[box], w[box].double()
            assert float(found[down, across]) == pytest.approx(float((h * v * x).sum() / (h * v * v).sum()), rel=1e-5)


def test_short_blocks_can_be_sliced_at_the_end():
    scheme = Float8(granularity="block", block=(32, 64))
    w = weight((40, 200))
    params, codes = scheme.quantize(w)
    assert params["scale"].shape == (2, 4)
    part = scheme.columns(params, 128, 200, (40, 200))
    assert torch.equal(scheme.decode(codes[:, 128:], part), scheme.decode(codes, params)[:, 128:])
    with pytest.raises(InputError, match="boundaries"):
        scheme.columns(params, 64, 130, (40, 200))


def test_json_rebuilds_blocks_as_tuples():
    scheme = Float8(
        granularity="block", block=(64, 32), inputs=InputScheme(number="float", strategy="group", group_size=32)
    )
    again = catalog.load_scheme(json.loads(json.dumps(scheme.to_spec())))
    assert again == scheme
    assert hash(again) == hash(scheme)


def test_sizes_and_names():
    assert Float8(granularity="tensor", scale_dtype="bfloat16").bits_per_weight((4, 4)) == 9.0
    assert Float8(granularity="block").bits_per_weight((128, 256)) == 8 + 2 * 32 / (128 * 256)
    assert Float8().describe() == "fp8 e4m3 channel"
    assert Float8(granularity="block", element="e5m2").describe() == "fp8 e5m2 128x128"


def test_weights_that_are_not_finite_are_refused():
    for granularity in ("tensor", "channel", "block"):
        for bad in (float("inf"), float("nan")):
            w = weight((8, 8))
            w[3, 3] = bad
            with pytest.raises(NumericError, match="not finite"):
                Float8(granularity=granularity).quantize(w)
    with pytest.raises(NumericError, match="float16"):
        Float8(scale_dtype="float16").quantize(weight((8, 8)) * 1e12)


@pytest.mark.parametrize(
    "options",
    [{"element": "e3m4"}, {"granularity": "group"}, {"block": (128,)}, {"block": (0, 128)}, {"scale_dtype": "int8"}],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(PlanError):
        Float8(**options)
