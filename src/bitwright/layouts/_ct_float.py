"""compressed-tensors' formats of small floats.

========================= ======================= ============== ============================== ============================
format                    tensor                  dtype          shape                          content
========================= ======================= ============== ============================== ============================
``float-quantized``       ``weight``              float8_e4m3fn  [out, in]
                          ``weight_scale``        model dtype    [1], [out, 1] or blocks        multiplies
``mxfp8-quantized``       ``weight``              float8_e4m3fn  [out, in]
                          ``weight_scale``        uint8          [out, in/32]                   exponent + 127
``mxfp4-pack-quantized``  ``weight_packed``       uint8          [out, in/2]                    even column in the low nibble
                          ``weight_scale``        uint8          [out, in/32]                   exponent + 127
``nvfp4-pack-quantized``  ``weight_packed``       uint8          [out, in/2]                    even column in the low nibble
                          ``weight_scale``        float8_e4m3fn  [out, in/16]
                          ``weight_global_scale`` float32        [1]                            *divides*
========================= ======================= ============== ============================== ============================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.layout import check_stored
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.schemes.float8 import Float8
from bitwright.schemes.microscaling import Microscaling

__all__ = ["pack", "refusal", "tensors", "unpack"]

#: element of a microscaling scheme -> the inputs that go with it beside none
_INPUTS = {
    "nvfp4": (InputScheme(bits=4, number="float", strategy="tensor_group", dynamic=False, group_size=16),),
    "mxfp8": (InputScheme(number="float", strategy="group", group_size=32, power_of_two=True),),
    "mxfp4": (
        InputScheme(bits=4, number="float", strategy="group", group_size=32, power_of_two=True),
        InputScheme(number="float", strategy="token"),
        InputScheme(number="float", strategy="group", group_size=32),
        InputScheme(number="float", strategy="group", group_size=128),
    ),
}


def refusal(scheme: Float8 | Microscaling, shape: tuple[int, int]) -> str | None:
    """Why this weight cannot be stored, or None."""
    rows, columns = shape
    if not rows or not columns:
        return f"a weight of shape {shape} is empty"
    inputs = scheme.inputs
    if isinstance(scheme, Microscaling):
        if columns % scheme.group:
            return f"in_features {columns} is not a multiple of {scheme.group}, the group of {scheme.element}"
        if inputs is not None and inputs not in _INPUTS[scheme.element]:
            listed = ", ".join(known.describe() for known in _INPUTS[scheme.element])
            return f"{scheme.element} weights go with inputs that stay as they are or are {listed}, not {inputs.describe()}"
        return None
    if scheme.element != "e4m3":
        return f"float-quantized holds float8 e4m3, not {scheme.element}"
    if inputs is None:
        return None
    right = inputs.number == "float" and inputs.bits == 8
    if scheme.granularity == "block":
        if not right or inputs.strategy != "group" or inputs.group_size != scheme.block[1] or inputs.power_of_two:
            return f"blocks of float8 go with float8 inputs in dynamic groups of {scheme.block[1]}, not {inputs.describe()}"
    elif not right or not (inputs.strategy == "token" or (inputs.strategy == "tensor" and not inputs.dynamic)):
        return f"float8 weights go with float8 inputs, per token or static per tensor, not {inputs.describe()}"
    return None


def tensors(name: str, scheme: Float8 | Microscaling, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
    rows, columns = shape
    grid = scheme.grid(shape)
    if isinstance(scheme, Float8):
        scale = (1,) if scheme.granularity == "tensor" else grid
        return (
            TensorSpec(f"{name}.weight", shape, torch.float8_e4m3fn),
            TensorSpec(f"{name}.weight_scale", scale, scheme.param_spec(shape)[0].dtype),
        )
    if scheme.element == "mxfp8":
        weight = TensorSpec(f"{name}.weight", shape, torch.float8_e4m3fn)
    else:
        weight = TensorSpec(f"{name}.weight_packed", (rows, columns // 2), torch.uint8)
    if scheme.element != "nvfp4":
        return (weight, TensorSpec(f"{name}.weight_scale", grid, torch.uint8))
    return (
        weight,
        TensorSpec(f"{name}.weight_scale", grid, torch.float8_e4m3fn),
        TensorSpec(f"{name}.weight_global_scale", (1,), torch.float32),
    )


def pack(name: str, scheme: Float8 | Microscaling, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    weight, scale, *divisor = tensors(name, scheme, q.shape)
    codes = q.codes.contiguous()
    codes = codes.clone() if scheme.levels == 256 else codes[:, ::2] | (codes[:, 1::2] << 4)
    scales = q.params["scale"].reshape(scale.shape).clone(memory_format=torch.contiguous_format)
    stored = {
        weight.name: codes.view(weight.dtype),
        scale.name: scales.view(scale.dtype) if isinstance(scheme, Microscaling) else scales,
    }
    for spec in divisor:
        stored[spec.name] = q.params["global_scale"].reshape(1).clone()
    return stored


def unpack(
    name: str, scheme: Float8 | Microscaling, shape: tuple[int, int], stored: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes and parameters. InputError where tensors are missing or contradict each other."""
    weight_spec, scale_spec, *divisor = tensors(name, scheme, shape)
    weight = check_stored(stored, weight_spec).contiguous().view(torch.uint8)
    if scheme.levels == 256:
        codes = weight
    else:
        codes = torch.stack([weight & 15, weight >> 4], dim=-1).view(shape)
    if isinstance(scheme, Microscaling):
        params = {"scale": check_stored(stored, scale_spec).contiguous().view(torch.uint8)}
        for spec in divisor:
            params["global_scale"] = check_stored(stored, spec).reshape(1, 1)
        return codes, params
    wanted = scheme.param_spec(shape)[0]
    scale = stored.get(scale_spec.name)
    # One scale may be a scalar or [1, 1] in files of other writers.
    if scale is None or scale.numel() != wanted.shape[0] * wanted.shape[1]:
        raise InputError(
            f"tensor '{scale_spec.name}' is missing or has another shape than {scale_spec.shape}", mend="fetch it again"
        )
    return codes, {"scale": scale.reshape(wanted.shape).to(wanted.dtype)}
