"""awq files in GPTQModel and in vLLM's CPU build, and GPTQModel's own AWQ files here."""

import pytest
import torch
from safetensors.torch import load_file
from tests.interop import venvs
from tests.interop.greedy import agreement
from tests.small import STORY

import bitwright
from bitwright.runtime.checkpoint import open_checkpoint

LOADS = {
    "awq-4": {},
    "awq-4-asymmetric": {"symmetric": False},
    "awq-4-asymmetric-32": {"symmetric": False, "group_size": 32},
    "awq-4-channel": {"group_size": "channel"},
}
CONVERTED = "awq-from-gptq"
#: torch's packed products, which "auto" takes, are a hundred times slower in float16 than in bfloat16.
KERNEL = "reference"


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    made = {name: checkpoint(name, layout="awq", bits=4, **options) for name, options in LOADS.items()}
    made[CONVERTED] = tmp_path_factory.mktemp("converted") / CONVERTED
    bitwright.convert(checkpoint("gptq-gptq-4", layout="gptq", bits=4, method="gptq"), made[CONVERTED], layout="awq")
    return made


def examine(folders, prompts_file, tensors, backend="awq_torch"):
    options = ("--backend", backend, "--prompts", prompts_file, "--tensors", tensors)
    return venvs.run("gptqmodel", "gptqmodel_greedy.py", "--models", *folders, *options)


@pytest.fixture(scope="module")
def examined(folders, prompts_file, tmp_path_factory):
    tensors = tmp_path_factory.mktemp("tensors")
    return examine(folders.values(), prompts_file, tensors), tensors


def unequal(folder, tensors, dtype):
    """Modules whose weight GPTQModel decodes to something else than ``bitwright`` does, after one rounding to ``dtype``."""
    source = open_checkpoint(folder)
    assert len(source.modules) == 56
    theirs = {name: tensors[f"weight:{name}"] for name in source.modules}
    assert {weight.dtype for weight in theirs.values()} == {dtype}
    return [name for name in source.modules if not torch.equal(source.read(f"{name}.weight").to(dtype), theirs[name])]


@pytest.mark.parametrize("name", [*LOADS, CONVERTED])
def test_gptqmodel_decodes_the_same_weights_and_chooses_the_same_tokens(name, folders, examined, prompts, report):
    found, folder = examined
    answer = found["models"][name]
    assert "refused" not in answer, answer["refused"]
    tensors = load_file(folder / f"{name}.safetensors")
    assert unequal(folders[name], tensors, torch.float16) == []
    result = agreement(folders[name], prompts, answer["tokens"], torch.float16, KERNEL)
    difference = float((result.logits - tensors["logits"]).abs().max())
    report(
        f"56 of 56 weights equal in float16, logits differ by at most {difference:.2g}; {result}; {answer['kernels']}"
    )
    assert difference < 0.1
    assert result.different == 0
    assert result.compared > result.positions / 2


def test_transformers_with_gptqmodel_chooses_the_same_tokens(folders, prompts_file, prompts, tmp_path, report):
    """Per channel it takes a kernel on the CPU that knows groups of 32 to 256 alone, and fails in the first product."""
    wanted = [name for name in (*LOADS, CONVERTED) if name != "awq-4-channel"]
    found = examine([folders[name] for name in wanted], prompts_file, tmp_path, backend="transformers")["models"]
    for name in wanted:
        assert "refused" not in found[name], found[name]["refused"]
        result = agreement(folders[name], prompts, found[name]["tokens"], torch.float16, KERNEL)
        report(f"{name}: {result}; {found[name]['kernels']}")
        assert result.different == 0


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_files_of_gptqmodel_decode_to_its_own_weights(kind, calibration_file, prompts_file, prompts, tmp_path, report):
    folder = tmp_path / kind
    options = ("--awq", *(["--asymmetric"] if kind == "asymmetric" else []))
    venvs.run(
        "gptqmodel", "gptqmodel_quantize.py", "--model", STORY, "--prompts", calibration_file, "--out", folder, *options
    )
    answer = examine([folder], prompts_file, tmp_path)["models"][kind]
    assert "refused" not in answer, answer["refused"]
    assert unequal(folder, load_file(tmp_path / f"{kind}.safetensors"), torch.float16) == []
    result = agreement(folder, prompts, answer["tokens"], torch.float16, KERNEL)
    source = open_checkpoint(folder)
    schemes = {source.quantized(name).scheme.describe() for name in source.modules}
    report(f"56 of 56 weights equal in float16; read as {', '.join(sorted(schemes))}; {result}")
    assert result.different == 0


@pytest.mark.parametrize("name", [*LOADS, CONVERTED])
def test_greedy_tokens_of_vllm_are_those_of_bitwright(name, folders, prompts, prompts_file, report):
    found = venvs.run("vllm", "vllm_greedy.py", "--model", folders[name], "--prompts", prompts_file)
    assert "refused" not in found, found["refused"]
    result = agreement(folders[name], prompts, found["tokens"], torch.bfloat16)
    report(f"{result} (vllm {found['vllm']})")
    assert result.different == 0
    assert result.compared > result.positions / 2
