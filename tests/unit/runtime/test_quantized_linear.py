"""Packed linears against an explicit decode in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.errors import InputError
from bitwright.runtime.linear import QuantizedLinear
from bitwright.schemes.affine import Affine

SHAPE = (128, 256)
INT4 = [Affine(bits=4, group_size=g) for g in (32, 64, 128, 256)]
INT8 = [
    Affine(bits=8, granularity="channel"),
    Affine(bits=8, granularity="channel", symmetric_range="narrow"),
    Affine(bits=8, group_size=256),
]
PLAIN = [
    Affine(bits=2, group_size=16),
    Affine(bits=3, group_size=32, symmetric=False),
    Affine(bits=4, group_size=64, symmetric=False),
    Affine(bits=4, group_size=16),
    Affine(bits=4, granularity="channel"),
    Affine(bits=5, granularity="channel", symmetric=False),
    Affine(bits=6, group_size=64),
    Affine(bits=8, granularity="tensor"),
    Affine(bits=8, group_size=64),
]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quantized(scheme: Affine, dtype="float32", shape=SHAPE, *, seed=0) -> QuantizedTensor:
    from dataclasses import replace

    scheme = replace(scheme, scale_dtype=dtype)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    params, codes = scheme.quantize(w)
    return QuantizedTensor(scheme, shape, codes, params)


def decoded64(q: QuantizedTensor) -> torch.Tensor:
    """(code - zero) * scale, by hand."""
    scheme = q.scheme
    assert isinstance(scheme, Affine)
    scale = q.params["scale"].double()
    zero = q.params["zero"].double() if "zero" in q.params else torch.full_like(scale, 2 ** (scheme.bits - 1))
    if scheme.granularity != "tensor":
        span = q.shape[1] // scale.shape[1]
        scale, zero = scale.repeat_interleave(span, 1), zero.repeat_interleave(span, 1)
    return (q.codes.double() - zero) * scale


def x_of(*shape: int, dtype=torch.float32, seed=1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("scheme", [*INT4, *INT8, *PLAIN], ids=lambda s: s.describe())
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_float32_output_is_the_product_with_the_decoded_weight(scheme, kernel):
    q, x = quantized(scheme), x_of(5, 256)
    layer = QuantizedLinear(q, None, dtype=torch.float32, kernel=kernel)
    torch.testing.assert_close(layer(x).double(), x.double() @ decoded64(q).T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", [*INT4, *INT8], ids=lambda s: s.describe())
def test_packed_products_are_as_exact_as_their_dtype(scheme, dtype):
    q, x = quantized(scheme, dtype), x_of(9, 256, dtype=DTYPES[dtype])
    layer = QuantizedLinear(q, None, dtype=DTYPES[dtype])
    fast = "int4" if scheme.bits == 4 else "int8"
    assert layer.kernel == (fast if dtype == "bfloat16" else "reference")
    wanted = x.double() @ decoded64(q).T
    found = layer(x)
    assert found.dtype == DTYPES[dtype]
    # Half a unit in the last place for the output, and as much in every decoded weight and product.
    unit = torch.finfo(DTYPES[dtype]).eps
    size = (x.double().square() @ decoded64(q).T.square()).sqrt()
    assert ((found.double() - wanted).abs() <= unit * (wanted.abs() + 2 * size)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [*INT4, *INT8, *PLAIN], ids=lambda s: s.describe())
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_every_kernel_gives_its_weight_back_exactly(scheme, dtype, kernel):
    q = quantized(scheme, dtype)
    layer = QuantizedLinear(q, None, dtype=DTYPES[dtype], kernel=kernel)
    found = layer.decoded()
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, decoded64(q).float())


def test_int4_weights_of_many_columns_come_back_whole():
    q = quantized(Affine(bits=4, group_size=32), "bfloat16", (64, 1184))  # more than are read back at once, and a rest
    layer = QuantizedLinear(q, None, dtype=torch.bfloat16)
    assert layer.kernel == "int4"
    assert torch.equal(layer.decoded(), q.decode())


def test_auto_takes_a_packed_product_only_where_it_is_fast_and_means_the_same():
    for dtype, torch_dtype in DTYPES.items():
        for scheme in [*INT4, *INT8, *PLAIN]:
            packed = {**dict.fromkeys(INT4, "int4"), **dict.fromkeys(INT8, "int8")}.get(scheme, "reference")
            packed = packed if torch_dtype == torch.bfloat16 else "reference"  # the others' products are slow
            assert QuantizedLinear(quantized(scheme, dtype), None, dtype=torch_dtype).kernel == packed
    q = quantized(INT4[0], "float16")
    assert QuantizedLinear(q, None, dtype=torch.bfloat16).kernel == "reference"  # scales would be rounded
    assert QuantizedLinear(q, None, dtype=torch.float16, kernel="reference").kernel == "reference"
    odd = quantized(INT4[0], "bfloat16", (72, 256))  # torch packs 64 rows at a time
    assert QuantizedLinear(odd, None, dtype=torch.bfloat16).kernel == "reference"
    outliers = (torch.tensor([3]), torch.tensor([1.0]))
    with_outliers = QuantizedTensor(q.scheme, q.shape, q.codes, q.params, outliers)
    assert QuantizedLinear(with_outliers, None, dtype=torch.float16).kernel == "reference"


def test_a_kernel_that_would_compute_something_else_is_refused():
    for scheme, kernel in ((PLAIN[2], "int4"), (PLAIN[-1], "int8"), (INT4[0], "int8"), (INT4[0], "marlin")):
        with pytest.raises(InputError, match=kernel):
            QuantizedLinear(quantized(scheme), None, dtype=torch.float32, kernel=kernel)


def test_outliers_are_part_of_the_weight():
    q = quantized(INT4[0], "float32")
    indices, values = torch.tensor([5, 256 * 7 + 200]), torch.tensor([0.5, -0.25])
    with_outliers = QuantizedTensor(q.scheme, q.shape, q.codes, q.params, (indices, values))
    wanted = decoded64(q)
    wanted[0, 5] = 0.5
    wanted[7, 200] = -0.25
    layer, x = QuantizedLinear(with_outliers, None, dtype=torch.float32), x_of(3, 256)
    torch.testing.assert_close(layer(x).double(), x.double() @ wanted.T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scheme", [INT4[0], INT8[0], PLAIN[1]], ids=lambda s: s.describe())
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 7, 256), (2, 3, 2, 256), (0, 256), (1, 0, 256)], ids=str)
def test_any_number_of_leading_dimensions(scheme, shape):
    q, x = quantized(scheme, "bfloat16"), x_of(*shape, dtype=torch.bfloat16)
    bias = x_of(128, dtype=torch.bfloat16, seed=3)
    layer = QuantizedLinear(q, bias, dtype=torch.bfloat16)
    found = layer(x)
    assert found.shape == (*shape[:-1], 128)
    flat = layer(x.reshape(-1, 256)).reshape(found.shape)
    assert torch.equal(found, flat)


@pytest.mark.parametrize("scheme", [INT4[0], INT8[0], PLAIN[1]], ids=lambda s: s.describe())
def test_views_of_activations_are_read_right(scheme):
    q = quantized(scheme, "bfloat16")
    layer = QuantizedLinear(q, None, dtype=torch.bfloat16)
    x = x_of(2, 512, 6, dtype=torch.bfloat16).transpose(1, 2)[:, :, ::2]
    assert not x.is_contiguous()
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("scheme", [INT4[0], INT8[0], PLAIN[1]], ids=lambda s: s.describe())
def test_bias_is_added(scheme):
    q, x, bias = quantized(scheme), x_of(4, 256), x_of(128, seed=3)
    found = QuantizedLinear(q, bias, dtype=torch.float32)(x).double()
    torch.testing.assert_close(found, x.double() @ decoded64(q).T + bias.double(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("scheme", [INT4[0], INT8[0]], ids=lambda s: s.describe())
def test_other_activations_than_planned_for_are_served_by_decoding(scheme):
    q, bias = quantized(scheme, "bfloat16"), x_of(128, dtype=torch.bfloat16, seed=3)
    layer = QuantizedLinear(q, bias, dtype=torch.bfloat16)
    x = x_of(4, 256)
    found = layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ decoded64(q).T + bias.double(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [INT4[0], INT8[0], PLAIN[1]], ids=lambda s: s.describe())
def test_weight_looks_like_a_linear_s(scheme, dtype):
    q = quantized(scheme, dtype)
    layer = QuantizedLinear(q, None, dtype=DTYPES[dtype])
    assert layer.weight.shape == SHAPE
    assert layer.weight.dtype == DTYPES[dtype]
    assert torch.equal(layer.weight, q.decode().to(DTYPES[dtype]))
    assert (layer.out_features, layer.in_features) == SHAPE


@pytest.mark.parametrize("scheme", [INT4[0], INT8[0], PLAIN[0], PLAIN[1]], ids=lambda s: s.describe())
def test_it_holds_no_more_than_packed_codes_and_parameters(scheme):
    layer = QuantizedLinear(quantized(scheme, "bfloat16"), None, dtype=torch.bfloat16)
    assert not list(layer.parameters())
    held = sum(buffer.numel() * buffer.itemsize for buffer in layer.buffers())
    codes = SHAPE[0] * SHAPE[1] * scheme.bits / 8
    scales = sum(p.numel() * p.itemsize for p in quantized(scheme, "bfloat16").params.values())
    assert codes + scales <= held <= codes + 3 * scales
    assert scheme.describe() in repr(layer)


# --- quantized inputs ------------------------------------------------------------------------------------------------------

W8 = {"bits": 8, "granularity": "channel", "scale_dtype": "float32"}


def rounded64(x: torch.Tensor, *, symmetric: bool, per_token: bool) -> torch.Tensor:
    """The textbook formula (arXiv:1712.05877, eq. 1) in float64."""
    x = x.double()
    low, high = (x.amin(-1, True), x.amax(-1, True)) if per_token else (x.min(), x.max())
    if symmetric:
        scale = torch.maximum(-low, high) / 127
        return (x / scale).round().clamp(-128, 127) * scale
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_int8_inputs_follow_the_formula(kernel, symmetric, per_token):
    inputs = InputScheme(strategy="token" if per_token else "tensor", symmetric=symmetric)
    q = quantized(Affine(**W8, inputs=inputs), "float32")
    x = x_of(5, 256) * 3 + 0.5
    layer = QuantizedLinear(q, None, dtype=torch.float32, kernel=kernel)
    assert layer.kernel == ("w8a8" if kernel == "auto" else "reference")
    wanted = rounded64(x, symmetric=symmetric, per_token=per_token) @ decoded64(q).T
    torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-4)


def test_static_inputs_use_the_measured_range():
    inputs = InputScheme(strategy="tensor", dynamic=False)
    q = quantized(Affine(**W8, inputs=inputs), "float32")
    q = replace(q, inputs=inputs.fit(-2.7, 1.0))
    x = x_of(4, 256)
    step = 2.7 / 127
    wanted = ((x.double() / step).round().clamp(-128, 127) * step) @ decoded64(q).T
    for kernel in ("auto", "reference"):
        found = QuantizedLinear(q, None, dtype=torch.float32, kernel=kernel)(x).double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-4)


def test_outlier_columns_are_computed_in_full():
    """LLM.int8: with one column of huge inputs taken out, the others keep their resolution."""
    x = x_of(6, 256)
    x[2, 17] = 400.0
    results = {}
    for threshold in (0.0, 6.0):
        q = quantized(Affine(**W8, inputs=InputScheme(threshold=threshold)), "float32")
        exact = x.double() @ decoded64(q).T
        found = QuantizedLinear(q, None, dtype=torch.float32)(x).double()
        results[threshold] = float(
            (found - exact).square().mean().sqrt() / exact[[0, 1, 3, 4, 5]].square().mean().sqrt()
        )
        inner = x.clone()
        inner[:, 17] = 0
        if threshold:
            wanted = rounded64(inner, symmetric=True, per_token=True) @ decoded64(q).T
            wanted += x[:, 17:18].double() @ decoded64(q)[:, 17:18].T
            torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-5)
    assert results[6.0] < 0.1 * results[0.0]
