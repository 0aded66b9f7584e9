"""The block runner against transformers' own forward pass, for every architecture of the zoo."""

import pytest
import torch
from tests.zoo import ZOO, make

from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.model.blocks import BlockRunner
from bitwright.model.names import map_names
from bitwright.model.observe import InputObserver
from bitwright.model.skeleton import build_skeleton
from bitwright.model.structure import structure_from_headers, structure_from_skeleton

BLOCKS = 3
#: inputs that several linears of one block share, counted by hand: q/k/v and gate/up, or what the architecture fuses
SHARED = {
    "llama": [3, 1, 2, 1], "mistral": [3, 1, 2, 1], "qwen2": [3, 1, 2, 1], "qwen3": [3, 1, 2, 1], "gemma2": [3, 1, 2, 1],
    "gemma3_text": [3, 1, 2, 1], "phi3": [1, 1, 1, 1], "gpt2": [1, 1, 1, 1], "opt": [3, 1, 1, 1],
}  # fmt: skip


@pytest.fixture(scope="module", params=list(ZOO))
def opened(request, tmp_path_factory):
    folder = make(request.param, tmp_path_factory.mktemp("blocks") / request.param)
    source = SafetensorsDir.open(folder)
    skeleton = build_skeleton(folder)
    yield request.param, folder, source, skeleton, map_names(skeleton, source.tensors)
    source.close()


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))


def test_streamed_blocks_compute_the_whole_models_logits(opened, tokens):
    import transformers

    _, folder, source, skeleton, names = opened
    runner = BlockRunner(skeleton, names, source, torch.float32)
    (capture,) = runner.capture([tokens])
    hidden = capture.hidden
    for index in range(BLOCKS):
        block = runner.load_block(index)
        hidden = runner.run(block, hidden, capture.calls[index])
        runner.free(block)
    with runner.head() as logits:
        found = logits(hidden)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(input_ids=tokens, use_cache=False).logits
    assert float(expected.std()) > 0.01
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_blocks_can_be_captured_and_run_again(opened, tokens):
    _, _, source, skeleton, names = opened
    runner = BlockRunner(skeleton, names, source, torch.float32)
    outs = []
    for _ in range(2):
        (capture,) = runner.capture([tokens])
        block = runner.load_block(1)
        outs.append(runner.run(block, capture.hidden, capture.calls[1]))
        runner.free(block)
    assert torch.equal(outs[0], outs[1])
    assert float(outs[0].std()) > 0


def test_headers_alone_find_the_linears_that_the_model_code_has(opened):
    name, _, source, skeleton, names = opened
    structure = structure_from_skeleton(skeleton, names, source.tensors)
    by_name = structure_from_headers(source.tensors, source.config)
    wanted = {unit.tensor: unit.shape for unit in structure.units if unit.role in ("linear", "expert")}
    assert {unit.tensor: unit.shape for unit in by_name.units} == wanted
    assert structure.block_count == by_name.block_count == BLOCKS
    assert len(wanted) % BLOCKS == 0
    assert not any("router" in tensor or tensor.endswith("mlp.gate.weight") for tensor in wanted), name


def test_linears_that_share_an_input_are_seen(opened, tokens):
    name, _, source, skeleton, names = opened
    if name not in SHARED:
        pytest.skip("experts and parallel blocks are counted end to end")
    runner = BlockRunner(skeleton, names, source, torch.float32)
    (capture,) = runner.capture([tokens])
    block = runner.load_block(0)
    seen = []
    matrices = {n: p for n, p in block.named_parameters() if p.dim() == 2}
    with InputObserver(matrices, lambda slot, x, token: seen.append((token, slot, tuple(x.shape)))):
        runner.run(block, capture.hidden, capture.calls[0])
    runner.free(block)
    counts = [sum(t == token for t, _, _ in seen) for token in dict.fromkeys(t for t, _, _ in seen)]
    assert counts == SHARED[name]
    assert all(shape[0] == tokens.numel() for _, _, shape in seen)


def test_observed_inputs_are_the_linears_inputs(opened, tokens):
    """What the observer sees times the weight is what a plain forward hook gets out of the linear."""
    name, _, source, skeleton, names = opened
    if name not in SHARED or name == "gpt2":
        pytest.skip("plain nn.Linear modules only")
    runner = BlockRunner(skeleton, names, source, torch.float32)
    (capture,) = runner.capture([tokens])
    block = runner.load_block(0)
    inputs, outputs, hooks = {}, {}, []
    for path, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            keep = lambda m, args, out, path=path: outputs.update({path: out.reshape(-1, out.shape[-1])})  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    matrices = {n: p for n, p in block.named_parameters() if p.dim() == 2}
    with InputObserver(matrices, lambda slot, x, token: inputs.update({slot[0]: x.clone()})):
        runner.run(block, capture.hidden, capture.calls[0])
    for hook in hooks:
        hook.remove()
    assert {path + ".weight" for path in outputs} == inputs.keys()
    for path, out in outputs.items():
        module = block.get_submodule(path)
        expected = inputs[path + ".weight"] @ module.weight.T + (module.bias if module.bias is not None else 0)
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
    runner.free(block)


def test_buffers_beside_parameters_are_computed_and_parameters_kept(tmp_path):
    """Gemma's embedding holds a weight and a computed scale: the square root of the width."""
    from bitwright.runtime.load import load_model

    folder = make("gemma2", tmp_path / "gemma2")
    model = load_model(folder, dtype=torch.float32)
    source = SafetensorsDir.open(folder)
    assert torch.equal(model.model.embed_tokens.weight, source.read("model.embed_tokens.weight").float())
    source.close()
    assert float(model.model.embed_tokens.embed_scale) == pytest.approx(8.0)
