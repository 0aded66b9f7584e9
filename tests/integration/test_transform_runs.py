"""Runs with AWQ and SmoothQuant: against references written from the papers, with other methods and schemes, killed and resumed."""

import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import reference_awq, reference_smoothquant
from tests.reference_llama import Llama, divergence, truncated
from tests.small import STORY, STORY_TEXT, contents, left_over

import bitwright
from bitwright.runtime.checkpoint import open_checkpoint

LENGTH, SAMPLES, BLOCKS = 128, 8, 2
W8A8 = {"bits": 8, "group_size": "channel", "inputs": {"strategy": "tensor", "dynamic": False}}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The first blocks of the embedded story model."""
    return truncated(STORY, tmp_path_factory.mktemp("story") / "model", BLOCKS)


@pytest.fixture(scope="module")
def windows(story):
    """Calibration tokens, the first of the text as the engine cuts them, and others to measure with."""
    from tokenizers import Tokenizer

    text = STORY_TEXT.read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(story / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    rows = torch.tensor(ids[: 2 * SAMPLES * LENGTH]).view(-1, LENGTH)
    return rows[:SAMPLES], rows[SAMPLES:]


def quantized(story, output, **options):
    calibration = {"text": str(STORY_TEXT), "samples": SAMPLES, "length": LENGTH, "shuffle": False}
    values = {"layout": "native", "compute_dtype": "float32", "calibration": calibration, **options}
    return bitwright.quantize(story, output, **values)


def decoded(folder):
    """The quantized model in float64, and the static scales of its layers' inputs."""
    opened = open_checkpoint(folder)
    model = Llama(folder, {name: opened.read(name) for name in opened.tensors})
    stored = {name: opened.quantized(name).inputs for name in opened.modules}
    return model, {name: float(found["input_scale"]) for name, found in stored.items() if found}


@pytest.mark.parametrize("bits", [4, 3])
def test_awq_is_no_worse_than_a_plain_reference(bits, story, windows, tmp_path):
    calibration, held_out = windows
    original, reference = Llama(story), Llama(story)
    reference_awq.awq(reference, calibration, bits=bits, group=128)
    quantized(story, tmp_path / "out", method="search", transforms=["awq"], bits=bits, group_size=128)
    ours = divergence(original, decoded(tmp_path / "out")[0], held_out)
    theirs = divergence(original, reference, held_out)
    assert 0 < ours <= theirs


@pytest.fixture(scope="module")
def outliers(story, tmp_path_factory):
    """The same function with eight channels of every norm sixty-four times as large, as large models have them."""
    folder = tmp_path_factory.mktemp("story") / "outliers"
    shutil.copytree(story, folder)
    tensors = load_file(folder / "model.safetensors")
    for i in range(BLOCKS):
        for norm, readers in reference_smoothquant.READERS.items():
            channels = torch.randperm(256, generator=torch.Generator().manual_seed(i))[:8]
            tensors[f"model.layers.{i}.{norm}.weight"][channels] *= 64
            for reader in readers:
                tensors[f"model.layers.{i}.{reader}.weight"][:, channels] /= 64
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def smoothquant_reference(folder, windows, alpha):
    """KL divergence of the reference's W8A8 model with static inputs."""
    calibration, held_out = windows
    model = Llama(folder)
    if alpha is not None:
        scales = reference_smoothquant.factors(model, reference_smoothquant.absmax(model, calibration), alpha)
        reference_smoothquant.smooth(model, scales)
    inputs = {name: float(x.max()) / 127 for name, x in reference_smoothquant.absmax(model, calibration).items()}
    reference_smoothquant.quantize_weights(model)
    return divergence(Llama(folder), model, held_out, reference_smoothquant.static_inputs(model, inputs))


def smoothquant_ours(folder, windows, output, transforms):
    quantized(folder, output, method="search", transforms=transforms, **W8A8)
    model, inputs = decoded(output)
    return divergence(Llama(folder), model, windows[1], reference_smoothquant.static_inputs(model, inputs))


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_is_as_good_as_a_plain_reference(alpha, outliers, windows, tmp_path):
    """The same formula on both sides: what differs, a few per cent, are the roundings of the norms and of single weights."""
    theirs = smoothquant_reference(outliers, windows, alpha)
    ours = smoothquant_ours(outliers, windows, tmp_path / "out", [{"name": "smoothquant", "alpha": alpha}])
    assert 0 < ours <= 1.05 * theirs


