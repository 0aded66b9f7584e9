"""Edges of every architecture against what its config says, and whole models that stay the same when all of them are folded."""

import re
from contextlib import ExitStack

import pytest
import torch
from tests.zoo import ZOO, make
from torch import nn

from bitwright.model.edges import find_edges, folded
from bitwright.runtime.load import load_model

GATED = {
    "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
    "self_attn.v_proj": "self_attn.o_proj",
    "mlp.up_proj": "mlp.down_proj",
}
GEMMA = {**GATED, "pre_feedforward_layernorm": GATED["post_attention_layernorm"]}
del GEMMA["post_attention_layernorm"]
SPARSE = {
    "input_layernorm": GATED["input_layernorm"],
    "post_attention_layernorm": "mlp.experts.gate_up_proj mlp.gate",
    "self_attn.v_proj": "self_attn.o_proj",
    "mlp.experts.gate_up_proj": "mlp.experts.down_proj",
}
#: architecture -> producer -> consumers, from the published model code
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), GATED),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    **dict.fromkeys(("mixtral", "qwen3_moe"), SPARSE),
    "phi3": {
        "input_layernorm": "self_attn.qkv_proj",
        "post_attention_layernorm": "mlp.gate_up_proj",
        "self_attn.qkv_proj": "self_attn.o_proj",
        "mlp.gate_up_proj": "mlp.down_proj",
    },
    # The MLPs of gpt2, gpt_neox and falcon have a GELU between their matrices.
    "gpt2": {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc", "attn.c_attn": "attn.c_proj"},
    "opt": {
        "self_attn_layer_norm": "self_attn.k_proj self_attn.q_proj self_attn.v_proj",
        "final_layer_norm": "fc1",
        "self_attn.v_proj": "self_attn.out_proj",
        "fc1": "fc2",  # through a ReLU, which positive factors pass
    },
    "gpt_neox": {
        "input_layernorm": "attention.query_key_value",
        "post_attention_layernorm": "mlp.dense_h_to_4h",
        "attention.query_key_value": "attention.dense",
    },
    "falcon": {
        "ln_attn": "self_attention.query_key_value",
        "ln_mlp": "mlp.dense_h_to_4h",
        "self_attention.query_key_value": "self_attention.dense",
    },
}
#: norms whose output is added to the residual stream, or rotated and multiplied with another one
LEFT = {
    "qwen3": {"self_attn.q_norm", "self_attn.k_norm"},
    "qwen3_moe": {"self_attn.q_norm", "self_attn.k_norm"},
    "gemma2": {"post_attention_layernorm", "post_feedforward_layernorm"},
    "gemma3_text": {
        "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm",
    },
}  # fmt: skip


