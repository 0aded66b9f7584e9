"""MXFP4, MXFP8 and NVFP4 against the specification, compressed-tensors' own quantizer and gguf's decoder."""

from __future__ import annotations

import pytest
import torch

from bitwright.core.quantized import QuantizedTensor
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.schemes._floats import decode_e8m0, decode_element, encode_element
from bitwright.schemes.microscaling import Microscaling

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ELEMENTS = ("mxfp4", "mxfp8", "nvfp4")


def weight(shape=(48, 128), seed=0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=rng) * 0.02 * torch.exp2(torch.randint(-6, 7, (shape[0], 1), generator=rng))
    w[1] = 0
    w[2, 64:] = 0
    return w


def args_of(element: str):
    from compressed_tensors.quantization import QuantizationArgs

    if element == "nvfp4":
        kind = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    else:
        kind = {"num_bits": int(element[-1]), "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    return QuantizationArgs(type="float", symmetric=True, dynamic=False, **kind)


def test_e2m1_codes_round_to_nearest_and_ties_to_even():
    x = torch.linspace(-7, 7, 28001)
    codes = encode_element(x, "e2m1")
    levels = torch.tensor(E2M1).double()
    distance = (x.abs().double()[:, None] - levels).abs().min(1).values
    assert torch.equal((decode_element(codes, "e2m1").double() - x.double()).abs(), distance)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert encode_element(middles, "e2m1").tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert encode_element(-middles, "e2m1").tolist() == [8, 10, 10, 12, 12, 14, 14]
    above = torch.nextafter(middles, torch.tensor(9.0))
    below = torch.nextafter(middles, torch.tensor(0.0))
    assert encode_element(above, "e2m1").tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert encode_element(below, "e2m1").tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_e8m0_bytes_are_powers_of_two():
    bytes_ = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(decode_e8m0(bytes_).double(), torch.exp2(bytes_.double() - 127))


@pytest.mark.parametrize("element", ELEMENTS)
def test_compressed_tensors_finds_the_same_scales_and_codes(element):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    w, args = weight(), args_of(element)
    groups = w.view(48, -1, args.group_size)
    divisor = generate_gparam(w.min(), w.max()) if element == "nvfp4" else None
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=divisor)
    theirs = quantize(w, scale, None, args, global_scale=divisor)
    scheme = Microscaling(element=element)
    params, codes = scheme.quantize(w, context=scheme.prepare([w]))
    if element == "nvfp4":
        assert torch.equal(params["scale"].view(torch.float8_e4m3fn).float(), scale)
        assert torch.equal(params["global_scale"].view(1), divisor)
    else:
        assert torch.equal(params["scale"], compress_mx_scale(scale, torch.uint8))
    assert torch.equal(decode_element(codes, scheme.values), theirs)


@pytest.mark.parametrize("element", ELEMENTS)
def test_compressed_tensors_decodes_the_same_weight(element):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    w, args, scheme = weight(), args_of(element), Microscaling(element=element)
    params, codes = scheme.quantize(w)
    if element == "nvfp4":
        scale, divisor = params["scale"].view(torch.float8_e4m3fn).float(), params["global_scale"].view(1)
    else:
        scale, divisor = torch.exp2(params["scale"].float() - 127), None
    theirs = dequantize(decode_element(codes, scheme.values), scale, None, args, global_scale=divisor)
    assert torch.equal(scheme.decode(codes, params), theirs)


