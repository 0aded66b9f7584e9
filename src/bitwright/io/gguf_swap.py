"""Blocks of big-endian files in the order of this machine: which bytes of a block are numbers of several bytes.

Only types without doubt are here. The others pack codes of several bytes whose order no big-endian writer has settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from bitwright.blocks.types import BlockType
from bitwright.errors import InputError

__all__ = ["swap_blocks"]

#: type -> where its 16-bit fields begin; all other bytes of a block stand for themselves
_HALVES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Q4_0": (0,),
        "Q4_1": (0, 2),
        "Q8_0": (0,),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "IQ4_NL": (0,),
        "TQ1_0": (52,),
        "TQ2_0": (64,),
        "MXFP4": (),
        "NVFP4": (),
    }
)


def swap_blocks(rows: np.ndarray[Any, np.dtype[np.uint8]], block: BlockType, what: str) -> None:
    """Turn rows ``(n, row bytes)`` of a big-endian file around, in place; InputError, naming ``what``, for types that cannot be."""
    if not block.blocked:
        if block.nbytes > 1:
            rows.view(f"u{block.nbytes}").byteswap(inplace=True)
        return
    halves = _HALVES.get(block.name)
    if halves is None:
        raise InputError(
            f"{what}: {block.name} blocks of a big-endian file are not read",
            mend="convert the model again as a little-endian file",
        )
    blocks = rows.reshape(-1, block.nbytes)
    for begin in halves:
        blocks[:, begin : begin + 2] = blocks[:, begin : begin + 2][:, ::-1].copy()
