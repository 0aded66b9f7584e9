"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 against ggml's bytes, gguf's decoders and searches written out."""

from __future__ import annotations

import hashlib

import gguf
import numba
import numpy as np
import pytest
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.block_data import NASTY, VECTORS, nasty, random_blocks
from tests.reference_kquants import legacy_weighted

from bitwright.blocks import codec
from bitwright.blocks.types import named
from bitwright.errors import NumericError

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
names = pytest.mark.parametrize("name", NAMES)

#: x = -16 .. 15
RAMP = {
    "Q4_0": "0040809191a2a2b3b3c4c4d5d5e6e6f7f7f8",
    "Q4_1": "224000cc80809191a2a2b3b3c4c4d5d5e6e6f7f7",
    "Q5_0": "003c0000ffff00112233445566778899aabbccddeeff",
    "Q5_1": "003c00cc0000ffff00112233445566778899aabbccddeeff",
    "Q8_0": "083081899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77",
}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit but for what a NaN looks like."""
    nan = np.isnan(b)
    return bool((np.isnan(a) == nan).all() and (a.view(np.uint32)[~nan] == b.view(np.uint32)[~nan]).all())


@names
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_those_of_ggml(name, weighted):
    data = VECTORS()
    found = codec.quantize(data["x"], name, data["imatrix"] if weighted else None)
    assert (found == data[f"{name}.imatrix" if weighted else name]).all()


@names
def test_a_ramp_gives_the_known_bytes(name):
    assert codec.quantize(np.arange(-16, 16, dtype=np.float32)[None], name).tobytes().hex() == RAMP[name]


def test_a_weighted_row_of_two_blocks_gives_the_known_bytes():
    i = np.arange(64)
    x = (((37 * i) % 256) - 100).astype(np.float32) / np.float32(100)
    found = codec.quantize(x[None], "Q4_0", (1 + i % 7).astype(np.float32)).tobytes().hex()
    assert found == "c2b19e7c593715d3b19d7b593715d3b19d7b91b105d2a08d6b492704c2a08d6b482604c2"


@names
def test_decoding_any_bytes_is_what_gguf_computes(name):
    blocks = random_blocks(name)
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert same(codec.decode(blocks, name, 512), wanted)


@names
@pytest.mark.parametrize("kind", NASTY)
def test_hostile_values_give_what_gguf_gives(name, kind):
    x = nasty(kind, 64)
    if kind == "huge":
        with pytest.raises(NumericError, match="float16"):
            codec.quantize(x, name)
        return
    with np.errstate(all="ignore"):
        wanted = gguf_quantize(x, gguf.GGMLQuantizationType[name])
    # Values, not bytes: gguf gives zeros other signs than ggml, and converts the infinities of denormal blocks in its own way.
    found, wanted = (dequantize(b, gguf.GGMLQuantizationType[name]) for b in (codec.quantize(x, name), wanted))
    assert (found == wanted).all()


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("kind", [kind for kind in NASTY if kind != "huge"])
def test_hostile_values_under_weights_follow_the_rules(name, kind):
    x = nasty(kind, 64)
    q = np.linspace(0, 2, 64, dtype=np.float32)
    found = dequantize(codec.quantize(x, name, q), gguf.GGMLQuantizationType[name])
    for got, row in zip(found, x, strict=True):
        assert (got == legacy_weighted(name, row, q)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), log_size=st.floats(-20, 3), tail=st.floats(0.8, 8.0))
def test_any_row_under_weights_follows_the_rules(seed, log_size, tail):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(tail, (1, 64)) * 10**log_size).clip(-1e5, 1e5).astype(np.float32)
    q = (rng.random(64) * (rng.random(64) < 0.8)).astype(np.float32)
    for name in NAMES[:4]:
        found = dequantize(codec.quantize(x, name, q), gguf.GGMLQuantizationType[name])
        assert (found[0] == legacy_weighted(name, x[0], q)).all(), name


@names
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_rows_are_independent_of_their_neighbours(name, rows):
    x = np.random.default_rng(0).standard_normal((rows, 96)).astype(np.float32)
    q = np.random.default_rng(1).random(96).astype(np.float32)
    for weights in (None, q):
        whole = codec.quantize(x, name, weights)
        assert whole.shape == (rows, named(name).row_bytes(96))
        assert (np.concatenate([codec.quantize(row[None], name, weights) for row in x]) == whole).all()


@names
def test_inputs_may_be_read_only_and_stay_as_they_are(name):
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    before, digest = x.copy(), hashlib.sha256(codec.quantize(x, name).tobytes()).hexdigest()
    x.flags.writeable = False
    assert hashlib.sha256(codec.quantize(x, name).tobytes()).hexdigest() == digest
    assert (x == before).all()


@names
@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")
def test_bytes_do_not_depend_on_the_thread_count(name):
    x = np.random.default_rng(3).standard_normal((333, 96)).astype(np.float32)
    q = np.random.default_rng(1).random(96).astype(np.float32)
    many = codec.quantize(x, name, q)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert (codec.quantize(x, name, q) == many).all()
    finally:
        numba.set_num_threads(threads)
