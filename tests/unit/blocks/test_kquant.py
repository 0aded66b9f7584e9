"""K-quants against ggml's bytes, gguf's decoders and the searches written out."""

from __future__ import annotations

import hashlib

import gguf
import numba
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.block_data import NASTY, VECTORS, nasty, random_blocks
from tests.reference_kquants import k_quant

from bitwright.blocks import codec
from bitwright.blocks.types import named
from bitwright.errors import NumericError

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
names = pytest.mark.parametrize("name", NAMES)

#: SHA-256 prefixes of one block, x_i = ((37 i mod 256) - 100) / 100, without and with weights 1 + (i mod 7).
KNOWN = {
    "Q2_K": ("15d384b525f5faa7", "9c538a88b6eea515"),
    "Q3_K": ("c70bd68b6ddf7d45", "b782e6441d8890c3"),
    "Q4_K": ("ebc76efc88bbcd75", "31091c2f4436dd98"),
    "Q5_K": ("290f572142ba8662", "d9d4d8627aab5c5d"),
    "Q6_K": ("1ce3de0c509b08a3", "caab2d54f45a00ab"),
}


@names
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_those_of_ggml(name, weighted):
    data = VECTORS()
    found = codec.quantize(data["x"], name, data["imatrix"] if weighted else None)
    assert (found == data[f"{name}.imatrix" if weighted else name]).all()


@names
@pytest.mark.parametrize("weighted", [False, True])
def test_one_block_has_the_known_digest(name, weighted):
    i = np.arange(256)
    x = (((37 * i) % 256) - 100).astype(np.float32) / np.float32(100)
    found = codec.quantize(x[None], name, (1 + i % 7).astype(np.float32) if weighted else None)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == KNOWN[name][weighted]


@names
def test_decoding_any_bytes_is_what_gguf_computes(name):
    blocks = random_blocks(name)
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = codec.decode(blocks, name, 512)
    nan = np.isnan(wanted)
    assert (np.isnan(found) == nan).all()
    assert (found.view(np.uint32)[~nan] == wanted.view(np.uint32)[~nan]).all()


@names
@pytest.mark.parametrize("kind", NASTY)
def test_hostile_values_follow_the_rules(name, kind):
    x = nasty(kind, 256)[:3]
    if kind == "huge":
        with pytest.raises(NumericError, match="float16"):
            codec.quantize(x, name)
        return
    for weights in (None, np.linspace(0, 2, 256, dtype=np.float32), np.eye(256, dtype=np.float32)[77]):
        found = dequantize(codec.quantize(x, name, weights), gguf.GGMLQuantizationType[name])
        for got, row in zip(found, x, strict=True):
            assert (got == k_quant(name, row, weights)).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), log_size=st.floats(-20, 3), tail=st.floats(0.8, 8.0), weighted=st.booleans())
def test_any_block_follows_the_rules(seed, log_size, tail, weighted):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(tail, (1, 256)) * 10**log_size).clip(-1e5, 1e5).astype(np.float32)
    q = (rng.random(256) * (rng.random(256) < 0.8)).astype(np.float32) if weighted else None
    for name in NAMES:
        found = dequantize(codec.quantize(x, name, q), gguf.GGMLQuantizationType[name])
        assert (found[0] == k_quant(name, x[0], q)).all(), name


@names
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_rows_are_independent_of_their_neighbours(name, rows):
    x = np.random.default_rng(0).standard_normal((rows, 768)).astype(np.float32)
    q = np.random.default_rng(1).random(768).astype(np.float32)
    for weights in (None, q):
        whole = codec.quantize(x, name, weights)
        assert whole.shape == (rows, named(name).row_bytes(768))
        assert (np.concatenate([codec.quantize(row[None], name, weights) for row in x]) == whole).all()


@names
@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")
def test_bytes_do_not_depend_on_the_thread_count(name):
    x = np.random.default_rng(3).standard_normal((133, 512)).astype(np.float32)
    q = np.random.default_rng(1).random(512).astype(np.float32)
    many = codec.quantize(x, name, q)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert (codec.quantize(x, name, q) == many).all()
    finally:
        numba.set_num_threads(threads)
