"""gptq files in GPTQModel on the CPU, and GPTQModel's own files here."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.interop import venvs
from tests.interop.greedy import agreement
from tests.small import STORY

from bitwright.runtime.checkpoint import open_checkpoint
from bitwright.schemes.affine import Affine
from bitwright.schemes.affine_indexed import AffineIndexed

V2 = {"layout_options": {"checkpoint_format": "gptq_v2"}}
LOADS = {
    "gptq-4": {"bits": 4},
    "gptq-gptq-4": {"bits": 4, "method": "gptq"},
    "gptq-2": {"bits": 2},
    "gptq-3": {"bits": 3},
    "gptq-8": {"bits": 8},
    "gptq-8-channel": {"bits": 8, "group_size": "channel"},
    "gptq_v2-4": {"bits": 4, **V2},
    "gptq_v2-2-asymmetric": {"bits": 2, "symmetric": False, **V2},
    "gptq_v2-3-asymmetric": {"bits": 3, "symmetric": False, **V2},
    "gptq_v2-4-asymmetric": {"bits": 4, "symmetric": False, **V2},
    "gptq_v2-8-asymmetric": {"bits": 8, "symmetric": False, **V2},
}
#: torch's packed products, which "auto" takes, are a hundred times slower in float16 than in bfloat16.
KERNEL = "reference"
ASYMMETRIC_V1 = "gptq-4-asymmetric"


def examine(folders, prompts_file, tensors, **options):
    """What GPTQModel says of these folders; its tensors lie in ``tensors``."""
    extra = [part for key, value in options.items() for part in (f"--{key}", value)]
    return venvs.run(
        "gptqmodel", "gptqmodel_greedy.py", "--models", *folders, "--prompts", prompts_file, "--tensors", tensors, *extra
    )  # fmt: skip


@pytest.fixture(scope="module")
def examined(checkpoint, prompts_file, tmp_path_factory):
    """All folders in one process: importing takes longer than the rest. In float16, its scales' dtype, nothing is rounded twice."""
    tensors = tmp_path_factory.mktemp("tensors")
    folders = {name: checkpoint(name, layout="gptq", **options) for name, options in LOADS.items()}
    folders[ASYMMETRIC_V1] = checkpoint(ASYMMETRIC_V1, layout="gptq", bits=4, symmetric=False)
    return folders, examine(folders.values(), prompts_file, tensors), tensors


def unequal(folder, tensors, dtype):
    """Modules whose weight GPTQModel decodes to something else than ``bitwright`` does, after one rounding to ``dtype``."""
    source = open_checkpoint(folder)
    assert len(source.modules) == 56
    theirs = {name: tensors[f"weight:{name}"] for name in source.modules}
    assert {weight.dtype for weight in theirs.values()} == {dtype}
    return [name for name in source.modules if not torch.equal(source.read(f"{name}.weight").to(dtype), theirs[name])]


@pytest.mark.parametrize("name", LOADS)
def test_weights_logits_and_greedy_tokens_are_those_of_bitwright(name, examined, prompts, report):
    folders, found, folder = examined
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


def test_what_a_plain_load_takes_agrees_in_bfloat16(checkpoint, prompts_file, prompts, tmp_path, report):
    folder = checkpoint("gptq-4", layout="gptq", bits=4)
    answer = examine([folder], prompts_file, tmp_path, backend="auto", dtype="bfloat16")["models"][folder.name]
    assert "refused" not in answer, answer["refused"]
    result = agreement(folder, prompts, answer["tokens"], torch.bfloat16)
    logits = load_file(tmp_path / f"{folder.name}.safetensors")["logits"]
    difference = float((result.logits - logits).abs().max())
    report(f"logits differ by at most {difference:.2g}; {result}; {answer['kernels']}")
    assert difference < 0.5
    assert result.different == 0


def test_asymmetric_v1_files_are_refused(examined, report):
    answer = examined[1]["models"][ASYMMETRIC_V1]
    assert "sym=False" in answer.get("refused", "it loads"), "docs/interop.md and Gptq.loads_in are to be mended"
    report(answer["refused"])


@pytest.fixture(scope="module")
def positive(tmp_path_factory):
    """The example model, every third row of its value projections made positive: their asymmetric zero points are 0."""
    folder = shutil.copytree(STORY, tmp_path_factory.mktemp("positive") / "model")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("v_proj.weight"):
            tensor[::3] = tensor[::3].abs()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


#: kind -> options of gptqmodel_quantize.py
WRITTEN = {
    "symmetric": [],
    "act-order": ["--act-order"],
    "asymmetric-4": ["--asymmetric"],
    "asymmetric-3": ["--asymmetric", "--bits", 3],
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_files_of_gptqmodel_decode_to_its_own_weights(
    kind, positive, calibration_file, prompts_file, prompts, tmp_path, report
):
    folder, asymmetric = tmp_path / kind, kind.startswith("asymmetric")
    arguments = ("--prompts", calibration_file, "--out", folder, *WRITTEN[kind])
    venvs.run("gptqmodel", "gptqmodel_quantize.py", "--model", positive if asymmetric else STORY, *arguments)
    answer = examine([folder], prompts_file, tmp_path)["models"][kind]
    assert "refused" not in answer, answer["refused"]
    tensors = load_file(tmp_path / f"{kind}.safetensors")
    source = open_checkpoint(folder)
    weights = [source.quantized(name) for name in source.modules]
    indexed = sum(isinstance(weight.scheme, AffineIndexed) for weight in weights)
    assert indexed == (56 if kind == "act-order" else 0)
    assert all(w.scheme.symmetric != asymmetric for w in weights if isinstance(w.scheme, Affine))
    zeros = sum(int((weight.params["zero"] == 0).sum()) for weight in weights if "zero" in weight.params)
    assert (zeros > 0) == asymmetric
    assert unequal(folder, tensors, torch.float16) == []
    result = agreement(folder, prompts, answer["tokens"], torch.float16, KERNEL)
    details = f"{indexed} with an arbitrary group index, {zeros} zero points of 0"
    report(f"56 of 56 weights equal in float16, {details}; {result}")
    assert result.different == 0
