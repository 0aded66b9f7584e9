"""What every catalogued scheme must do. A new file in ``schemes`` is picked up here by itself."""

from __future__ import annotations

import json

import pytest
import torch

from bitwright import catalog
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import AffineCodec, Scheme
from bitwright.errors import InputError, NumericError, PlanError

SHAPE = (64, 512)
#: Options worth trying beside the defaults; a scheme that is not listed is tried with its defaults.
OPTIONS = {
    "affine": [
        {"bits": bits, "symmetric": symmetric, **where}
        for bits in (2, 3, 4, 5, 6, 8)
        for symmetric in (True, False)
        for where in ({"group_size": 32}, {"group_size": 64}, {"granularity": "channel"}, {"granularity": "tensor"})
    ]
    + [
        {"symmetric_range": "narrow", "bits": 8, "granularity": "channel"},
        {"scale_dtype": "bfloat16"},
        {"scale_dtype": "float32", "group_size": 256},
        {"symmetric": False, "zero_min": 1},
    ],
    "float8": [
        {"element": element, **where}
        for element in ("e4m3", "e5m2")
        for where in (
            {"granularity": "tensor"},
            {"granularity": "channel"},
            {"granularity": "channel", "scale_dtype": "bfloat16"},
            {"granularity": "tensor", "scale_dtype": "float16"},
            {"granularity": "block"},
            {"granularity": "block", "block": (48, 96)},
        )
    ]
    + [{"inputs": {"number": "float"}}],
    "codebook": [
        {"book": book, "block_size": block, "double_quant": double}
        for book in ("nf4", "fp4", "kmeans")
        for block in (32, 64, 1024)  # the last spans two rows
        for double in (False, True)
    ]
    + [
        {"book": "kmeans", "bits": 2},
        {"book": "kmeans", "bits": 8, "block_size": 4096},
        {"book": "custom", "bits": 2, "table": [-1.0, -0.25, 0.3]},
    ],
    "bilevel": [
        {"outliers": 0.0},
        {"outliers": 0.0, "bits": 2, "group_size": 32, "super_group": 24, "zero_bits": 0},
        {"outliers": 0.0, "bits": 4, "group_size": 64, "scale_bits": 6, "zero_bits": 4, "super_group": 1},
    ],
    "ternary": [{}, {"granularity": "channel"}, {"granularity": "tensor", "scale_dtype": "float32"}],
    "binary": [{}, {"granularity": "channel"}, {"granularity": "tensor", "scale_dtype": "float32"}],
    "microscaling": [{"element": element} for element in ("mxfp4", "mxfp8", "nvfp4")],
    "ggml": [
        {"type": kind}
        for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
    ],
}


def instances() -> list[Scheme]:
    return [
        catalog.load_scheme({"kind": name, **o}) for name in catalog.names("schemes") for o in OPTIONS.get(name, [{}])
    ]


def weight(kind: str, shape=SHAPE) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02
    if kind == "constant":
        w.fill_(0.013)
    elif kind == "zero":
        w.zero_()
    elif kind == "denormal":
        w *= 1e-42
    elif kind == "outlier":
        w[3, 77] = 50.0
    elif kind == "mixed":
        w[0].zero_()
        w[1].fill_(-0.5)
        w[2] *= 1e-30
        w[3].abs_()
    return w


def quantized(scheme: Scheme, w: torch.Tensor) -> QuantizedTensor:
    context = scheme.prepare([w])
    try:
        params, codes = scheme.quantize(w, context=context)
    except PlanError as error:
        if "for reading" not in error.message:  # the one reason for which a scheme may refuse to fit
            raise
        pytest.skip("for reading alone")
    return QuantizedTensor(scheme, (w.shape[0], w.shape[1]), codes, params)


schemes = pytest.mark.parametrize("scheme", instances(), ids=lambda s: json.dumps(s.to_spec())[1:-1].replace('"', ""))


@schemes
def test_parameters_and_codes_obey_the_announced_sizes(scheme):
    q = quantized(scheme, weight("normal"))  # its constructor compares with param_spec
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < scheme.levels <= 2**scheme.code_bits