def test_gguf_reads_the_same_numbers():
    """llama.cpp's MXFP4: the byte of the scale, then nibbles, element j low and element j + 16 high."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    w, scheme = weight((8, 96)), Microscaling(element="mxfp4")
    params, codes = scheme.quantize(w)
    blocks = codes.view(8, 3, 32)
    nibbles = blocks[..., :16] | (blocks[..., 16:] << 4)
    data = torch.cat([params["scale"].unsqueeze(-1), nibbles], dim=-1).view(8, -1).numpy()
    theirs = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType.MXFP4))
    torch.testing.assert_close(scheme.decode(codes, params), theirs, rtol=0, atol=2.0**-126)


@pytest.mark.parametrize(
    ("amax", "byte"), [(6.0, 127), (4.0, 127), (6.99, 127), (7.0, 128), (3.5, 127), (3.49, 126), (0.0, 0), (1e-44, 0)]
)
def test_mxfp4_exponents_by_hand(amax, byte):
    w = torch.zeros(1, 32)
    w[0, 5] = -amax
    assert int(Microscaling().fit(w)["scale"]) == byte


def test_mxfp8_exponents_by_hand():
    w = torch.zeros(3, 32)
    w[:, 0] = torch.tensor([448.0, 447.9, 256.0])
    # The mantissa of 448 is 1.75, which rounds up.
    assert Microscaling(element="mxfp8").fit(w)["scale"].flatten().tolist() == [128, 127, 127]


def test_nvfp4_by_hand():
    scheme = Microscaling(element="nvfp4")
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 16] = 12.0, -3.0
    params, codes = scheme.quantize(w)
    assert float(params["global_scale"]) == 448 * 6 / 12
    # 12/6 * 224 = 448 and 3/6 * 224 = 112
    assert params["scale"].view(torch.float8_e4m3fn).float().tolist() == [[448.0, 112.0]]
    assert codes[0, [0, 16]].tolist() == [7, 15]
    assert torch.equal(scheme.decode(codes, params), w)


def test_one_divisor_serves_the_tensors_of_a_fused_layer():
    scheme = Microscaling(element="nvfp4")
    assert scheme.shares
    assert not Microscaling(element="mxfp4").shares
    tensors = [weight(seed=seed) for seed in range(3)]
    context = scheme.prepare(tensors)
    largest = max(float(w.abs().max()) for w in tensors)
    for w in tensors:
        params, _ = scheme.quantize(w, context=context)
        assert float(params["global_scale"]) == pytest.approx(2688 / largest, rel=1e-6)


def test_rows_fitted_apart_come_under_one_divisor():
    scheme = Microscaling(element="nvfp4")
    w = weight()
    parts = [scheme.fit(part) for part in w.split(16)]
    loose = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stored = scheme.finish(loose, (48, 128))
    QuantizedTensor(scheme, (48, 128), scheme.encode(w, stored), stored)
    whole, codes = scheme.quantize(w)
    assert torch.equal(stored["global_scale"], whole["global_scale"])
    error = float((scheme.decode(scheme.encode(w, stored), stored) - w).norm())
    # Scales are rounded twice, which costs a little.
    assert error < 1.05 * float((scheme.decode(codes, whole) - w).norm())


@pytest.mark.parametrize("element", ["mxfp4", "nvfp4"])
def test_a_search_over_scales_beats_the_first_candidate(element):
    scheme, w = Microscaling(element=element), weight()
    context = scheme.prepare([w])
    clips = [1.0 - 0.025 * step for step in range(21)]
    errors = []
    for params in scheme.clipped(w, clips, context):
        error = (scheme.decode(scheme.encode(w, params), params) - w).square()
        errors.append(error.view(48, -1, scheme.group).sum(-1))
    assert errors[0].sum() > torch.stack(errors).min(0).values.sum()
    [only] = scheme.clipped(w, [1.0], context)
    assert all(torch.equal(value, scheme.fit(w, context=context)[name]) for name, value in only.items())


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_refit_takes_the_storable_scale_nearest_to_least_squares(element):
    scheme, w = Microscaling(element=element), weight()
    params, codes = scheme.quantize(w, context=scheme.prepare([w]))
    h = torch.rand(128, generator=torch.Generator().manual_seed(1))
    again = scheme.refit(w, codes, params, weights=h)
    values = decode_element(codes, scheme.values).double().view(48, -1, scheme.group)
    x, h = w.double().view(48, -1, scheme.group), h.double().view(-1, scheme.group)
    below = (h * values * values).sum(-1)
    best = (h * values * x).sum(-1) / below
    if element == "nvfp4":
        grid = (
            torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / params["global_scale"].double()
        )
    else:
        grid = torch.exp2(torch.arange(255).double() - 127)[None]
    nearest = (grid[..., None, None, :].flatten(0, -2) - best[..., None]).abs().min(-1).values
    steps = scheme._step(again).double()
    used = below > 0
    assert used.sum() > 48
    torch.testing.assert_close((steps - best).abs()[used], nearest[used], rtol=1e-4, atol=1e-9)


def test_sizes_and_names():
    assert Microscaling().bits_per_weight((64, 128)) == 4.25
    assert Microscaling(element="mxfp8").bits_per_weight((64, 128)) == 8.25
    assert Microscaling(element="nvfp4").bits_per_weight((64, 128)) == 4.5 + 32 / (64 * 128)
    assert [Microscaling(element=e).describe() for e in ELEMENTS] == list(ELEMENTS)


def test_what_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="multiple"):
        Microscaling().grid((8, 48))
    with pytest.raises(PlanError, match="mxfp6"):
        Microscaling(element="mxfp6")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="boundaries"):
        Microscaling().columns({}, 8, 32, (8, 64))
    for element in ELEMENTS:
        w = weight()
        w[0, 0] = float("nan")
        with pytest.raises(NumericError, match="not finite"):
            Microscaling(element=element).quantize(w)
