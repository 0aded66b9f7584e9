"""What the tests of block types share: ggml's own output, hostile values, random bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitwright.blocks.types import named

#: Kinds of values that ``nasty`` makes.
NASTY = (
    "zero", "minus-zero", "constant", "negative-constant", "spike", "one-each-group", "denormal", "tiny", "huge", "two-values",
    "all-negative", "mixed-sizes",
)  # fmt: skip


@functools.cache
def VECTORS() -> Mapping[str, np.ndarray]:  # noqa: N802
    """``x``, ``imatrix``, and what ggml made of them, by type name (data/README.md)."""
    with np.load(Path(__file__).parent / "data" / "gguf_blocks.npz") as file:
        return {name: file[name] for name in file.files}


def nasty(kind: str, columns: int, rows: int = 5) -> np.ndarray:
    """``(rows, columns)`` float32 of one of the kinds in ``NASTY``."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((rows, columns))
    if kind in ("zero", "minus-zero"):
        x[:] = -0.0 if kind == "minus-zero" else 0.0
    elif kind in ("constant", "negative-constant"):
        x[:] = 0.37 if kind == "constant" else -0.37
    elif kind == "spike":
        x[:] = 0
        x[:, 3::37] = -5.0
    elif kind == "one-each-group":
        x *= np.arange(columns) % 16 == 2
    elif kind == "denormal":
        x *= 1e-41
    elif kind == "tiny":
        x *= 1e-12
    elif kind == "huge":
        x *= 1e30
    elif kind == "two-values":
        x = np.where(x > 0, 1.0, -1.0)
    elif kind == "all-negative":
        x = -100 - np.abs(x) * 1e-3
    elif kind == "mixed-sizes":
        x *= np.repeat(10.0 ** rng.integers(-6, 4, (rows, columns // 16)), 16, axis=1)
    return x.astype(np.float32)


def random_blocks(name: str, columns: int = 512, rows: int = 9) -> np.ndarray:
    """Random bytes in the shape of blocks."""
    return np.random.default_rng(7).integers(0, 256, (rows, named(name).row_bytes(columns)), dtype=np.uint8)
