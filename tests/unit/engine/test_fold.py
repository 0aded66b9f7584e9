"""Factors of stored tensors, against plain arithmetic on small ones."""

from types import SimpleNamespace

import pytest
import torch

from bitwright.core.tensor import TensorSpec
from bitwright.core.transform import Consumer, Edge, Producer
from bitwright.engine.fold import Folder
from bitwright.engine.rewrite import Factors, RewrittenSource
from bitwright.model.names import NameMap, Place

CHANNELS = 8


def stored_source(tensors):
    specs = {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()}

    def read(name, rows=None):
        return tensors[name] if rows is None else tensors[name][rows[0] : rows[1]]

    return SimpleNamespace(path=None, config={}, tensors=specs, read=read, fingerprint=dict)


def fold(tensors, places, edge, factors, *, exact):
    """The rewritten tensors."""
    source = stored_source(tensors)
    rewritten = RewrittenSource(source, {}, frozenset(exact))
    folder = Folder("b.", NameMap(places=places), source.tensors, frozenset(exact), rewritten.read)
    assert folder.reason(edge) is None
    rewritten.add(folder.fold(edge, factors))
    return {name: rewritten.read(name) for name in tensors}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors_of(count=CHANNELS):
    return random(count, seed=9).exp()


def norm_edge(*consumers, offset=0.0, bias=None):
    producer = Producer("norm.weight", torch.arange(CHANNELS), bias, offset=offset, norm=True)
    return Edge("e", producer, tuple(Consumer(name, torch.arange(CHANNELS)) for name in consumers))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_consumers_take_up_what_rounding_a_norm_loses(dtype, offset):
    tensors = {"n": random(CHANNELS, dtype=dtype) * 0.3 + (1 - offset), "w": random(5, CHANNELS, seed=1, dtype=dtype)}
    places = {"n": Place("b.norm.weight"), "w": Place("b.w")}
    found = fold(tensors, places, norm_edge("w", offset=offset), factors_of(), exact=["w"])
    assert found["n"].dtype == dtype
    assert found["w"].dtype == torch.float32
    before = (tensors["n"].double() + offset) * tensors["w"].double()
    after = (found["n"].double() + offset) * found["w"].double()
    assert torch.allclose(after, before, rtol=1e-6)
    # Near the factors that were asked for: off by no more than the rounding.
    asked = tensors["w"].double() * factors_of()
    assert torch.allclose(found["w"].double(), asked, rtol=0.02)


def test_a_consumer_that_stays_in_16_bits_is_changed_without_loss():
    tensors = {
        "n": random(CHANNELS, dtype=torch.bfloat16),
        "w": random(5, CHANNELS, seed=1, dtype=torch.bfloat16),
        "router": random(3, CHANNELS, seed=2, dtype=torch.bfloat16),
    }
    places = {"n": Place("b.norm.weight"), "w": Place("b.w"), "router": Place("b.router")}
    found = fold(tensors, places, norm_edge("w", "router"), factors_of(), exact=["w"])
    for name in ("w", "router"):
        before = tensors["n"].double() * tensors[name].double()
        assert torch.equal(found["n"].double() * found[name].double(), before)
    assert found["router"].dtype == torch.bfloat16
    assert not torch.equal(found["router"], tensors["router"])


def test_a_producer_that_stays_in_16_bits_is_changed_without_loss():
    tensors = {"v": random(CHANNELS, 6, dtype=torch.bfloat16), "o": random(5, CHANNELS, seed=1, dtype=torch.bfloat16)}
    places = {"v": Place("b.v"), "o": Place("b.o")}
    edge = Edge("e", Producer("v", torch.arange(CHANNELS)), (Consumer("o", torch.arange(CHANNELS)),))
    found = fold(tensors, places, edge, factors_of(), exact=["o"])
    assert torch.equal(found["o"].double() @ found["v"].double(), tensors["o"].double() @ tensors["v"].double())
    assert not torch.equal(found["v"], tensors["v"])


def test_zero_norm_elements_keep_the_factor_one():
    tensors = {"n": random(CHANNELS, dtype=torch.bfloat16), "w": random(5, CHANNELS, seed=1)}
    tensors["n"][3] = 0
    found = fold(tensors, {"n": Place("b.norm.weight"), "w": Place("b.w")}, norm_edge("w"), factors_of(), exact=["w"])
    assert torch.equal(found["w"][:, 3], tensors["w"][:, 3])
    assert bool(torch.isfinite(found["w"]).all())


def test_rows_of_a_fused_producer_and_repeated_columns_go_to_their_places():
    """Stored q and v are rows of one matrix in memory; two columns of the consumer, stored turned round, read each channel."""
    tensors = {"q": random(4, 6), "v": random(4, 6, seed=1), "o": random(8, 5, seed=2), "bias": random(8, seed=3)}
    places = {
        "q": Place("b.qv", rows=(0, 4)), "v": Place("b.qv", rows=(4, 8)), "o": Place("b.o"), "bias": Place("b.qv_bias"),
    }  # fmt: skip
    channel = torch.tensor([0, 0, 1, 1, 2, 2, 3, -1])
    producer = Producer("qv", torch.arange(4, 8), "qv_bias")
    edge = Edge("e", producer, (Consumer("o", channel, transposed=True),))
    found = fold(tensors, places, edge, factors_of(4), exact=tensors)
    assert torch.equal(found["q"], tensors["q"])
    assert torch.allclose(found["v"], tensors["v"] / factors_of(4)[:, None])
    assert torch.allclose(found["bias"], torch.cat([tensors["bias"][:4], tensors["bias"][4:] / factors_of(4)]))
    columns = torch.cat([factors_of(4)[channel[:7]], torch.ones(1)])
    assert torch.allclose(found["o"], tensors["o"] * columns[:, None])


def test_experts_are_told_apart():
    tensors = {f"{kind}{i}": random(CHANNELS, CHANNELS, seed=i) for i in range(2) for kind in ("up", "down")}
    places = {f"{kind}{i}": Place(f"b.{kind}", expert=i) for i in range(2) for kind in ("up", "down")}
    producer = Producer("up", torch.arange(CHANNELS), expert=1)
    edge = Edge("e", producer, (Consumer("down", torch.arange(CHANNELS), expert=1),))
    found = fold(tensors, places, edge, factors_of(), exact=tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in ("up0", "down0"))
    assert torch.allclose(found["down1"] @ found["up1"], tensors["down1"] @ tensors["up1"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["up1"], tensors["up1"])


def test_what_is_not_stored_as_plain_matrices_is_refused_with_the_reason():
    specs = {"n": TensorSpec("n", (CHANNELS,), torch.float32)}
    folder = Folder("b.", NameMap(places={"n": Place("b.norm.weight")}), specs, frozenset(), lambda name: torch.ones(8))
    assert folder.reason(norm_edge("w")) == "w is not stored as plain matrices"


def test_parts_of_a_rewritten_tensor_are_those_of_the_whole():
    tensors = {"w": random(6, CHANNELS), "kept": random(3, 3)}
    source = stored_source(tensors)
    rows, columns = random(6, seed=1).exp(), random(CHANNELS, seed=2).exp()
    rewritten = RewrittenSource(source, {"w": Factors(rows=rows)}, frozenset(["w"]))
    rewritten.add({"w": Factors(columns=columns)})
    assert torch.allclose(rewritten.read("w"), tensors["w"] * rows[:, None] * columns)
    assert torch.equal(rewritten.read("w", (2, 5)), rewritten.read("w")[2:5])
    assert torch.equal(rewritten.read("kept"), tensors["kept"])
