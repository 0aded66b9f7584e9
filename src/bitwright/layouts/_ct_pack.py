"""compressed-tensors' ``pack-quantized``: integers of 2, 4 and 8 bits in 32-bit words.

Tensors of a quantized linear ``NAME`` (which has no ``NAME.weight``), ``G`` groups along ``in``:

===================== ============= =======================  ==================================================
``weight_packed``     int32         [out, ceil(in*bits/32)]  signed code + 2^(bits-1), packed along ``in``
``weight_scale``      model dtype   [out, G]
``weight_shape``      int64         [2]                      out, in
``weight_zero_point`` int32         [ceil(out*bits/32), G]   asymmetric alone; + 2^(bits-1), packed along ``out``
===================== ============= =======================  ==================================================

``W = (q - zp) * scale`` on the signed grid; adding 2^(bits-1) to both gives the unsigned codes and zero points kept here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitwright.core.bits import pack_words, packed_words, unpack_words
from bitwright.core.layout import Read, check_stored, transposed
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.schemes.affine import Affine

__all__ = ["BITS", "pack", "read_columns", "refusal", "tensors", "unpack"]

#: Widths whose packing is the same in every release. 3, 5 and 6 bits: releases before 0.18 put floor(32/bits) fields in a word.
BITS = (2, 4, 8)


def refusal(scheme: Affine, shape: tuple[int, int]) -> str | None:
    """Why this weight cannot be stored, or None. Inputs: int8 or float8 per token beside symmetric 4-bit weights."""
    rows, columns = shape
    if scheme.bits not in BITS:
        return f"{scheme.bits}-bit words mean different things to its readers; 2, 4 and 8 bits are the same everywhere"
    if scheme.granularity == "tensor":
        return "pack-quantized stores one scale per group or per channel, not per tensor"
    if scheme.symmetric and scheme.symmetric_range != "full":
        return "its symmetric range is 'full'"
    if scheme.granularity == "group" and columns % scheme.group_size:
        return f"in_features {columns} is not a multiple of group_size {scheme.group_size}"
    if not rows or not columns:
        return f"a weight of shape {shape} is empty"
    inputs = scheme.inputs
    if inputs is None:
        return None
    if scheme.bits != 4 or not scheme.symmetric:
        return f"packed {scheme.describe()} weights are weight-only; quantized inputs go with symmetric 4-bit ones"
    if inputs.strategy != "token" or not inputs.symmetric or inputs.threshold or inputs.bits != 8:
        return f"packed 4-bit weights go with symmetric 8-bit inputs per token, not {inputs.describe()}"
    if inputs.number == "float" and scheme.granularity != "group":
        return "float8 inputs go with 4-bit weights in groups"
    return None


def tensors(name: str, scheme: Affine, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
    rows, columns = shape
    grid = scheme.grid(shape)
    specs = [
        TensorSpec(f"{name}.weight_packed", (rows, packed_words(columns, scheme.bits)), torch.int32),
        TensorSpec(f"{name}.weight_scale", grid, scheme.param_spec(shape)[0].dtype),
        TensorSpec(f"{name}.weight_shape", (2,), torch.int64),
    ]
    if not scheme.symmetric:
        # Readers cannot place zero points of a symmetric scheme, so they are there for asymmetric ones alone.
        zeros = (packed_words(rows, scheme.bits), grid[1])
        specs.append(TensorSpec(f"{name}.weight_zero_point", zeros, torch.int32))
    return tuple(specs)


def pack(name: str, scheme: Affine, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    stored = {
        f"{name}.weight_packed": pack_words(q.codes, scheme.bits),
        f"{name}.weight_scale": q.params["scale"].clone(memory_format=torch.contiguous_format),
        f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if "zero" in q.params:
        stored[f"{name}.weight_zero_point"] = transposed(pack_words(q.params["zero"].t(), scheme.bits))
    return stored


def unpack(
    name: str, scheme: Affine, shape: tuple[int, int], stored: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes and parameters. InputError where tensors are missing or contradict each other."""
    packed, scale, stored_shape, *zeros = (check_stored(stored, spec) for spec in tensors(name, scheme, shape))
    if tuple(stored_shape.tolist()) != shape:
        raise InputError(f"'{name}.weight_shape' says {stored_shape.tolist()}, expected {shape}", mend="read it anew")
    params = {"scale": scale}
    if zeros:
        params["zero"] = transposed(unpack_words(zeros[0].t(), scheme.bits, shape[0]))
    return unpack_words(packed, scheme.bits, shape[1]), params


def read_columns(
    spec: TensorSpec, bits: int, groups: tuple[int, int] | None, names: Mapping[str, TensorSpec], read: Read | None
) -> int:
    """Columns of a stored ``weight_packed``: from groups ``(count, size)``, else the shape tensor, else unpadded words."""
    name, words = spec.name.rpartition(".")[0], spec.shape[1]
    columns = words * 32 // bits
    shape_name = f"{name}.weight_shape"
    if groups is not None:
        columns = groups[0] * groups[1]
    elif read is not None and shape_name in names:
        columns = int(read(shape_name)[1])
    if packed_words(columns, bits) != words:
        raise InputError(f"'{name}': {words} words are not {columns} columns of {bits} bits", mend="check group_size")
    return columns
