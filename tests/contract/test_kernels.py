"""What every catalogued kernel must do: equal the function of the same contract in ``kernels/reference.py``.

A new file in ``kernels`` is picked up here by itself; its function's name says which contract it fulfils.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from bitwright import catalog
from bitwright.core.scheme import AffineCodec, Scheme, TableCodec, tile_of_columns
from bitwright.kernels import reference
from bitwright.schemes.affine import Affine

CONTRACTS = {name: getattr(reference, name) for name in reference.__all__}


def kernels(contract: str) -> list[str]:
    return [name for name in catalog.names("kernels") if catalog.load("kernels", name).__name__ == contract]


def test_every_kernel_fulfils_a_contract_of_the_reference():
    for name in catalog.names("kernels"):
        kernel = catalog.load("kernels", name)
        assert kernel.__name__ in CONTRACTS, f"{name}: {kernel.__name__} is not in kernels/reference.py"
        wanted = inspect.signature(CONTRACTS[kernel.__name__]).parameters
        assert list(inspect.signature(kernel).parameters) == list(wanted)


@pytest.mark.parametrize("kept", [False, True], ids=["codes", "outliers"])
@pytest.mark.parametrize("kind", ["affine", "table"])
@pytest.mark.parametrize(("block", "rows", "span"), [(1, 1, 1), (48, 65, 16), (40, 129, 40)])
@pytest.mark.parametrize("name", kernels("feedback_block"))
def test_feedback_equals_the_reference(name, block, rows, span, kind, kept):
    rng = torch.Generator().manual_seed(block)
    weights = torch.randn(block, rows, generator=rng) * 0.02
    targets = weights + torch.randn(block, rows, generator=rng) * 0.003
    feedback = torch.randn(block, block, generator=rng).triu(1) * 0.15 + torch.eye(block)
    tile = tile_of_columns(block, span)
    scale = torch.rand(rows, int(tile.max()) + 1, generator=rng) * 0.005 + 0.005
    if kind == "table":
        codec = TableCodec(torch.tensor([-1.0, -0.4, -0.1, 0.0, 0.2, 0.5, 1.0]), scale * 6, tile)
    else:
        codec = AffineCodec(scale, torch.randint(5, 11, scale.shape, generator=rng).float(), tile, 0, 15)
    columns = torch.randperm(block, generator=rng)
    keep = torch.rand(block, rows, generator=rng) < 0.05 if kept else None
    arguments = (targets, weights, feedback, codec, columns, keep)
    codes, errors = catalog.load("kernels", name)(*arguments)
    wanted, wanted_errors = reference.feedback_block(*arguments)
    same = (codes == wanted).all(0)
    assert (~same).sum() <= rows // 16  # rows in which a target lies half way within the last bits of float32
    # An outlier half way between two float16 values of its size may fall either way: 2^-11 of 0.1.
    torch.testing.assert_close(errors[:, same], wanted_errors[:, same], rtol=0, atol=5e-5 if kept else 2e-6)


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [Affine(group_size=16), Affine(bits=3, symmetric=False, granularity="channel", scale_dtype="float32")],
    ids=lambda s: s.describe(),
)
@pytest.mark.parametrize("name", kernels("tile_sums"))
def test_tile_sums_equal_the_reference(name, scheme, weighed):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(33, 64, generator=rng) * 0.02
    weights = torch.rand(64, generator=rng) if weighed else None
    params = scheme.fit(w, clip=0.9)
    found = catalog.load("kernels", name)(w, weights, scheme, params)
    wanted = reference.tile_sums(w, weights, scheme, params)
    if found is None:
        pytest.skip("this kernel leaves the scheme to the generic path")
    for part in ("error", "above", "below"):
        torch.testing.assert_close(getattr(found, part), getattr(wanted, part), rtol=3e-5, atol=1e-7)


def books() -> list[Scheme]:
    load = catalog.load("schemes", "codebook")
    sizes = [load(book=book, block_size=block) for book in ("nf4", "fp4") for block in (32, 64, 4096)]
    return [
        *sizes,
        *(load(book=book, double_quant=True) for book in ("nf4", "fp4", "kmeans")),
        *(load(book="kmeans", bits=bits, block_size=128) for bits in (2, 4, 5, 8)),
        load(book="custom", bits=2, table=(-1.0, -0.25, 0.3)),
        Affine(),
    ]


@pytest.mark.parametrize("scheme", books(), ids=lambda s: s.describe())
@pytest.mark.parametrize("name", kernels("encode"))
def test_encoding_equals_the_reference_bit_for_bit(name, scheme):
    rng = torch.Generator().manual_seed(0)
    encode, known = catalog.load("kernels", name), 0
    for rows, columns in ((64, 512), (128, 96), (3, 96)):
        w = torch.randn(rows, columns, generator=rng) * 0.02
        w[0] = 0.0
        w[1] *= 1e-38
        context = scheme.prepare([w])
        found = encode(w, scheme, None, context)
        if found is None:
            continue
        known += 1
        params, codes = reference.encode(w, scheme, None, context)
        assert torch.equal(found[1], codes)
        assert found[0].keys() == params.keys()
        assert all(torch.equal(found[0][key], value) for key, value in params.items())
        loose = scheme.fit(w, context=context, clip=0.8)
        for given in (loose, params, {**loose, "absmax": -loose["absmax"]}):
            again = encode(w, scheme, given, context)
            assert torch.equal(again[1], scheme.encode(w, given))
    if not known:
        pytest.skip("this kernel leaves the scheme to the generic path")
