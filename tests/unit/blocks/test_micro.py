"""MXFP4 and NVFP4 against ggml's bytes and gguf's quantizers and decoders."""

from __future__ import annotations

import hashlib

import gguf
import numpy as np
import pytest
from gguf.quants import NVFP4, dequantize, quantize
from tests.block_data import VECTORS, random_blocks
from tests.block_digests import KINDS, known, row

from bitwright.blocks import codec
from bitwright.blocks.micro import NUMBERS, small_bits, small_half

NAMES = ("MXFP4", "NVFP4")
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


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_quantizes_mxfp4_the_same(kind):
    x = row(kind)[None]
    assert (codec.quantize(x, "MXFP4") == quantize(x, gguf.GGMLQuantizationType.MXFP4)).all()


@names
def test_decoding_any_bytes_is_what_gguf_computes(name):
    blocks = random_blocks(name)
    with np.errstate(over="ignore"):
        wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert (codec.decode(blocks, name, 512).view(np.uint32) == wanted.view(np.uint32)).all()


def test_every_code_is_the_first_of_the_nearest_numbers():
    x = np.linspace(-1.3, 1.3, 64 * 40, dtype=np.float32).reshape(40, 64)
    x[:, 0] = 1.5 * np.float32(2.0) ** np.arange(-20, 20)
    for name, size in (("MXFP4", 32), ("NVFP4", 16)):
        blocks = codec.quantize(x, name)
        decoded = codec.decode(blocks, name, 64).reshape(-1, size)
        for values, found, group in zip(x.reshape(-1, size), decoded, range(len(decoded)), strict=True):
            if name == "MXFP4":
                half = np.float32(2.0 ** (int(blocks.reshape(-1, 17)[group, 0]) - 128))
            else:
                half = np.float32(NVFP4.ue4m3_to_fp32(blocks.reshape(-1, 36)[:, :4].reshape(-1)[group : group + 1])[0])
            for v, got in zip(values, found, strict=True):
                errors = np.abs(NUMBERS * half - v)
                assert got == (NUMBERS * half)[int(np.argmin(errors))]


def test_logarithms_round_up_just_below_a_power_of_two():
    x = np.zeros((2, 32), np.float32)
    below = np.nextafter(np.float32(2.0**16), np.float32(0))
    x[0, 5], x[1, 5] = below, np.float32(below - 0.5)
    # log2 of the first is 16 in float32.
    wanted = quantize(x, gguf.GGMLQuantizationType.MXFP4)
    assert wanted[0, 0] == 16 + 125
    assert (codec.quantize(x, "MXFP4") == wanted).all()


def test_small_scales_are_those_of_gguf():
    x = np.concatenate((np.linspace(0, 600, 5001), 2.0 ** np.linspace(-14, 10, 4001), np.arange(1, 40) * 2.0**-12))
    x = x.astype(np.float32)
    assert (small_bits(x) == NVFP4.fp32_to_ue4m3(x)).all()
    bits = np.arange(256, dtype=np.uint8)
    assert (small_half(bits) == NVFP4.ue4m3_to_fp32(bits)).all()
