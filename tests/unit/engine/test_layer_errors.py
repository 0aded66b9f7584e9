"""Errors layer by layer against whole models in transformers with hooks on their modules."""

from __future__ import annotations

import shutil

import pytest
import safetensors.torch
import torch
from tests.gguf_zoo import write_gguf
from tests.small import make_model, run

from bitwright.engine.layer_errors import measure_layers
from bitwright.errors import InputError
from bitwright.evaluating import load_any

LENGTH = 48
TOKENS = torch.randint(2, 250, (5, LENGTH), generator=torch.Generator().manual_seed(4))


def quantized(source, out, *flags):
    code = run("quantize", source, "-o", out, "--method", "rtn", "--bits", 4, "--group-size", 32, "--seed", 1, *flags)
    assert code == 0
    return out


def blocks_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def linears_of(model):
    kinds = ("Linear", "Conv1D", "QuantizedLinear")
    return {n: m for n, m in model.named_modules() if type(m).__name__ in kinds and n != "lm_head"}


def inputs_of(model):
    """What every linear, every block and the head read, and what every block gave."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in [*linears_of(model).items(), ("lm_head", model.get_output_embeddings())]:
        hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0])))
    for i, block in enumerate(blocks_of(model)):
        hooks.append(block.register_forward_pre_hook(lambda _, args, i=i: found.__setitem__(f"in {i}", args[0])))
        hooks.append(block.register_forward_hook(lambda _, __, out, i=i: found.__setitem__(f"out {i}", first(out))))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def first(out):
    return out[0] if isinstance(out, tuple) else out


def outputs_alone(model, inputs):
    """Outputs of every block when it is given other inputs."""
    found: dict[int, torch.Tensor] = {}
    hooks = []
    for i, block in enumerate(blocks_of(model)):
        given = inputs[f"in {i}"]
        hooks.append(block.register_forward_pre_hook(lambda _, args, given=given: (given, *args[1:])))
        hooks.append(block.register_forward_hook(lambda _, __, out, i=i: found.__setitem__(i, first(out))))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def matrix(module):
    weight = (module.decoded() if hasattr(module, "decoded") else module.weight).double()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def share(error, signal):
    return float(error.double().square().sum() / signal.double().square().sum())


def check(report, source, model):
    """Every dense linear and every block."""
    a, b = (load_any(path, dtype=torch.float32, kernel="reference") for path in (source, model))
    seen, drifted = inputs_of(a), inputs_of(b)
    alone = outputs_alone(b, seen)
    for record in report.blocks:
        i = record.block
        assert record.own == pytest.approx(share(alone[i] - seen[f"out {i}"], seen[f"out {i}"]), rel=2e-3)
        assert record.total == pytest.approx(share(drifted[f"out {i}"] - seen[f"out {i}"], seen[f"out {i}"]), rel=2e-3)
    by_name = {record.module: record for record in report.layers}
    ours, theirs = linears_of(a), linears_of(b)
    for name, module in ours.items():
        if name not in by_name and name.endswith("gate"):
            continue  # a router
        record, x = by_name[name], seen[name].double()
        change = matrix(theirs[name]) - matrix(module)
        assert record.relative == pytest.approx(share(x @ change.T, x @ matrix(module).T), rel=1e-4)
        assert record.weight == pytest.approx(share(change, matrix(module)), rel=1e-4)
        assert f".{record.block}.{record.role}" in name
    return a, b, seen, by_name


def test_every_linear_and_block_of_a_llama(llama, tmp_path):
    model = quantized(llama, tmp_path / "q", "--layout", "gptq")
    report = measure_layers(llama, model, tokens=TOKENS)
    check(report, llama, model)
    assert len(report.layers) == 3 * 7
    assert {record.scheme for record in report.layers} == {"int4 sym g32"}
    assert report.tokens == TOKENS.numel()
    worst = sorted(report.layers, key=lambda record: -record.relative)[:6]
    assert [found.module for found in report.histograms] == [record.module for record in worst]
    assert len({seen.label for seen in report.activations}) == 4
    assert not report.notes


def test_conv1d_of_gpt2_is_read_transposed(tmp_path):
    source = make_model("gpt2", tmp_path / "gpt2")
    model = quantized(source, tmp_path / "q")
    report = measure_layers(source, model, tokens=TOKENS)
    check(report, source, model)
    assert [record.role for record in report.layers[:4]] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_measured_on_the_tokens_routed_to_them(name, tmp_path):
    source = make_model(name, tmp_path / name)
    model = quantized(source, tmp_path / "q")
    report = measure_layers(source, model, tokens=TOKENS)
    a, b, seen, by_name = check(report, source, model)
    block, other = blocks_of(a)[1].mlp, blocks_of(b)[1].mlp
    router = [n for n in seen if n.startswith("model.layers.1.") and n.endswith("gate_proj")]
    assert not router
    held = {}
    hook = block.register_forward_pre_hook(lambda _, args: held.__setitem__("x", args[0]))
    with torch.no_grad():
        a(input_ids=TOKENS, use_cache=False)
    hook.remove()
    x = held["x"].reshape(-1, held["x"].shape[-1])
    logits = torch.softmax(x.float() @ block.gate.weight.float().T, -1)
    chosen = logits.topk(2).indices
    kinds = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    measured = 0
    for expert in range(4):
        mine = x[(chosen == expert).any(1)].double()
        both, down = (getattr(block.experts, n)[expert].double() for n in ("gate_up_proj", "down_proj"))
        both_q, down_q = (getattr(other.experts, n)[expert].double() for n in ("gate_up_proj", "down_proj"))
        half = len(both) // 2
        hidden = torch.nn.functional.silu(mine @ both[:half].T) * (mine @ both[half:].T)
        cases = ((mine, both[:half], both_q[:half]), (mine, both[half:], both_q[half:]), (hidden, down, down_q))
        for kind, (inputs, old, new) in zip(kinds, cases, strict=True):
            record = next(
                r
                for n, r in by_name.items()
                if f"layers.1.{'block_sparse_moe' if name == 'mixtral' else 'mlp'}.experts.{expert}.{kind}" in n
            )
            assert record.relative == pytest.approx(share(inputs @ (new - old).T, inputs @ old.T), rel=1e-3)
            assert record.relative > 0
            measured += 1
    assert measured == 12


def test_an_expert_that_no_token_reached_is_missing(tmp_path):
    source = make_model("mixtral", tmp_path / "mixtral")
    report = measure_layers(source, source, tokens=TOKENS[:1, :2])
    assert 0 < sum(".experts." in record.role for record in report.layers) < 3 * 4 * 3


def test_a_gguf_file_with_its_embedding_and_head(llama, tmp_path):
    model = tmp_path / "q.gguf"
    assert run("quantize", llama, "-o", model, "--layout", "gguf", "--type", "Q4_0", "--pure") == 0
    report = measure_layers(llama, model, tokens=TOKENS)
    a, b, seen, by_name = check(report, llama, model)
    assert by_name["model.layers.0.mlp.up_proj"].scheme == "Q4_0"
    old, new = (m.get_input_embeddings().weight.double() for m in (a, b))
    embedding, head = by_name["model.embed_tokens"], by_name["lm_head"]
    assert (embedding.block, embedding.role, head.block, head.role) == (None, "embedding", None, "head")
    rows = TOKENS.flatten()
    assert embedding.relative == pytest.approx(share(new[rows] - old[rows], old[rows]), rel=1e-4)
    x = seen["lm_head"].double()
    assert head.relative == pytest.approx(share(x @ (new - old).T, x @ old.T), rel=1e-4)


def test_a_gguf_file_can_be_the_source(llama, tmp_path):
    (tmp_path / "plain").mkdir()
    plain = tmp_path / "plain" / "plain.gguf"
    write_gguf(llama, plain)
    model = quantized(llama, tmp_path / "q")
    found, expected = (measure_layers(source, model, tokens=TOKENS) for source in (plain, llama))
    assert [r.module for r in found.layers] == [r.module for r in expected.layers]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.relative == pytest.approx(other.relative, rel=1e-5)
    with pytest.raises(InputError, match="folders only"):
        measure_layers(plain, model)


def test_a_copy_has_no_error_at_all(llama, tmp_path):
    model = tmp_path / "copy"
    shutil.copytree(llama, model)
    report = measure_layers(llama, model, tokens=TOKENS)
    assert len(report.layers) == 3 * 7
    assert {(r.relative, r.snr_db, r.weight, r.top_channels) for r in report.layers} == {(0.0, None, 0.0, 0.0)}
    assert {(r.own, r.total) for r in report.blocks} == {(0.0, 0.0)}
    assert report.histograms == ()


def test_text_is_sampled_from_the_source_or_read_from_a_file(llama, text):
    sampled = measure_layers(llama, llama, samples=2, length=24)
    assert (sampled.text, sampled.tokens) == ("model samples", 48)
    read = measure_layers(llama, llama, text=text, samples=2, length=1000)
    assert (read.text, read.tokens) == ("text.txt", 256)  # as long as the model's window


def test_scaled_channels_are_scaled_back(llama, tmp_path):
    """The same function with other factors in the norms and between up and down: what is left is the error of rounding."""
    folded = tmp_path / "folded"
    shutil.copytree(llama, folded)
    tensors = safetensors.torch.load_file(folded / "model.safetensors")
    tensors = {name: value.float() for name, value in tensors.items()}
    rng = torch.Generator().manual_seed(0)
    factors = {}
    for i in range(3):
        prefix = f"model.layers.{i}."
        for norm, names in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            f = torch.exp2(torch.randint(-1, 2, (64,), generator=rng).float())
            tensors[f"{prefix}{norm}.weight"] /= f
            for name in names:
                tensors[f"{prefix}{name}.weight"] *= f
                factors[prefix + name] = f
        f = torch.exp(0.5 * torch.randn(128, generator=rng))
        tensors[f"{prefix}mlp.up_proj.weight"] /= f.unsqueeze(1)
        tensors[f"{prefix}mlp.down_proj.weight"] *= f
        factors[prefix + "mlp.down_proj"] = f
        factors[f"{prefix}rows"] = f
    safetensors.torch.save_file(tensors, folded / "model.safetensors", metadata={"format": "pt"})
    model = quantized(folded, tmp_path / "q")
    report = measure_layers(llama, model, tokens=TOKENS)
    assert any("scaled" in note for note in report.notes)
    a, b = (load_any(path, dtype=torch.float32, kernel="reference") for path in (llama, model))
    seen, ours, theirs = inputs_of(a), linears_of(a), linears_of(b)
    by_name = {record.module: record for record in report.layers}
    for name, module in ours.items():
        new = matrix(theirs[name]) / factors.get(name, torch.ones(())).double()
        fitted = name.endswith(("up_proj", "down_proj"))
        if name.endswith("up_proj"):
            new = new * factors[name.replace("mlp.up_proj", "rows")].double().unsqueeze(1)
        x, old = seen[name].double(), matrix(module)
        expected = share(x @ (new - old).T, x @ old.T)
        assert by_name[name].relative == pytest.approx(expected, rel=0.2 if fitted else 1e-3)
        assert expected < 0.1, name
    alone = outputs_alone(b, seen)
    for record in report.blocks:
        expected = share(alone[record.block] - seen[f"out {record.block}"], seen[f"out {record.block}"])
        assert record.own == pytest.approx(expected, rel=2e-3)


def test_a_rotated_model_is_compared_with_the_rotated_source(llama, tmp_path):
    model = tmp_path / "q"
    flags = ("--method", "rtn", "--bits", 8, "--group-size", 32, "--transform", "rotate", "--seed", 3)
    assert run("quantize", llama, "-o", model, *flags) == 0
    report = measure_layers(llama, model, tokens=TOKENS)
    assert any("rotated" in note for note in report.notes)
    assert max(record.relative for record in report.layers) < 3e-4
    assert max(record.total for record in report.blocks) < 3e-3
    file = tmp_path / "q.gguf"
    flags = ("--layout", "gguf", "--type", "Q8_0", "--transform", "rotate", "--seed", 3)
    assert run("quantize", llama, "-o", file, *flags) == 0
    assert max(record.relative for record in measure_layers(llama, file, tokens=TOKENS).layers) < 3e-4


def test_rounding_of_inputs_is_left_out_and_said(llama, tmp_path, text):
    model = tmp_path / "q"
    assert run("quantize", llama, "-o", model, "--recipe", "w8a8-static", "--calibration", text) == 0
    report = measure_layers(llama, model, tokens=TOKENS)
    assert any("left out" in note for note in report.notes)
    assert all(record.relative < 0.02 for record in report.layers)


def test_another_model_is_refused(llama, tmp_path):
    other = make_model("qwen2", tmp_path / "qwen2")
    with pytest.raises(InputError, match="not a quantized version"):
        measure_layers(llama, other, tokens=TOKENS)


def test_bad_numbers_are_refused(llama):
    with pytest.raises(InputError, match="measure nothing"):
        measure_layers(llama, llama, samples=0)
