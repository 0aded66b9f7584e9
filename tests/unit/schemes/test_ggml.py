"""GGUF's block types as a scheme, against llama.cpp's own bytes and the public package's decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.blocks.fields import KINDS
from bitwright.core.quantized import QuantizedTensor
from bitwright.errors import InputError, PlanError
from bitwright.schemes.ggml import Ggml

DATA = Path(__file__).parents[2] / "data" / "gguf_blocks.npz"
TYPES = sorted(KINDS)


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return dict(np.load(DATA))


def random_blocks(kind: str, rows: int = 64, blocks: int = 4) -> torch.Tensor:
    """Random bytes whose float16 fields are finite."""
    rng = np.random.default_rng(3)
    scheme = Ggml(type=kind)
    data = rng.integers(0, 256, (rows, blocks * scheme.block.nbytes), dtype=np.uint8)
    shape = (rows, blocks * scheme.block.values)
    params, codes = scheme.split(torch.from_numpy(data), shape)
    halves = {
        name: torch.from_numpy(rng.standard_normal(tuple(value.shape)).astype(np.float16))
        for name, value in params.items()
        if value.dtype == torch.float16
    }
    return scheme.join({**params, **halves}, codes, shape)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_come_apart_and_together_bit_for_bit(kind: str) -> None:
    blocks = random_blocks(kind)
    scheme = Ggml(type=kind)
    shape = (64, 4 * scheme.block.values)
    params, codes = scheme.split(blocks, shape)
    assert torch.equal(scheme.join(params, codes, shape), blocks)
    assert int(codes.max()) < scheme.levels


@pytest.mark.parametrize("kind", TYPES)
def test_fields_decode_to_what_the_public_package_decodes(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(kind)
    scheme = Ggml(type=kind)
    shape = (64, 4 * scheme.block.values)
    params, codes = scheme.split(blocks, shape)
    found = QuantizedTensor(scheme, shape, codes, params).decode().numpy()
    assert np.array_equal(found, gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", TYPES)
def test_quantize_gives_the_bytes_of_llama_cpp(kind: str, weighted: bool, vectors: dict[str, np.ndarray]) -> None:
    expected = vectors.get(f"{kind}.imatrix" if weighted else kind)
    assert expected is not None
    scheme = Ggml(type=kind)
    w = torch.from_numpy(vectors["x"])
    shape = (w.shape[0], w.shape[1])
    weights = torch.from_numpy(vectors["imatrix"]) if weighted else None
    params, codes = scheme.quantize(w, weights=weights)
    assert np.array_equal(scheme.join(params, codes, shape).numpy(), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_the_codec_of_the_kernels_stands_for_the_same_values(kind: str) -> None:
    scheme = Ggml(type=kind)
    w = torch.randn(16, 512, generator=torch.Generator().manual_seed(2)) * 0.05
    w[3] = 0
    w[4, :256] = 0
    params, codes = scheme.quantize(w)
    codec = scheme.codec(params, (16, 512))
    step = codec.scale[:, codec.tile]
    values = codec.table[codes.long()] * step if hasattr(codec, "table") else (codes - codec.zero[:, codec.tile]) * step
    torch.testing.assert_close(values, scheme.decode(codes, params), rtol=1e-5, atol=1e-7)
    assert bool((codec.scale != 0).all())


def test_types_without_columns_of_their_own_are_refused() -> None:
    for kind in ("IQ3_S", "IQ1_M", "TQ1_0", "F16"):
        with pytest.raises(PlanError, match=kind):
            Ggml(type=kind)
    with pytest.raises(InputError, match="Q9"):
        Ggml(type="Q9")
    with pytest.raises(PlanError, match="multiple"):
        Ggml(type="Q4_K").grid((4, 128))
