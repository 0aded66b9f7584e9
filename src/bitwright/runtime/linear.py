"""A linear layer that holds packed codes."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from bitwright.core.bits import pack_words, unpack_words
from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.errors import InputError
from bitwright.runtime.int8 import int8_weight, multiply
from bitwright.schemes.affine import Affine

__all__ = ["QuantizedLinear"]

_INT4_GROUPS = (32, 64, 128, 256)
#: Columns read back from torch's int4 order at once, so that the identity stays small.
_READ_COLUMNS = 512


class QuantizedLinear(nn.Module):
    """``y = x Ŵᵀ + b`` with Ŵ ``(out, in)`` held as packed codes and parameters.

    kernel: "reference" decodes the weight and multiplies; "int4" and "int8" are torch's packed CPU products. "auto" takes a packed
    one where it computes the same numbers up to the order of summation: symmetric affine codes of 4 bits in groups of 32, 64, 128 or
    256, and of 8 bits per channel, where scales and activations (``dtype``) are bfloat16.

    Where the scheme quantizes inputs, they are rounded as the layer runs: "w8a8" multiplies in int8 (``runtime.int8``), "reference"
    rounds the inputs and multiplies in their dtype; the two differ by the order of summation.
    """

    def __init__(
        self, tensor: QuantizedTensor, bias: torch.Tensor | None, *, dtype: torch.dtype, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self._dtype = dtype
        self.out_features, self.in_features = tensor.shape
        self.scheme = tensor.scheme
        self.outliers = tensor.outliers
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        self._param_names = tuple(tensor.params)
        for name, value in tensor.params.items():
            self.register_buffer(f"param_{name}", value)
        self._input_names = tuple(tensor.inputs)
        for name, value in tensor.inputs.items():
            self.register_buffer(name, value)
        self._inputs = tensor.scheme.inputs
        fastest = _choose(tensor, dtype)
        if kernel not in ("auto", "reference", fastest):
            raise InputError(
                f"kernel '{kernel}' does not serve {tensor.scheme.describe_all()} {tensor.shape} with {dtype} activations",
                mend="use auto or reference",
            )
        self.kernel = fastest if kernel == "auto" else kernel
        if self.kernel == "int4":
            self._pack_int4(tensor)
        elif self.kernel == "w8a8":
            found = int8_weight(tensor.scheme, tensor.codes, tensor.params)
            assert found is not None
            self.register_buffer("packed", found[0].contiguous())
            self.register_buffer("row_scale", found[1])
        elif self.kernel == "int8":
            self.register_buffer("packed", (tensor.codes.to(torch.int16) - 128).to(torch.int8))
        else:
            self.register_buffer("packed", pack_words(tensor.codes, tensor.scheme.code_bits))

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight ``(out, in)`` in the dtype of the activations, for code that asks a linear for its dtype and device."""
        return self.decoded().to(self._dtype)

    def _pack_int4(self, tensor: QuantizedTensor) -> None:
        scale = tensor.params["scale"]
        pairs = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=-1).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(tensor.codes.to(torch.int32), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", pairs)

    def decoded(self) -> torch.Tensor:
        """Ŵ ``(out, in)`` float32."""
        params = {name: self.get_buffer(f"param_{name}") for name in self._param_names}
        if self.kernel == "int4":
            # torch keeps its int4 order to itself; multiplying by the identity reads it back. In float32, because a
            # 16-bit product would be rounded.
            weight = torch.empty(self.out_features, self.in_features)
            for start in range(0, self.in_features, _READ_COLUMNS):
                count = min(_READ_COLUMNS, self.in_features - start)
                some = torch.zeros(count, self.in_features)
                some[:, start : start + count] = torch.eye(count)
                weight[:, start : start + count] = self._int4(some).T
            return weight
        if self.kernel in ("int8", "w8a8"):
            codes = (self.get_buffer("packed").to(torch.int16) + 128).to(torch.uint8)
        else:
            codes = unpack_words(
                self.get_buffer("packed"), self.scheme.code_bits, self.in_features // self.scheme.vector
            )
        shape = (self.out_features, self.in_features)
        return QuantizedTensor(self.scheme, shape, codes, params, self.outliers).decode()

    def _int4(self, x: torch.Tensor) -> torch.Tensor:
        group_size = cast(Affine, self.scheme).group_size
        pairs = self.get_buffer("scales_and_zeros").to(x.dtype)
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.get_buffer("packed"), group_size, pairs)
        return out

    def _with_inputs(self, x: torch.Tensor, inputs: InputScheme) -> torch.Tensor:
        params = {name: self.get_buffer(name) for name in self._input_names}
        if self.kernel == "w8a8":
            return multiply(x, self.get_buffer("packed"), self.get_buffer("row_scale"), inputs, params)
        return functional.linear(inputs.apply(x, params), self.decoded().to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in)`` to ``(..., out)`` in the dtype of ``x``."""
        flat = x.reshape(-1, self.in_features)
        scale = self.get_buffer("param_scale") if "scale" in self._param_names else None
        if self._inputs is not None:
            out = self._with_inputs(flat, self._inputs)
        elif self.kernel == "int4" and scale is not None and x.dtype == scale.dtype:
            out = self._int4(flat.contiguous())
        elif self.kernel == "int8" and scale is not None and x.dtype == scale.dtype:
            out = torch.ops.aten._weight_int8pack_mm(
                flat.contiguous(), self.get_buffer("packed"), scale[:, 0].contiguous()
            )
        else:
            out = functional.linear(flat, self.decoded().to(x.dtype))
        if self.bias is not None:
            out = out + self.bias.to(x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.describe_all()}, kernel={self.kernel}"


def _choose(tensor: QuantizedTensor, dtype: torch.dtype) -> str:
    scheme = tensor.scheme
    out, columns = tensor.shape
    if scheme.inputs is not None:
        whole = scheme.inputs.number == "int" and scheme.inputs.bits == 8 and tensor.outliers is None
        fits = whole and int8_weight(scheme, tensor.codes, tensor.params) is not None
        return "w8a8" if fits else "reference"
    if not isinstance(scheme, Affine) or not scheme.symmetric or tensor.outliers is not None:
        return "reference"
    # Only bfloat16 has fast packed products: on 512 tokens of a 1024 x 1024 layer torch 2.13 took 2025 ms in float16 and 1336 ms in
    # float32 for int4, against 15 ms in bfloat16 and 12 to 39 ms for decoding and multiplying.
    if dtype != torch.bfloat16 or tensor.params["scale"].dtype != dtype or tensor.codes.is_cuda:
        return "reference"
    if scheme.bits == 4 and scheme.granularity == "group" and scheme.group_size in _INT4_GROUPS and out % 64 == 0:
        return "int4"
    if scheme.bits == 8 and scheme.span(columns) == columns and scheme.granularity != "tensor":
        return "int8"
    return "reference"
