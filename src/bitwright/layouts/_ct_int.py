"""compressed-tensors' ``int-quantized``: 8-bit integers as signed bytes, for products of int8 by int8.

===================== ============= ======================== =================================
``weight``            int8          [out, in]                code - 128
``weight_scale``      model dtype   [out, 1], [1] per tensor
``weight_zero_point`` int8          like the scale           asymmetric weights alone
===================== ============= ======================== =================================

Files of other writers may hold groups too, ``weight_scale [out, G]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitwright.core.layout import check_stored
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.schemes.affine import Affine

__all__ = ["pack", "refusal", "tensors", "unpack"]


def refusal(scheme: Affine, shape: tuple[int, int]) -> str | None:
    """Why this weight cannot be stored, or None."""
    if not shape[0] or not shape[1]:
        return f"a weight of shape {shape} is empty"
    if scheme.bits != 8:
        return f"int-quantized holds 8-bit codes, not {scheme.bits} bits"
    if scheme.symmetric and scheme.symmetric_range != "full":
        # Readers cannot tell the two ranges apart, and what is read back must be what was written.
        return "its symmetric range is 'full'"
    inputs = scheme.inputs
    if inputs is None:
        return None
    per_token = inputs.strategy == "token" and not inputs.threshold
    if inputs.number != "int" or not (per_token or (inputs.strategy == "tensor" and not inputs.dynamic)):
        return f"int8 weights go with int8 inputs, per token or static per tensor, not {inputs.describe()}"
    return None


def tensors(name: str, scheme: Affine, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
    scale = (1,) if scheme.granularity == "tensor" else scheme.grid(shape)
    specs = [
        TensorSpec(f"{name}.weight", shape, torch.int8),
        TensorSpec(f"{name}.weight_scale", scale, scheme.param_spec(shape)[0].dtype),
    ]
    if not scheme.symmetric:
        specs.append(TensorSpec(f"{name}.weight_zero_point", scale, torch.int8))
    return tuple(specs)


def pack(name: str, scheme: Affine, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    weight, scale, *zero = tensors(name, scheme, q.shape)
    stored = {
        weight.name: _flip(q.codes).view(torch.int8),
        scale.name: q.params["scale"].reshape(scale.shape).clone(memory_format=torch.contiguous_format),
    }
    for spec in zero:
        stored[spec.name] = _flip(q.params["zero"]).view(torch.int8).reshape(spec.shape).contiguous()
    return stored


def unpack(
    name: str, scheme: Affine, shape: tuple[int, int], stored: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes and parameters. InputError where tensors are missing or contradict each other."""
    weight = check_stored(stored, TensorSpec(f"{name}.weight", shape, torch.int8))
    params = {}
    for part, spec in zip(("weight_scale", "weight_zero_point"), scheme.param_spec(shape), strict=False):
        found = stored.get(f"{name}.{part}")
        if found is None or found.numel() != spec.shape[0] * spec.shape[1]:
            raise InputError(
                f"tensor '{name}.{part}' is missing or has another shape than {spec.shape}", mend="fetch it again"
            )
        value = found.reshape(spec.shape)
        params[spec.name] = value.to(spec.dtype) if spec.name == "scale" else _flip(value.to(torch.int8))
    return _flip(weight), params


def _flip(value: torch.Tensor) -> torch.Tensor:
    """A byte with its sign bit flipped: signed codes to unsigned ones (plus 128) and back."""
    return value.contiguous().view(torch.uint8) ^ 0x80