@schemes
def test_reencoding_decoded_values_is_stable(scheme):
    for kind in ("normal", "outlier", "mixed"):
        q = quantized(scheme, weight(kind))
        codes = scheme.encode(q.decode(), q.params)
        # Codes may differ where two of them stand for one value (FP4 has two zeros).
        assert torch.equal(codes, q.codes) or torch.equal(scheme.decode(codes, q.params), q.decode()), kind


@schemes
@pytest.mark.parametrize("kind", ["constant", "zero", "denormal", "outlier", "mixed"])
def test_degenerate_tiles_stay_finite(scheme, kind):
    w = weight(kind)
    q = quantized(scheme, w)
    decoded = q.decode()
    assert torch.isfinite(decoded).all()
    assert all(torch.isfinite(p.float()).all() for p in q.params.values())
    if kind == "zero":
        assert not decoded.any()
    if kind == "denormal":
        assert float(decoded.abs().max()) < 1e-4


@schemes
def test_huge_weights_are_finite_or_a_numeric_error(scheme):
    w = weight("normal") * 1e8
    mend, q = "", None
    try:
        q = quantized(scheme, w)
    except NumericError as error:
        mend = error.mend
    assert mend if q is None else torch.isfinite(q.decode()).all()


@schemes
def test_columns_equal_slicing(scheme):
    w = weight("normal")
    q = quantized(scheme, w)
    span = scheme.span(SHAPE[1])
    for start in range(0, SHAPE[1], span):
        stop = min(start + span, SHAPE[1])
        part = scheme.columns(q.params, start, stop, SHAPE)
        codes = q.codes[:, start // scheme.vector : stop // scheme.vector]
        assert torch.equal(scheme.decode(codes.contiguous(), part), q.decode()[:, start:stop])
    if 1 < span < SHAPE[1]:
        with pytest.raises(InputError, match="tile"):
            scheme.columns(q.params, 1, span, SHAPE)


@schemes
def test_the_codec_says_what_decode_does(scheme):
    q = quantized(scheme, weight("mixed"))
    codec = scheme.codec(q.params, SHAPE)
    scale = codec.scale[:, codec.tile]
    if isinstance(codec, AffineCodec):
        values = (q.codes.float() - codec.zero[:, codec.tile]) * scale
        assert codec.low <= int(q.codes.min())
        assert int(q.codes.max()) <= codec.high
    else:
        # Not every code need be in the table (float formats have two zeros), so codes are drawn from it.
        index = torch.randint(len(codec.table), SHAPE, generator=torch.Generator().manual_seed(3))
        codes = index if codec.codes is None else codec.codes[index]
        q = QuantizedTensor(scheme, SHAPE, codes.to(torch.uint8), q.params)
        values = codec.table[index] * scale
        assert bool((codec.table.diff() > 0).all())
    # An offset that becomes a zero point is rounded once more, and a scale of zero is stood for by a tiny one.
    decoded = q.decode()
    torch.testing.assert_close(values, decoded, rtol=1e-6, atol=1e-6 * float(decoded.abs().max()) + 1e-30)


@schemes
def test_inputs_are_not_changed_and_results_repeat(scheme):
    w = weight("normal")
    before = w.clone()
    one, two = quantized(scheme, w), quantized(scheme, w)
    assert one.equals(two)
    assert torch.equal(w, before)


@schemes
def test_the_spec_rebuilds_the_scheme(scheme):
    assert catalog.load_scheme(json.loads(json.dumps(scheme.to_spec()))) == scheme


@schemes
def test_sizes_add_up(scheme):
    specs = scheme.param_spec(SHAPE)
    stored = sum(8 * spec.nbytes for spec in specs) + SHAPE[0] * SHAPE[1] / scheme.vector * scheme.code_bits
    # Zero points take a byte in memory and no more than code_bits when packed.
    assert scheme.bits_per_weight(SHAPE) * SHAPE[0] * SHAPE[1] <= stored + 1e-6


@schemes
def test_more_importance_never_breaks_a_fit(scheme):
    w = weight("mixed")
    context = scheme.prepare([w])
    importance = torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(1))
    importance[:10] = 0.0
    quantized(scheme, w)  # skips schemes that do not fit
    params, codes = scheme.quantize(w, weights=importance, context=context)
    assert torch.isfinite(scheme.decode(codes, params)).all()
