"""One door to all block types: floats to blocks and back.

The families live in modules of their own, imported (and compiled, once per machine) when first used. A family has two tables,
``QUANTIZE`` and ``DECODE``: type name -> function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks.types import named
from bitwright.errors import InputError, NumericError

__all__ = ["Bytes", "Floats", "Quantize", "can_quantize", "decode", "quantize"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
#: ``(x (rows, columns) float32 C-contiguous and finite, weights (columns,) float32 or None) -> (rows, row bytes) uint8``
Quantize = Callable[[Floats, Floats | None], Bytes]
#: ``(blocks (rows, row bytes) uint8 C-contiguous, columns) -> (rows, columns) float32``
Decode = Callable[[Bytes, int], Floats]

_FAMILY = {
    **dict.fromkeys(("F32", "F16", "BF16"), "floats"),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), "legacy"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "kquant"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "iq4"),
    **dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"), "lattice"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "ternary"),
    **dict.fromkeys(("MXFP4", "NVFP4"), "micro"),
}


def can_quantize(name: str) -> bool:
    """True where there is a quantizer for this type."""
    return named(name).name in _FAMILY


def quantize(x: Floats, name: str, weights: Floats | None = None) -> Bytes:
    """Blocks of ``x`` ``(rows, columns)`` float32 in type ``name``: ``(rows, row bytes)`` uint8, byte for byte what ggml writes.

    weights: ``(columns,)`` importance, E[x²] of the layer's input, non-negative; types without use for it ignore it. Raises PlanError where
    blocks do not divide the columns, InputError where a type cannot do without weights, NumericError for NaN and infinity.
    """
    block = named(name)
    block.row_bytes(x.shape[1])
    if block.wants_weights and weights is None:
        raise InputError(f"{block.name} needs importance weights", mend="give --imatrix FILE or --imatrix auto")
    if weights is not None and weights.shape != (x.shape[1],):
        raise InputError(
            f"weights have shape {weights.shape}, the tensor has {x.shape[1]} columns", mend="pass one each"
        )
    if not np.isfinite(x).all():
        raise NumericError("values are NaN or infinite", mend="the checkpoint is damaged; download it again")
    run: Quantize = _family(block.name).QUANTIZE[block.name]
    own = None if weights is None else np.ascontiguousarray(weights, np.float32)
    return run(np.ascontiguousarray(x, np.float32), own)


def decode(blocks: Bytes, name: str, columns: int) -> Floats:
    """``(rows, columns)`` float32 that ``blocks`` ``(rows, row bytes)`` stand for, bit for bit what ggml computes."""
    block = named(name)
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != block.row_bytes(columns):
        raise InputError(f"{blocks.shape} bytes are not rows of {columns} {block.name} values", mend="check the shape")
    run: Decode = _family(block.name).DECODE[block.name]
    return run(np.ascontiguousarray(blocks), columns)


def _family(name: str) -> Any:
    module = _FAMILY.get(name)
    if module is None:
        raise InputError(f"there is no codec for tensor type {name}", mend="use another type")
    return importlib.import_module(f"bitwright.blocks.{module}")
