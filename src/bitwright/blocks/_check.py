"""What no block type can hold is refused instead of written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import NumericError

__all__ = ["refuse_overflow"]


def refuse_overflow(name: str, x: NDArray[np.float32], halves: NDArray[np.uint16]) -> None:
    """Raise NumericError where a block's scale, one of ``halves`` ``(blocks, fields)``, is infinite, or 0 for values past float16.

    The latter happens where a value's square overflows float32: sums become NaN, comparisons fail and a search ends where it began.
    """
    exponent = np.uint16(0x7C00)
    found = bool(((halves & exponent) == exponent).any())
    if not found:
        nothing = np.flatnonzero((halves[:, 0] & np.uint16(0x7FFF)) == 0)
        if len(nothing):
            found = bool((np.abs(x.reshape(len(halves), -1)[nothing]) > 65504).any())
    if found:
        raise NumericError(
            f"values up to {float(np.abs(x).max()):.3g} give scales of {name} that overflow float16",
            mend="keep this tensor in F32 or BF16",
        )
