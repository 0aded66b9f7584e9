"""llm-compressor's compressed-tensors files here."""

import pytest
import torch
from safetensors.torch import load_file
from tests.interop import venvs
from tests.small import STORY

from bitwright.runtime.checkpoint import open_checkpoint
from bitwright.runtime.load import load_model

RECIPES = {
    "gptq-4-symmetric": "int4 sym g128",
    "rtn-4-asymmetric": "int4 asym g128",
    "rtn-8-channel": "int8 sym channel",
}


@pytest.fixture(scope="module")
def written(calibration_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("llmcompressor")
    arguments = ("--model", STORY, "--prompts", calibration_file, "--out", out, "--recipes", *RECIPES)
    return out, venvs.run("llmcompressor", "llmcompressor_quantize.py", *arguments)


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_decode_to_the_weights_of_its_own_loader(recipe, written, report):
    out, versions = written
    source = open_checkpoint(out / recipe)
    theirs = load_file(out / f"{recipe}.safetensors")
    assert {f"{name}.weight" for name in source.modules} == set(theirs)
    assert len(theirs) == 56
    assert {weight.dtype for weight in theirs.values()} == {torch.bfloat16}
    assert {source.quantized(name).scheme.describe() for name in source.modules} == {RECIPES[recipe]}
    assert [
        name for name, weight in theirs.items() if not torch.equal(source.read(name).to(weight.dtype), weight)
    ] == []
    with torch.no_grad():
        assert load_model(out / recipe)(torch.arange(5, 69)[None]).logits.isfinite().all()
    report(
        f"56 of 56 weights equal in bfloat16 ({', '.join(f'{name} {release}' for name, release in versions.items())})"
    )
