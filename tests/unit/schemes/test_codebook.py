"""Code books against their formulas in float64, and against bitsandbytes' own codes and magnitudes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.small import STORY

from bitwright.core.method import Context
from bitwright.core.scheme import Limits
from bitwright.core.stats import Gram
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.kernels.numba_encode import encode
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.kernels.numba_tiles import tile_sums
from bitwright.methods.gptq import Gptq
from bitwright.methods.rtn import Rtn
from bitwright.methods.search import Search
from bitwright.schemes._books import FP4_ORDER, fit_table
from bitwright.schemes.codebook import Codebook

#: arXiv:2305.14314, appendix E, to four digits; bitsandbytes' FP4 in units of 1/192.
NF4 = (
    -1.0,
    -0.6962,
    -0.5251,
    -0.3949,
    -0.2844,
    -0.1848,
    -0.0911,
    0.0,
    0.0796,
    0.1609,
    0.2461,
    0.3379,
    0.4407,
    0.5626,
    0.723,
    1.0,
)
FP4 = [0, 1, 32, 48, 64, 96, 128, 192]
#: Shapes whose blocks of 64 lie in rows, span whole rows, reach over row ends, and end in a short block.
SHAPES = ((16, 128), (16, 32), (12, 96), (7, 36), (5, 129))


def weight(rows=16, columns=128, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def blocks_of(w: torch.Tensor, size: int) -> list[np.ndarray]:
    flat = w.double().numpy().reshape(-1)
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def test_the_tables_are_the_published_ones():
    np.testing.assert_allclose(Codebook().fixed_table, NF4, atol=6e-5)
    half = np.array(FP4) / 192
    np.testing.assert_allclose(Codebook(book="fp4").fixed_table, [*-half[:0:-1], 0, *half], atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("book", ["nf4", "fp4", "kmeans"])
def test_every_weight_takes_the_nearest_entry_of_its_flat_block(book, shape):
    scheme, w = Codebook(book=book), weight(*shape)
    params, codes = scheme.quantize(w)
    table = scheme.table_of(params).double().numpy()
    decoded = blocks_of(scheme.decode(codes, params), 64)
    absmax = params["absmax"].reshape(-1)
    assert len(absmax) == len(decoded)
    for block, found, most in zip(blocks_of(w, 64), decoded, absmax.tolist(), strict=True):
        assert most == np.abs(block).max()
        nearest = np.abs(block[:, None] - table * most).min(axis=1)
        np.testing.assert_allclose(np.abs(block - found), nearest, atol=2e-7 * most)


def test_a_value_half_way_takes_the_lower_entry():
    scheme = Codebook(book="custom", bits=2, table=(-1.0, -0.5, 0.0, 1.0), block_size=32)
    w = torch.zeros(1, 32)
    w[0, :6] = torch.tensor([1.0, -0.75, -0.25, 0.5, 0.50001, -0.24999])
    assert scheme.quantize(w)[1][0, :6].tolist() == [3, 0, 1, 2, 3, 2]


def test_double_quantization_follows_its_formula():
    scheme, w = Codebook(double_quant=True), weight(40, 512)
    params, codes = scheme.quantize(w)
    absmax = np.array([np.abs(block).max() for block in blocks_of(w, 64)])
    offset, stored = absmax.mean(), params["absmax"].numpy().reshape(-1)
    np.testing.assert_allclose(params["offset"], [offset], rtol=1e-6)
    decades = [np.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    steps = np.concatenate([10.0 ** (e - 6) * (line[1:] + line[:-1]) / 2 for e, line in enumerate(decades)])
    table = np.sort(np.concatenate([steps, -steps, [0.0, 1.0]]))
    for start in (0, 256):
        rest = absmax[start : start + 256] - offset
        nested = np.abs(rest).max()
        np.testing.assert_allclose(params["nested_absmax"][start // 256], nested, rtol=2e-6)
        decoded = table[stored[start : start + 256]] * nested
        nearest = np.abs(rest[:, None] - table * nested).min(axis=1)
        # bitsandbytes looks the code up in 65,536 cells: half a cell is what it may be off.
        assert (np.abs(rest - decoded) <= nearest + nested / 65535 + 1e-7).all()
    # Codes are those of the magnitudes before they were rounded.
    assert torch.equal(codes, Codebook().quantize(w)[1])
    assert (scheme.scales(params).reshape(-1) - torch.from_numpy(absmax)).abs().max() < 0.02 * absmax.max()


def test_sizes_are_told_to_the_bit():
    assert Codebook().bits_per_weight((64, 256)) == 4.5
    # 8 bits per block, 32 per 256 blocks, 32 once
    assert Codebook(double_quant=True).bits_per_weight((64, 256)) == 4 + 8 / 64 + (32 + 32) / (64 * 256)
    assert Codebook(book="kmeans", bits=3).bits_per_weight((64, 256)) == 3.5 + 8 * 32 / (64 * 256)
    assert Codebook().grid((5, 129)) == (11, 1)
    assert Codebook(block_size=512).grid((8, 128)) == (2, 1)


def test_rounded_magnitudes_may_be_negative_and_still_code_to_the_nearest():
    scheme, w = Codebook(double_quant=True), weight(64, 512)
    w[5] *= 1e-4
    params = scheme.finish(scheme.fit(w), (64, 512))
    scale = scheme.scales(params)
    assert bool((scale[5] != w[5].view(-1, 64).abs().amax(1)).any())
    flipped = {**scheme.fit(w), "absmax": -scale}
    decoded = scheme.decode(scheme.encode(w, flipped), flipped)
    table = -torch.tensor(scheme.fixed_table).double() * scale.repeat_interleave(64, 1)[..., None].double()
    nearest = (w[..., None].double() - table).abs().amin(-1)
    torch.testing.assert_close((w - decoded).abs().double(), nearest, rtol=0, atol=1e-8)


# --- bitsandbytes ---------------------------------------------------------------------------------------------------------


def linears() -> dict[str, torch.Tensor]:
    """Every linear of the example model."""
    return {name: w.float() for name, w in load_file(STORY / "model.safetensors").items() if "proj" in name}


def awkward() -> dict[str, torch.Tensor]:
    """Random weights of awkward shapes, with zero blocks, equal blocks and ties."""
    found = {f"{shape}": weight(*shape) for shape in (*SHAPES, (33, 65), (1, 31), (100, 4160))}
    zeros = weight(64, 256)
    zeros[3], zeros[10:20, 64:128] = 0.0, 0.0
    ties = torch.randint(-4, 5, (64, 256), generator=torch.Generator().manual_seed(0)) / 4
    return {**found, "zeros": zeros, "ties": ties, "constant": torch.full((64, 256), 0.5)}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_every_block_equals_that_of_bitsandbytes(book, block_size, double_quant):
    functional = pytest.importorskip("bitsandbytes.functional")
    scheme = Codebook(book=book, block_size=block_size, double_quant=double_quant)
    order = torch.tensor(FP4_ORDER if book == "fp4" else range(16), dtype=torch.uint8)
    tensors = awkward()
    if block_size == 64:
        tensors |= linears()
        assert sum("proj" in name for name in tensors) == 56
    for name, w in tensors.items():
        packed, state = functional.quantize_4bit(
            w, blocksize=block_size, quant_type=book, compress_statistics=double_quant
        )
        theirs = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[: w.numel()].view(w.shape)
        found = [scheme.quantize(w)]
        if w.numel() % block_size == 0:
            found.append(encode(w, scheme, None, None))
        for params, codes in found:
            assert torch.equal(order[codes.int()], theirs), name
            assert torch.equal(params["absmax"].view(-1), state.absmax.view(-1)), name
            if double_quant:
                assert torch.equal(params["nested_absmax"], state.state2.absmax), name
                assert float(params["offset"]) == float(state.offset), name
        if w.shape[1] % block_size == 0:  # bitsandbytes' CPU decoder restarts its blocks in every row
            assert torch.equal(scheme.decode(codes, params), functional.dequantize_4bit(packed, state)), name


# --- k-means --------------------------------------------------------------------------------------------------------------


def test_a_fitted_table_is_a_fixed_point_of_lloyds_algorithm():
    w = weight(64, 512).abs().pow(1.5)
    table = fit_table([w], 64, 8).double().numpy()
    blocks = np.stack(blocks_of(w, 64))
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    x, h = (blocks / absmax).reshape(-1), np.broadcast_to(absmax**2, blocks.shape).reshape(-1)
    nearest = np.abs(x[:, None] - table).argmin(axis=1)
    means = [np.average(x[nearest == k], weights=h[nearest == k]) for k in range(8)]
    np.testing.assert_allclose(table, means, atol=2e-5)


@pytest.mark.parametrize("shape", ["normal", "laplace", "two lumps"])
def test_a_fitted_table_is_nearer_than_nf4_and_much_nearer_where_weights_are_not_normal(shape):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(64, 1024, generator=rng)
    if shape == "laplace":
        w = w.sign() * torch.empty(64, 1024).exponential_(generator=rng)
    if shape == "two lumps":
        w = w * 0.1 + torch.randint(0, 2, w.shape, generator=rng) * 2 - 1

    def error(scheme):
        params, codes = scheme.quantize(w)
        return float((scheme.decode(codes, params) - w).square().mean())

    ratio = error(Codebook(book="kmeans")) / error(Codebook())
    assert ratio < {"normal": 0.95, "laplace": 0.93, "two lumps": 0.3}[shape]


def test_a_table_is_found_also_where_there_is_nothing_to_fit():
    for w in (torch.zeros(4, 64), torch.full((4, 64), 0.3), torch.tensor([[1.0, -1.0] * 32])):
        table = fit_table([w], 64, 16)
        assert bool((table.diff() > 0).all())
        assert len(table) == 16
        scheme = Codebook(book="kmeans")
        params, codes = scheme.quantize(w)
        torch.testing.assert_close(scheme.decode(codes, params), w, rtol=1e-6, atol=0)


# --- methods --------------------------------------------------------------------------------------------------------------


def context(scheme, w):
    return Context(feedback=feedback_block, tile_sums=tile_sums, encode=encode, prepared=scheme.prepare([w]))


@pytest.mark.parametrize("shape", [(64, 256), (64, 32), (48, 96), (9, 129)])
@pytest.mark.parametrize(
    "scheme",
    [Codebook(), Codebook(book="fp4", double_quant=True), Codebook(book="kmeans", bits=3)],
    ids=lambda s: s.describe(),
)
def test_search_and_gptq_help_whatever_the_blocks_reach_over(scheme, shape):
    rng = torch.Generator().manual_seed(0)
    w = weight(*shape)
    x = torch.randn(512, 8, generator=rng) @ torch.randn(8, shape[1], generator=rng) + torch.randn(
        512, shape[1], generator=rng
    )
    gram = Gram(shape[1])
    gram.update(x * (torch.rand(shape[1], generator=rng) + 0.2))

    def loss(method):
        tensor = method.quantize(w, {"gram": gram}, scheme, context(scheme, w)).tensor
        e = (w - tensor.decode()).double()
        return float((e @ gram.matrix.double() * e).sum())

    def weighed(method):
        tensor = method.quantize(w, {"gram": gram}, scheme, context(scheme, w)).tensor
        return float(((w - tensor.decode()).double().square() @ gram.matrix.diagonal().double()).sum())

    assert weighed(Search()) < 0.97 * weighed(Rtn())
    assert loss(Gptq(correct_drift=False)) < 0.7 * loss(Rtn())
    assert loss(Gptq(correct_drift=False, act_order=False)) < 0.7 * loss(Rtn())


def test_rounding_through_the_kernel_equals_rounding_without_it():
    for scheme in (Codebook(), Codebook(book="fp4", double_quant=True), Codebook(book="kmeans", bits=5)):
        w = weight()
        plain = Context(feedback=feedback_block, prepared=scheme.prepare([w]))
        fast = Rtn().quantize(w, {}, scheme, context(scheme, w))
        assert fast.tensor.equals(Rtn().quantize(w, {}, scheme, plain).tensor)


# --- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"book": "nf5"},
        {"block_size": 16},
        {"block_size": 8192},
        {"block_size": 96},
        {"bits": 3},
        {"book": "kmeans", "bits": 9},
        {"book": "custom"},
        {"table": (-1.0, 1.0)},
        {"book": "custom", "bits": 1, "table": (1.0, -1.0)},
        {"book": "custom", "bits": 1, "table": (-0.5, 0.5)},
        {"book": "custom", "bits": 2, "table": (-1.0, 1.0)},
        {"dtype": "int8"},
    ],
)
def test_impossible_options_are_refused_with_a_mend(options):
    with pytest.raises(PlanError) as caught:
        Codebook(**options)
    assert caught.value.mend


def test_weights_that_are_not_finite_are_refused():
    w = weight()
    w[3, 5] = float("inf")
    for attempt in (lambda: Codebook().quantize(w), lambda: encode(w, Codebook(), None, None)):
        with pytest.raises(NumericError, match="not finite"):
            attempt()
    w[3, 5] = float("nan")
    with pytest.raises(NumericError, match="not finite"):
        encode(w, Codebook(), None, None)


def test_a_layout_decides_the_dtype_that_loaders_decode_to():
    assert Codebook().limit(Limits(scale_dtype=torch.float16)).dtype == "float16"
    assert Codebook().limit(Limits()) == Codebook()


def test_columns_are_cut_at_block_borders_alone():
    scheme = Codebook()
    with pytest.raises(InputError, match="boundaries"):
        scheme.columns(scheme.fit(weight()), 0, 32, (16, 128))
