"""IQ3, IQ2 and IQ1 types against ggml's bytes and gguf's decoders, and the lists of points against their definition."""

from __future__ import annotations

import hashlib

import gguf
import numba
import numpy as np
import pytest
from gguf import quants
from gguf.quants import dequantize
from tests.block_data import VECTORS, random_blocks
from tests.block_digests import KINDS, known, row, weights

from bitwright.blocks import codec
from bitwright.blocks._lattice_tables import lattice
from bitwright.blocks.types import named
from bitwright.errors import InputError, NumericError

NAMES = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M")
names = pytest.mark.parametrize("name", NAMES)
CASES = [(name, weighted) for name in NAMES for weighted in (False, True) if weighted or not named(name).wants_weights]
cases = pytest.mark.parametrize(("name", "weighted"), CASES)


@cases
def test_bytes_are_those_of_ggml(name, weighted):
    data = VECTORS()
    found = codec.quantize(data["x"], name, data["imatrix"] if weighted else None)
    assert (found == data[f"{name}.imatrix" if weighted else name]).all()


@cases
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows_give_the_bytes_of_ggml(name, weighted, kind):
    found = codec.quantize(row(kind)[None], name, weights() if weighted else None)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:8] == known(name, kind, weighted)


@names
def test_decoding_any_bytes_is_what_gguf_computes(name):
    blocks = random_blocks(name)
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = codec.decode(blocks, name, 512)
    nan = np.isnan(wanted)
    assert (np.isnan(found) == nan).all()
    assert (found.view(np.uint32)[~nan] == wanted.view(np.uint32)[~nan]).all()


@pytest.mark.parametrize(
    ("name", "shells"), [("IQ3_S", 3), ("IQ3_XXS", 2), ("IQ2_S", 1), ("IQ2_XS", 2), ("IQ2_XXS", 2), ("IQ1_S", 3)]
)
def test_lists_hold_the_nearest_shells_in_order(name, shells):
    table = lattice(name)
    source = getattr(quants, name)
    source.init_grid()
    points = source.grid.reshape(source.grid_shape)
    levels = sorted(set(points.ravel().tolist()))
    numbers = [tuple(levels.index(v) for v in point) for point in points.tolist()]
    width = 3 if len(numbers[0]) == 4 else 2
    rng = np.random.default_rng(3)
    for vector in [*rng.integers(0, len(levels), (40, len(numbers[0]))).tolist(), list(numbers[7])]:
        code = sum(level << width * i for i, level in enumerate(vector))
        if tuple(vector) in numbers:
            assert table.number[code] == numbers.index(tuple(vector))
            assert table.place[code] == 0
            continue
        distances = [sum((a - b) ** 2 for a, b in zip(vector, number, strict=True)) for number in numbers]
        kept = sorted(set(distances))[:shells]
        wanted = [p for d in kept for p in range(len(numbers)) if distances[p] == d]
        first, rows = table.place[code] >> 8, table.place[code] & 255
        found = table.number[table.lists[first * 16 : (first + rows) * 16]].tolist()
        assert found[: len(wanted)] == wanted
        assert set(found[len(wanted) :]) <= {wanted[-1]}
        assert rows == -(-len(wanted) // 16)


def test_iq3_s_leaves_no_room_for_groups_of_zeros():
    x = row("plain", 256)
    whole = codec.quantize(x[None], "IQ3_S")[0]
    x[32:64] = 0
    found = codec.quantize(x[None], "IQ3_S")[0]
    # Low index bytes and signs of groups 2 .. 7 lie where those of 1 .. 6 were; high bits and scales stay.
    assert (found[2 + 8 : 2 + 56] == whole[2 + 16 : 2 + 64]).all()
    assert (found[74 + 4 : 74 + 28] == whole[74 + 8 : 74 + 32]).all()
    assert (found[66 + 2 : 74] == whole[66 + 2 : 74]).all()
    assert found[66 + 1] == 0


@names
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_row_does_not_depend_on_its_neighbours(name, rows):
    x = VECTORS()["x"][: rows * 2 : 2, :768].copy()
    together = codec.quantize(x, name, weights(768))
    for alone, found in zip(x, together, strict=True):
        assert (codec.quantize(alone[None], name, weights(768))[0] == found).all()


@names
def test_bytes_do_not_depend_on_threads(name):
    before = numba.get_num_threads()
    x, w = VECTORS()["x"], VECTORS()["imatrix"]
    try:
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        found = codec.quantize(x, name, w)
    finally:
        numba.set_num_threads(before)
    assert (found == VECTORS()[f"{name}.imatrix"]).all()


@names
def test_nothing_matters_where_every_weight_is_zero(name):
    x = row("plain")[None]
    decoded = codec.decode(codec.quantize(x, name, np.zeros(1024, np.float32)), name, 1024)
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"])
def test_types_that_need_weights_say_so(name):
    with pytest.raises(InputError, match="importance"):
        codec.quantize(row("plain")[None], name)


@names
@pytest.mark.parametrize("size", [1e8, 1e25])
def test_scales_past_float16_are_refused(name, size):
    x = row("plain", 256)[None] * np.float32(size)
    with pytest.raises(NumericError, match="float16"):
        codec.quantize(x, name, weights(256))
