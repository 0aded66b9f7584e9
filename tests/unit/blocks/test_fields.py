"""Blocks taken apart into fields: the formula over the fields gives what gguf decodes, and joining them gives the bytes back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tests.block_data import random_blocks

from bitwright.blocks.fields import KINDS, join, split
from bitwright.errors import PlanError

names = pytest.mark.parametrize("name", KINDS)
IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)


@names
def test_joining_what_was_split_gives_the_same_bytes(name):
    blocks = random_blocks(name)
    fields, codes = split(blocks, name, 512)
    assert (join(fields, codes, name) == blocks).all()
    assert codes.max() == KINDS[name].levels - 1


@names
def test_the_fields_stand_for_what_gguf_decodes(name):
    blocks = random_blocks(name)
    kind = KINDS[name]
    fields, codes = split(blocks, name, 512)

    def spread(part: str) -> np.ndarray:
        values = fields[part].astype(np.float32)
        return np.repeat(values, 512 // values.shape[1], axis=1)

    with np.errstate(all="ignore"):
        step = spread("d") * (spread("scales") - np.float32(kind.above) if kind.small else np.float32(1))
        levels = IQ4[codes] if name.startswith("IQ4") else codes.astype(np.float32) - np.float32(kind.middle)
        values = levels * step
        if "mins" in fields:
            values = values - spread("dmin") * spread("mins")
        elif "m" in fields:
            values = values + spread("m")
        wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    usual = np.isfinite(wanted)
    assert (values[usual] == wanted[usual]).all()
    assert usual.mean() > 0.8


def test_widths_that_no_block_divides_are_refused():
    with pytest.raises(PlanError, match="256"):
        split(np.zeros((1, 144), np.uint8), "Q4_K", 300)
