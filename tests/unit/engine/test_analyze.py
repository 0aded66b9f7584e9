"""The analysis of tiny models against hooks on transformers' own forward pass."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from tests.small import add_tokenizer
from tests.zoo import make

from bitwright import analyze
from bitwright.engine.calibration import load_tokenizer
from bitwright.errors import InputError, NumericError

LENGTH, SAMPLES = 64, 6
#: block and channel whose norm weight is made this much larger, the weights behind it smaller: the model computes the same
BLOCK, CHANNEL, FACTOR = 1, 29, 64.0


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    edit(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = make("llama", tmp_path_factory.mktemp("analyze") / "plain", dtype=torch.float32)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def spiky(plain, tmp_path_factory):
    """The same function, with one outlier channel before q, k and v of one block."""
    folder = tmp_path_factory.mktemp("analyze") / "spiky"
    shutil.copytree(plain, folder)

    def inject(tensors):
        prefix = f"model.layers.{BLOCK}."
        tensors[prefix + "input_layernorm.weight"][CHANNEL] *= FACTOR
        for name in "qkv":
            tensors[f"{prefix}self_attn.{name}_proj.weight"][:, CHANNEL] /= FACTOR

    change(folder, inject)
    return folder


def hooked(folder, text):
    """Largest magnitude of every channel of every linear's input, from the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(_module, args):
            largest = args[0].reshape(-1, args[0].shape[-1]).abs().amax(0)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return hook

    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(note(name))
    ids = load_tokenizer(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)][:SAMPLES]
    with torch.no_grad():
        model(torch.tensor(windows))
    return found


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    """Exactly the windows that are asked for, so that none has to be chosen."""
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(("A small bird sat on a wall and sang. " * 20)[: LENGTH * SAMPLES])
    return file


def look(folder, text, **options):
    return analyze(folder, text=text, samples=SAMPLES, length=LENGTH, **options)


def test_every_linear_is_seen_as_the_whole_model_sees_it(spiky, short_text):
    report, wanted = look(spiky, short_text), hooked(spiky, short_text)
    assert [name for seen in report.inputs for name in seen.layers] == list(wanted)
    for seen in report.inputs:
        assert seen.tokens == SAMPLES * LENGTH
        for name in seen.layers:
            torch.testing.assert_close(seen.profile, wanted[name], rtol=1e-4, atol=1e-5)
    assert [seen.label for seen in report.inputs[:4]] == [
        "self_attn.q_proj, k_proj, v_proj", "self_attn.o_proj", "mlp.gate_proj, up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert (report.model, report.text, report.tokens) == ("spiky", "short.txt", SAMPLES * LENGTH)


def test_an_injected_outlier_channel_is_found(plain, spiky, short_text):
    before, after = look(plain, short_text), look(spiky, short_text)
    assert (after.worst.block, after.worst.label) == (BLOCK, "self_attn.q_proj, k_proj, v_proj")
    assert after.worst.channels[0].index == CHANNEL
    same = next(seen for seen in before.inputs if (seen.block, seen.label) == (BLOCK, after.worst.label))
    assert float(after.worst.profile[CHANNEL]) == pytest.approx(FACTOR * float(same.profile[CHANNEL]), rel=1e-3)
    assert after.worst.advice in ("smoothquant", "keep")
    assert after.worst.share_above > same.share_above
    assert after.worst.lost_bits_tensor > same.lost_bits_tensor + 3
    others = [(a, b) for a, b in zip(before.inputs, after.inputs, strict=True) if b is not after.worst]
    assert all(b.lost_bits_tensor == pytest.approx(a.lost_bits_tensor, abs=0.01) for a, b in others)


def test_hidden_states_on_disk_give_the_same_report(spiky, short_text):
    assert look(spiky, short_text, max_memory_bytes=3) == look(spiky, short_text)


def test_options_reach_the_report(spiky, short_text):
    report = look(spiky, short_text, top=2, threshold=0.5)
    assert all(len(seen.channels) == 2 for seen in report.inputs)
    assert report.threshold == 0.5
    assert report.worst.share_above > look(spiky, short_text).worst.share_above
    for options in ({"top": -1}, {"threshold": 0.0}):
        with pytest.raises(InputError):
            look(spiky, short_text, **options)


@pytest.mark.parametrize(("name", "labels"), [
    ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ("phi3", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
])  # fmt: skip
def test_other_architectures_are_watched_as_well(name, labels, tmp_path, text):
    make(name, tmp_path / name)
    add_tokenizer(tmp_path / name)
    report = look(tmp_path / name, text)
    assert [seen.label for seen in report.inputs] == 3 * labels


def test_the_experts_of_a_block_count_as_one_input(tmp_path, text):
    make("mixtral", tmp_path / "mixtral")
    add_tokenizer(tmp_path / "mixtral")
    report = look(tmp_path / "mixtral", text)
    experts = [seen for seen in report.inputs if "experts" in seen.label]
    assert len(report.inputs) == 3 * 4
    assert len(experts) == 3 * 2
    # Each token goes to two of the four experts.
    assert all(seen.tokens == 2 * SAMPLES * LENGTH for seen in experts)
    assert len(experts[0].layers) == 8
    assert ".*." in experts[0].label


def test_without_a_text_the_model_samples_its_own(plain):
    first, second = (analyze(plain, samples=3, length=24, seed=seed) for seed in (0, 0))
    assert first == second
    assert (first.text, first.tokens) == ("model samples", 72)
    assert first != analyze(plain, samples=3, length=24, seed=1)


def test_activations_that_overflow_name_the_block(plain, tmp_path, short_text):
    folder = tmp_path / "broken"
    shutil.copytree(plain, folder)
    change(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    with pytest.raises(NumericError, match="block 1"):
        look(folder, short_text)


def test_a_model_that_transformers_does_not_know_is_refused(plain, tmp_path, short_text):
    folder = tmp_path / "strange"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "strange"}))
    with pytest.raises(InputError):
        look(folder, short_text)
