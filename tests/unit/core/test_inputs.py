"""How layer inputs are rounded: against compressed_tensors, torch, and the formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bitwright import catalog
from bitwright.core.inputs import InputScheme
from bitwright.errors import InputError, NumericError, PlanError

SCHEMES: dict[str, dict[str, Any]] = {
    "int8 token": {},
    "int8 token asym": {"symmetric": False},
    "int8 tensor": {"strategy": "tensor"},
    "int8 tensor asym": {"strategy": "tensor", "symmetric": False},
    "int8 tensor static": {"strategy": "tensor", "dynamic": False},
    "int8 tensor asym static": {"strategy": "tensor", "dynamic": False, "symmetric": False},
    "int8 group 16": {"strategy": "group", "group_size": 16},
    "int8 token outliers above 6": {"threshold": 6.0},
    "fp8 token": {"number": "float"},
    "fp8 tensor": {"number": "float", "strategy": "tensor"},
    "fp8 tensor static": {"number": "float", "strategy": "tensor", "dynamic": False},
    "fp8 group 16": {"number": "float", "strategy": "group", "group_size": 16},
    "fp4 group 32": {"number": "float", "bits": 4, "strategy": "group", "group_size": 32, "power_of_two": True},
    "fp4 tensor_group 16 static": {
        "number": "float", "bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": False,
    },
}  # fmt: skip
#: The same sixteen groups of 16 everywhere.
COLUMNS = 256


@pytest.fixture(params=SCHEMES)
def scheme(request) -> InputScheme:
    return InputScheme(**SCHEMES[request.param])


def inputs(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(*(shape or (7, COLUMNS)), generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 1, x.shape[-1]) * scale


def params_of(scheme: InputScheme, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return scheme.fit(float(x.min()), float(x.max()))


def args_of(scheme: InputScheme, ct: Any) -> Any:
    """compressed_tensors' description of the same rounding."""
    return ct.QuantizationArgs(
        num_bits=scheme.bits, type=scheme.number, strategy=scheme.strategy, symmetric=scheme.symmetric, dynamic=scheme.dynamic,
        group_size=scheme.group_size,
    )  # fmt: skip


# --- the grids -----------------------------------------------------------------------------------------------------------


