"""TQ1_0 and TQ2_0 against ggml's bytes and gguf's quantizer and decoder."""

from __future__ import annotations

import hashlib

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from tests.block_data import VECTORS, random_blocks
from tests.block_digests import KINDS, known, row

from bitwright.blocks import codec
from bitwright.errors import NumericError

NAMES = ("TQ1_0", "TQ2_0")
names = pytest.mark.parametrize("name", NAMES)


@names
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_those_of_ggml(name, weighted):
    data = VECTORS()
    found = codec.quantize(data["x"], name, data["imatrix"] if weighted else None)
    assert (found == data[f"{name}.imatrix" if weighted else name]).all()


@names
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows_give_the_bytes_of_ggml(name, kind):
    found = codec.quantize(row(kind)[None], name)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:8] == known(name, kind, False)


@names
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "denormal"])
def test_gguf_quantizes_the_same(name, kind):
    x = row(kind)[None]
    assert (codec.quantize(x, name) == quantize(x, gguf.GGMLQuantizationType[name])).all()


@names
def test_decoding_any_bytes_is_what_gguf_computes(name):
    blocks = random_blocks(name)
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = codec.decode(blocks, name, 512)
    nan = np.isnan(wanted)
    assert (np.isnan(found) == nan).all()
    assert (found.view(np.uint32)[~nan] == wanted.view(np.uint32)[~nan]).all()


def test_digits_of_a_tq1_0_block_lie_where_they_should():
    x = np.zeros((1, 256), np.float32)
    x[0, [0, 32, 64]] = 1, -1, 1
    block = codec.quantize(x, "TQ1_0")[0]
    assert block[0] == 194
    assert (block[1:48] == 128).all()
    assert (block[48:52] == 127).all()
    assert (codec.decode(block[None], "TQ1_0", 256) == x).all()


@names
def test_ternary_weights_survive(name):
    x = (np.arange(2048).reshape(2, 1024) * 31 % 7 % 3 - 1) * np.float32(0.125)
    assert (codec.decode(codec.quantize(x, name), name, 1024) == x).all()


@names
def test_scales_past_float16_are_refused(name):
    with pytest.raises(NumericError, match="float16"):
        codec.quantize(np.full((1, 256), 1e8, np.float32), name)