def test_searched_smoothquant_of_all_edges_is_better_than_the_reference(outliers, windows, tmp_path):
    transform = {"name": "smoothquant", "alpha": "search", "linears": True}
    ours = smoothquant_ours(outliers, windows, tmp_path / "out", [transform])
    assert 0 < ours <= 0.6 * smoothquant_reference(outliers, windows, 0.5)


def test_smoothquant_undoes_what_outliers_cost(story, outliers, windows, tmp_path):
    """Static int8 inputs: the outliers cost more than ten times, and smoothing brings it back; the reference agrees."""
    plain = smoothquant_reference(story, windows, None)
    assert smoothquant_ours(story, windows, tmp_path / "plain", []) <= 1.05 * plain
    assert smoothquant_ours(outliers, windows, tmp_path / "outliers", []) > 10 * plain
    searched = [{"name": "smoothquant", "alpha": "search"}]
    assert smoothquant_ours(outliers, windows, tmp_path / "smoothed", searched) <= 1.1 * plain


def test_smoothquant_divides_norms_by_the_factors_of_the_paper(story, windows, tmp_path):
    """Block 0, whose inputs no quantized block has touched; norms are stored in bfloat16."""
    reference = Llama(story)
    scales = reference_smoothquant.factors(reference, reference_smoothquant.absmax(reference, windows[0]), 0.5)
    quantized(story, tmp_path / "out", method="rtn", transforms=["smoothquant"], **W8A8)
    before, after = load_file(story / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        name = f"model.layers.0.{norm}.weight"
        found = before[name].double() / after[name].double()
        assert torch.allclose(found, scales[f"model.layers.0.{norm}"], rtol=2**-8)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "bits": 4, "group_size": 128},
        {"method": "gptq", "scheme": "codebook"},
        {"method": "rtn", "bits": 4, "group_size": 128, "symmetric": False},
        {"method": "gptq", "bits": 4, "group_size": 128, "sequential": False, "compute_dtype": "bfloat16"},
    ],
    ids=["gptq", "nf4", "rtn", "bfloat16"],
)
def test_awq_comes_before_any_method_and_scheme(options, story, windows, tmp_path):
    """What is written computes what the run says that it computes (the engine verifies it), and is near the original."""
    result = quantized(story, tmp_path / "out", transforms=["awq"], **options)
    before, after = load_file(story / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    norms = [name for name in before if name.endswith("layernorm.weight")]
    assert any(not torch.equal(before[name], after[name]) for name in norms)
    assert len(result.report) == 7 * BLOCKS
    assert divergence(Llama(story), decoded(tmp_path / "out")[0], windows[1]) < 0.05


def test_transforms_follow_each_other(story, windows, tmp_path):
    quantized(story, tmp_path / "out", method="rtn", transforms=["smoothquant", "awq"], bits=8, group_size=128)
    assert divergence(Llama(story), decoded(tmp_path / "out")[0], windows[1]) < 1e-3


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
def test_a_killed_run_ends_in_identical_bytes(transform, llama, text, forker, tmp_path):
    """Killed in every part of the run, the last time right before the end."""
    arguments = ["quantize", llama, "--transform", transform, "--layout", "native", "--group-size", "32"]
    arguments += ["--samples", "8", "--length", "32", "--calibration", text]
    assert forker.run(*arguments, "-o", tmp_path / "whole") == 0, forker.output
    expected, steps = contents(tmp_path / "whole"), forker.steps
    output = tmp_path / "out"
    for part in (3, 4, 5):
        assert forker.run(*arguments, "-o", output, kill_at=steps // part) == -signal.SIGKILL
        assert not output.exists()
    assert forker.run(*arguments, "-o", output) == 0, forker.output
    assert "resuming after" in forker.output
    assert contents(output) == expected
    assert left_over(output) == [output.name]
