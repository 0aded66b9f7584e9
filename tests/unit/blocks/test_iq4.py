"""IQ4_NL and IQ4_XS against ggml's bytes and gguf's decoders."""

from __future__ import annotations

import hashlib

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tests.block_data import VECTORS, random_blocks
from tests.block_digests import KINDS, known, row, weights

from bitwright.blocks import codec
from bitwright.blocks.iq4 import LEVELS, level_codes
from bitwright.blocks.types import named
from bitwright.errors import NumericError

NAMES = ("IQ4_NL", "IQ4_XS")
names = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("weighted", [False, True])


@names
@both
def test_bytes_are_those_of_ggml(name, weighted):
    data = VECTORS()
    found = codec.quantize(data["x"], name, data["imatrix"] if weighted else None)
    assert (found == data[f"{name}.imatrix" if weighted else name]).all()


@names
@both
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows_give_the_bytes_of_ggml(name, weighted, kind):
    found = codec.quantize(row(kind)[None], name, weights() if weighted else None)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:8] == known(name, kind, weighted)


def test_ggml_codes_of_one_small_block():
    i = np.arange(32)
    x = (((37 * i) % 256) - 100).astype(np.float32) / np.float32(100)
    assert codec.quantize(x[None], "IQ4_NL").tobytes().hex() == "3da1ae6d4a2704e2c09e6c4a2704e2c09e6c"


@names
def test_decoding_any_bytes_is_what_gguf_computes(name):
    blocks = random_blocks(name)
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = codec.decode(blocks, name, 512)
    nan = np.isnan(wanted)
    assert (np.isnan(found) == nan).all()
    assert (found.view(np.uint32)[~nan] == wanted.view(np.uint32)[~nan]).all()


def test_levels_are_found_by_comparing_differences():
    middles = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
    near = [np.nextafter(m, np.float32(s)) for m in middles for s in (-np.inf, np.inf)]
    spread = np.linspace(-140, 125, 4001, dtype=np.float32)
    values = np.concatenate((middles, np.array(near, np.float32), spread, LEVELS, np.float32([-3e38, 3e38, -0.0, 0.0])))
    for v, code in zip(values, level_codes(values), strict=True):
        if v <= LEVELS[0]:
            wanted = 0
        elif v >= LEVELS[-1]:
            wanted = 15
        else:
            upper = int(np.searchsorted(LEVELS, v, side="right"))
            wanted = upper - 1 if v - LEVELS[upper - 1] < LEVELS[upper] - v else upper
        assert code == wanted, v


@names
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_row_does_not_depend_on_its_neighbours(name, rows):
    x = VECTORS()["x"][: rows * 2 : 2, :768].copy()
    together = codec.quantize(x, name, weights(768))
    for alone, found in zip(x, together, strict=True):
        assert (codec.quantize(alone[None], name, weights(768))[0] == found).all()


@names
def test_scales_past_float16_are_refused(name):
    x = np.full((1, named(name).values), 1e9, np.float32)
    with pytest.raises(NumericError, match="float16"):
        codec.quantize(x, name)