def e4m3() -> np.ndarray:
    """All finite float8 e4m3fn values, from the definition: bias 7, subnormals, no infinity, S.1111.111 is NaN."""
    values = [
        (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
        if not (e == 15 and m == 7)
    ]
    return np.array(sorted({sign * v for v in values for sign in (1, -1)}))


E2M1 = np.array([-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Nearest grid value; ties go to the value with an even code, which is every other one from zero on."""
    order = np.abs(np.arange(len(grid)) - len(grid) // 2) % 2
    distance = np.abs(x[..., None] - grid)
    least = distance.min(-1, keepdims=True)
    even = np.where((distance == least) & (order == 0), distance, np.inf)
    return np.where(np.isfinite(even).any(-1), grid[even.argmin(-1)], grid[distance.argmin(-1)])


def test_float_grids_round_to_the_nearest_value_and_ties_to_even():
    for bits, grid in ((8, e4m3()), (4, E2M1)):
        scheme = InputScheme(bits=bits, number="float", strategy="tensor", dynamic=False)
        ties = (grid[1:] + grid[:-1]) / 2
        x = torch.tensor(np.concatenate([grid, ties, ties * (1 + 1e-6), ties * (1 - 1e-6)]), dtype=torch.float32)
        found = scheme.apply(x, {"input_scale": torch.ones(1)})
        np.testing.assert_array_equal(found.double().numpy(), nearest(x.double().numpy(), grid))


def test_what_lies_beyond_a_static_range_saturates():
    x = torch.tensor([[-1e30, -2.0, 2.0, 1e30]])
    unit = {"input_scale": torch.ones(1)}
    for options, ends in (
        ({}, (-128.0, 127.0)),  # as int8 saturates in serving engines
        ({"number": "float"}, (-448.0, 448.0)),
        ({"number": "float", "bits": 4}, (-6.0, 6.0)),
    ):
        scheme = InputScheme(strategy="tensor", dynamic=False, **options)
        assert scheme.apply(x, unit).tolist() == [[ends[0], -2.0, 2.0, ends[1]]]


# --- compressed_tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8 token asym", "int8 tensor asym", "fp8 token", "fp8 tensor", "fp8 group 16"])
def test_dynamic_inputs_equal_those_of_compressed_tensors(name):
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scheme, x = InputScheme(**SCHEMES[name]), inputs(1, 7, COLUMNS)
    args = args_of(scheme, ct)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    wanted = ct.lifecycle.fake_quantize(x, scale, zero, args)
    found = scheme.apply(x)
    # Their float8 scale is amax / (896 / 2), ours amax / 448; both are float32 arithmetic in another order.
    step = scale.max() * (1 if scheme.number == "int" else 32)
    assert (found - wanted).abs().max() <= step
    assert float(((found - wanted).abs() > 1e-5 * x.abs().max()).float().mean()) < 2e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_static_int8_rounding_equals_that_of_compressed_tensors(symmetric, clip):
    ct = pytest.importorskip("compressed_tensors.quantization")
    scheme = InputScheme(strategy="tensor", dynamic=False, symmetric=symmetric)
    x = inputs(3, 7, COLUMNS)
    params = scheme.fit(clip * float(x.min()), clip * float(x.max()))
    zero = params.get("input_zero", torch.zeros(1, dtype=torch.int8))
    wanted = ct.lifecycle.fake_quantize(x, params["input_scale"], zero, args_of(scheme, ct))
    assert torch.equal(scheme.apply(x, params), wanted)


def test_nvfp4_inputs_equal_those_of_compressed_tensors():
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme, x = InputScheme(**SCHEMES["fp4 tensor_group 16 static"]), inputs(7, COLUMNS)
    x[3, 32:48] = 0
    global_scale = generate_gparam(x.min(), x.max())
    params = params_of(scheme, x)
    torch.testing.assert_close(params["input_scale"], 1 / global_scale)
    args = ct.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", symmetric=True, dynamic="local", group_size=16,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    groups = x.unflatten(-1, (-1, 16))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=global_scale)
    # Their fp4 cast is compiled, which needs a C++ compiler; the nearest value is written out above.
    step = (scale.float() / global_scale)[..., None].double().numpy()
    wanted = (nearest(groups.double().numpy() / step, E2M1) * step).reshape(x.shape)
    assert bool((zero == 0).all())
    different = np.abs(scheme.apply(x, params).double().numpy() - wanted) > 1e-6 * np.abs(wanted)
    assert different.mean() < 2e-3


# --- formulas ----------------------------------------------------------------------------------------------------------------


def test_int8_per_token_scales_by_the_largest_magnitude():
    x = inputs().double().numpy()
    scale = np.abs(x).max(-1, keepdims=True) / 127
    wanted = np.round(x / scale) * scale
    found = InputScheme().apply(torch.from_numpy(x).float()).double().numpy()
    # Quotients that fall on a tie in one precision alone may go the other way.
    assert np.mean(np.abs(found - wanted) > 1e-5 * scale) < 1e-3
    assert (np.abs(found - wanted) <= 1.001 * scale).all()


def test_torch_rounds_static_int8_alike():
    x = inputs()
    for low, high in ((-3.0, 3.0), (-0.4, 5.0)):
        scheme = InputScheme(strategy="tensor", dynamic=False, symmetric=low == -high)
        params = scheme.fit(low, high)
        zero = params.get("input_zero", torch.zeros(1, dtype=torch.int8))
        wanted = torch.fake_quantize_per_tensor_affine(x, params["input_scale"][0], zero[0].int(), -128, 127)
        found = scheme.apply(x, params)
        assert float(((found - wanted).abs() > 1e-5).float().mean()) < 1e-3
        assert float((found - wanted).abs().max()) <= 1.001 * float(params["input_scale"])


@pytest.mark.parametrize(("options", "grid", "largest_exponent"), [
    ({"number": "float"}, e4m3(), 8), ({"number": "float", "bits": 4}, E2M1, 2), ({}, np.arange(-128.0, 128.0), 6),
])  # fmt: skip
def test_microscaling_takes_the_exponent_of_the_largest_value(options, grid, largest_exponent):
    scheme = InputScheme(strategy="group", group_size=32, power_of_two=True, **options)
    x = torch.cat(
        [inputs(seed=1), inputs(seed=2, scale=1e-20), inputs(seed=3, scale=1e20), torch.full((1, COLUMNS), 8.0)]
    )
    groups = x.double().numpy().reshape(len(x), -1, 32)
    scale = 2.0 ** (np.floor(np.log2(np.abs(groups).max(-1, keepdims=True))) - largest_exponent)
    clipped = np.clip(groups / scale, grid.min(), grid.max())
    np.testing.assert_array_equal(
        scheme.apply(x).double().numpy(), (nearest(clipped, grid) * scale).reshape(x.shape).astype(np.float32)
    )
    codes, found, _ = scheme.codes(x)
    assert codes.shape == (len(x), COLUMNS // 32, 32)
    np.testing.assert_array_equal(found.double().numpy(), scale)


def test_columns_with_outliers_stay_and_do_not_widen_the_scales():
    x = inputs(9, 32, scale=0.1).bfloat16()
    x[4, 3], x[1, 30] = 70.0, -8.5
    found = InputScheme(threshold=6.0).apply(x)
    outlier = (x.float().abs() > 6).any(0)
    assert outlier.nonzero()[:, 0].tolist() == [3, 30]
    assert torch.equal(found[:, outlier], x[:, outlier])
    rest = x[:, ~outlier].double()
    scale = rest.abs().amax(1, keepdim=True) / 127
    assert bool(((found[:, ~outlier].double() - rest).abs() <= 0.51 * scale + 2.0**-8 * rest.abs()).all())
    assert torch.equal(InputScheme(threshold=100.0).apply(x), InputScheme().apply(x))


def test_static_parameters_are_those_of_the_range():
    fitted = InputScheme(strategy="tensor", dynamic=False).fit(-2.0, 12.7)
    assert fitted["input_scale"].tolist() == pytest.approx([0.1])
    fitted = InputScheme(strategy="tensor", dynamic=False, symmetric=False).fit(-1.0, 24.5)
    assert fitted["input_scale"].tolist() == pytest.approx([0.1])
    assert fitted["input_zero"].tolist() == [-118]
    fitted = InputScheme(number="float", strategy="tensor", dynamic=False).fit(-44.8, 3.0)
    assert fitted["input_scale"].tolist() == pytest.approx([0.1])
    fitted = InputScheme(**SCHEMES["fp4 tensor_group 16 static"]).fit(0.0, 26.88)
    assert fitted["input_scale"].tolist() == pytest.approx([0.01])


def test_a_static_range_always_holds_zero():
    scheme = InputScheme(strategy="tensor", dynamic=False, symmetric=False)
    for low, high, zero in ((5.0, 10.0, -128), (-10.0, -5.0, 127), (0.0, 0.0, -128)):
        fitted = scheme.fit(low, high)
        assert fitted["input_zero"].tolist() == [zero]
        assert scheme.apply(torch.zeros(1, 3), fitted).tolist() == [[0.0, 0.0, 0.0]]


# --- properties of all schemes -------------------------------------------------------------------------------------------------


def test_parameters_are_those_announced(scheme):
    found = params_of(scheme, inputs())
    assert {(n, tuple(v.shape), v.dtype) for n, v in found.items()} == {
        (spec.name, spec.shape, spec.dtype) for spec in scheme.param_spec()
    }
    assert bool(found) != scheme.dynamic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_stay_and_the_input_is_left_alone(scheme, dtype):
    for shape in ((COLUMNS,), (3, COLUMNS), (2, 3, COLUMNS)):
        x = inputs(*shape).to(dtype)
        before = x.clone()
        found = scheme.apply(x, params_of(scheme, x))
        assert found.shape == x.shape
        assert found.dtype == dtype
        assert torch.equal(x, before)


def test_errors_stay_below_what_the_grid_allows(scheme):
    x = inputs()
    params = params_of(scheme, x)
    codes, scale, zero = scheme.codes(x, params)
    view = x.reshape(codes.shape)
    error = (view - (codes - zero) * scale).abs()
    if scheme.number == "int":
        # A rounded zero point may push one end out of the range by half a step.
        limit = scale * (0.501 if scheme.symmetric else 1.001) * torch.ones_like(error)
    else:
        relative, smallest = (2.0**-4, 2.0**-10) if scheme.bits == 8 else (0.25, 0.25)
        limit = torch.maximum(view.abs() * relative, scale * smallest) * 1.001
        # OCP's floor of the exponent lets up to a quarter of the largest values saturate; fp4 at most 8 to 6.
        limit = torch.where(view.abs() > scale * scheme.largest, view.abs() * 0.251, limit)
    assert bool((error <= limit).all())


def test_zero_stays_zero(scheme):
    x = inputs()
    x[:, ::3] = 0
    x[2] = 0
    found = scheme.apply(x, params_of(scheme, x))
    assert bool((found[x == 0] == 0).all())
    assert torch.equal(scheme.apply(torch.zeros_like(x), scheme.fit(0.0, 0.0)), torch.zeros_like(x))


def test_values_on_the_grid_stay(scheme):
    if scheme.dynamic and not scheme.symmetric:
        pytest.skip("rounding may shrink the range, and with it the grid")
    x = inputs()
    params = params_of(scheme, x)
    once = scheme.apply(x, params)
    torch.testing.assert_close(scheme.apply(once, params), once, rtol=1e-6, atol=0)


def test_no_token_is_no_error(scheme):
    x = torch.zeros(0, COLUMNS)
    assert scheme.apply(x, scheme.fit(-1.0, 1.0)).shape == (0, COLUMNS)


def test_nan_stays_visible(scheme):
    x = inputs()
    x[1, 5] = math.nan
    assert bool(scheme.apply(x, scheme.fit(-10.0, 10.0))[1, 5].isnan())


def test_infinity_never_becomes_a_plausible_number(scheme):
    x = inputs()
    x[1, 5] = math.inf
    found = scheme.apply(x, scheme.fit(-10.0, 10.0))[1, 5]
    largest = {"tensor": 10.0, "tensor_group": 10.0}.get(scheme.strategy, 0.0)
    assert not bool(found.isfinite()) or (not scheme.dynamic and float(found) == pytest.approx(largest, rel=0.01))


def test_tokens_do_not_influence_each_other_unless_they_share_a_scale(scheme):
    x = inputs()
    params = params_of(scheme, x)
    alone = torch.cat([scheme.apply(row[None], params) for row in x])
    shares = scheme.dynamic and scheme.strategy == "tensor"
    assert torch.equal(alone, scheme.apply(x, params)) != (shares or scheme.threshold > 0)


def test_specs_rebuild_it(scheme):
    affine = catalog.load_scheme({"kind": "affine", "bits": 8, "granularity": "channel", "inputs": scheme.to_spec()})
    assert affine.inputs == scheme
    assert catalog.load_scheme(affine.to_spec()) == affine
    assert InputScheme().to_spec() == {}


def test_descriptions_name_what_differs():
    assert [InputScheme(**options).describe() for options in SCHEMES.values()] == list(SCHEMES)


# --- refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"bits": 4}, {"bits": 16, "number": "float"}, {"number": "complex"}, {"strategy": "channel"},
    {"group_size": 16}, {"strategy": "group"}, {"strategy": "group", "group_size": 0},
    {"dynamic": False}, {"strategy": "group", "group_size": 16, "dynamic": False},
    {"strategy": "tensor_group", "group_size": 16, "number": "float", "bits": 4},
    {"number": "float", "symmetric": False}, {"strategy": "group", "group_size": 16, "symmetric": False},
    {"power_of_two": True}, {"threshold": -1.0}, {"threshold": 6.0, "strategy": "tensor"},
    {"threshold": 6.0, "number": "float"},
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_a_mend(options):
    with pytest.raises(PlanError) as caught:
        InputScheme(**options)
    assert caught.value.mend


def test_static_inputs_need_their_parameters():
    scheme = InputScheme(strategy="tensor", dynamic=False)
    for params in (None, {}):
        with pytest.raises(InputError, match="input_scale"):
            scheme.apply(inputs(), params)
    for low, high in ((-math.inf, 1.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(NumericError, match="finite"):
            scheme.fit(low, high)


def test_columns_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(InputError, match="multiple of input group size 16"):
        InputScheme(**SCHEMES["fp8 group 16"]).apply(inputs(2, 24))