def calls_of(model, tokens):
    """Every block, with the hidden states and the arguments that the model gives it."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    blocks, seen, hooks = lists[0], [], []

    def note(block, args, kwargs):
        seen.append((block, args, kwargs))

    for block in blocks:
        hooks.append(block.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def edges_of(block, args, kwargs):
    def run():
        out = block(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    hidden = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        return find_edges(block, run, residual=hidden)


def tokens_of(count, seed=0):
    return torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def random_factors(edge, seed):
    return torch.randn(edge.channels, generator=torch.Generator().manual_seed(seed)).mul(0.7).exp()


@pytest.fixture(scope="module", params=list(ZOO))
def zoo(request, tmp_path_factory):
    folder = make(request.param, tmp_path_factory.mktemp("zoo") / request.param, dtype=torch.float32)
    model = load_model(folder)
    seen, _ = calls_of(model, tokens_of(48))
    return request.param, model, [(call[0], *edges_of(*call)) for call in seen]


def value_rows(name, config):
    """Row of the projection that makes each input column of the output projection, written out from the model code."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    if name == "falcon":
        kv = config.num_kv_heads
    found = []
    for column in range(heads * width):
        head, inside = divmod(column, width)
        group = head // (heads // kv)
        match name:
            case "phi3":  # all queries, all keys, all values
                first = (heads + kv + group) * width
            case "gpt2":
                first = 2 * config.hidden_size + head * width
            case "gpt_neox":  # query, key, value of the first head, then of the second
                first = (3 * head + 2) * width
            case "falcon":  # per group: its queries, one key, one value
                first = (group * (heads // kv + 2) + heads // kv + 1) * width
            case _:
                first = group * width
        found.append(first + inside)
    return torch.tensor(found)


def test_edges_are_those_of_the_architecture(zoo):
    name, _, blocks = zoo
    for _, edges, left in blocks:
        found = {}
        for edge in edges:
            found.setdefault(edge.producer.weight.removesuffix(".weight"), set()).update(
                c.weight.removesuffix(".weight") for c in edge.consumers
            )
        assert found == {producer: set(consumers.split()) for producer, consumers in EXPECTED[name].items()}
        assert {line.split(":")[0] for line in left} == LEFT.get(name, set())


def test_channels_reach_the_columns_that_the_config_says(zoo):
    name, model, blocks = zoo
    for block, edges, _ in blocks:
        for edge in edges:
            if edge.producer.norm:
                assert edge.producer.offset == (1.0 if name.startswith("gemma") else 0.0)
                assert (edge.producer.bias is not None) == (name in ("gpt2", "opt", "gpt_neox", "falcon"))
                assert all(torch.equal(c.channel, edge.producer.rows) for c in edge.consumers)
                continue
            (consumer,) = edge.consumers
            reached = edge.producer.rows[consumer.channel]
            if "attn" in edge.producer.weight or "attention" in edge.producer.weight:
                assert torch.equal(reached, value_rows(name, model.config))
            else:
                matrix = block.get_parameter(edge.producer.weight)
                rows = matrix.shape[-2]
                fused = "gate_up" in edge.producer.weight
                assert torch.equal(reached, torch.arange(rows // 2 if fused else 0, rows))
            assert edge.producer.bias == (f"{edge.name.split(' ')[0]}.bias" if edge.producer.bias else None)
            assert edge.producer.transposed == consumer.transposed == (name == "gpt2")


def test_logits_stay_when_every_edge_is_folded(zoo):
    _, model, blocks = zoo
    tokens = tokens_of(64, seed=1)
    with torch.no_grad(), ExitStack() as stack:
        before = model(input_ids=tokens, use_cache=False).logits
        for number, (block, edges, _) in enumerate(blocks):
            for edge in edges:
                stack.enter_context(folded(block, edge, random_factors(edge, seed=number)))
        after = model(input_ids=tokens, use_cache=False).logits
        changed = sum(1 for block, edges, _ in blocks for _ in edges)
    assert changed >= 9
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before), "folding was not undone"


def test_folding_one_channel_wrongly_would_be_seen(zoo):
    """The comparison above has teeth: the producer alone, divided in a single channel, changes the logits."""
    _, model, blocks = zoo
    tokens = tokens_of(64, seed=1)
    block, edges, _ = blocks[1]
    edge = next(e for e in edges if e.producer.norm)
    weight = block.get_parameter(edge.producer.weight)
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
        kept = weight.clone()
        weight[3] *= 1.5
        after = model(input_ids=tokens, use_cache=False).logits
        weight.copy_(kept)
    assert not torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_no_token_reached_are_edges_too(name, tmp_path):
    model = load_model(make(name, tmp_path / name, dtype=torch.float32))
    (first, *_), _ = calls_of(model, tokens_of(1))  # one token reaches two of the four experts
    edges, _ = edges_of(*first)
    inside = [edge for edge in edges if edge.producer.expert is not None]
    assert [edge.producer.expert for edge in inside] == [0, 1, 2, 3]
    assert [[c.expert for c in edge.consumers] for edge in inside] == [[0], [1], [2], [3]]
    norm = next(edge for edge in edges if edge.producer.weight == "post_attention_layernorm.weight")
    assert sorted(c.expert for c in norm.consumers if "experts" in c.weight) == [0, 1, 2, 3]
    tokens = tokens_of(64, seed=2)  # these reach all of them
    with torch.no_grad(), ExitStack() as stack:
        before = model(input_ids=tokens, use_cache=False).logits
        for number, edge in enumerate(edges):
            stack.enter_context(folded(first[0], edge, random_factors(edge, number)))
        after = model(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_value_channels_that_are_always_zero_are_left_out(tmp_path):
    model = load_model(make("llama", tmp_path / "llama", dtype=torch.float32))
    (first, *_), _ = calls_of(model, tokens_of(32))
    with torch.no_grad():
        first[0].self_attn.v_proj.weight[5] = 0
    edges, _ = edges_of(*first)
    (values,) = (edge for edge in edges if "v_proj" in edge.producer.weight)
    assert values.producer.rows.tolist() == [row for row in range(32) if row != 5]
    reached = values.consumers[0].channel
    heads = value_rows("llama", model.config)
    assert torch.equal(reached >= 0, heads != 5)
    assert torch.equal(values.producer.rows[reached[reached >= 0]], heads[heads != 5])


def test_norm_channels_that_are_always_zero_keep_their_place(tmp_path):
    model = load_model(make("llama", tmp_path / "llama", dtype=torch.float32))
    (first, *_), _ = calls_of(model, tokens_of(32))
    with torch.no_grad():
        first[0].input_layernorm.weight[7] = 0
    edges, _ = edges_of(*first)
    norm = next(edge for edge in edges if edge.producer.weight == "input_layernorm.weight")
    assert all(torch.equal(c.channel, torch.arange(64)) for c in norm.consumers)


class Block(nn.Module):
    """A residual branch of one norm and three matrices, put together as a test wants it."""

    def __init__(self, forward, width=16, inner=24):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.norm.weight, 1, 0.2)
        nn.init.normal_(self.norm.bias, 0, 0.2)
        self.one, self.two = nn.Linear(width, inner), nn.Linear(width, inner)
        self.fused, self.out = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.way = forward

    def forward(self, x):
        return x + self.way(self, x)


def found_in(way, width=16):
    block = Block(way, width)
    x = torch.randn(1, 40, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        edges, left = find_edges(block, lambda: block(x), residual=x)
    return {edge.name: edge for edge in edges}, left


def test_a_norm_that_also_feeds_the_residual_stream_is_left_out():
    edges, left = found_in(lambda self, x: self.norm(x) + self.out(torch.relu(self.one(self.norm(x)))))
    assert set(edges) == {"one -> out"}
    assert left == ["norm: what it feeds is not linear in it"]


def test_a_norm_that_reaches_the_residual_stream_faintly_is_left_out():
    edges, _ = found_in(lambda self, x: 1e-4 * self.norm(x) + self.out(torch.relu(self.one(self.norm(x)))))
    assert set(edges) == {"one -> out"}


@pytest.mark.parametrize("act", [torch.sigmoid, torch.tanh, lambda v: torch.relu(v).square(), nn.functional.gelu])
def test_nothing_is_folded_through_what_is_not_linear(act):
    edges, _ = found_in(lambda self, x: self.out(act(self.one(self.norm(x)))))
    assert set(edges) == {"norm -> one"}


def test_interleaved_gate_and_up_rows_are_told_apart():
    def way(self, x):
        gate, up = self.fused(self.norm(x))[..., ::2], self.fused(self.norm(x))[..., 1::2]
        return self.out(torch.sigmoid(gate) * up)

    edges, _ = found_in(way)
    edge = edges["fused -> out"]
    assert torch.equal(edge.producer.rows[edge.consumers[0].channel], torch.arange(1, 48, 2))


def test_two_factors_of_one_product_are_two_edges():
    """Each alone is linear; both are folded one after the other."""
    edges, _ = found_in(lambda self, x: self.out(self.one(self.norm(x)) * self.two(self.norm(x))))
    assert set(edges) == {"norm -> one, two", "one -> out", "two -> out"}


def test_a_small_part_of_a_wide_input_is_still_seen():
    """Columns a million times smaller than their neighbours belong to the edge as well."""

    def way(self, x):
        small = 1e-6 * self.one(self.norm(x))[..., :8]
        return self.out(torch.cat([small, self.two(x)[..., :16]], dim=-1))

    edges, _ = found_in(way)
    channel = edges["one -> out"].consumers[0].channel if "one -> out" in edges else None
    assert channel is not None
    assert channel[:8].tolist() == list(range(8))
    assert channel[8:].tolist() == [-1] * 16


def test_a_scaled_norm_with_an_offset_of_one_is_recognised_at_zero_weights():
    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    block = Block(lambda self, x: self.out(torch.relu(self.one(self.norm(x)))))
    block.norm = OnePlus()
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        edges, _ = find_edges(block, lambda: block(x), residual=x)
    assert {e.name: e.producer.offset for e in edges} == {"norm -> one": 1.0, "one -> out": 0.0}


def test_messages_name_modules_not_parameters():
    edges, _ = found_in(lambda self, x: self.out(torch.relu(self.one(self.norm(x)))))
    assert all(re.fullmatch(r"[\w.\[\]]+ -> [\w, ]+", name) for name in edges)


def test_the_search_takes_few_runs_whatever_the_width():
    """A fused gate and up matrix of many rows: its parts are proposed, not found row by row."""
    counts = []
    for inner in (24, 192):
        block = Block(None, inner=inner)
        half = inner

        def way(self, x, half=half):
            both = self.fused(self.norm(x))
            return self.out(torch.sigmoid(both[..., :half]) * both[..., half:])

        block.way = way
        x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(1))
        runs = []
        with torch.no_grad():
            edges, _ = find_edges(block, lambda block=block, x=x, runs=runs: (runs.append(1), block(x))[1], residual=x)
        assert {e.name for e in edges} == {"norm -> fused", "fused -> out"}
        counts.append(len(runs))
    assert counts[0] == counts[1] <= 12
