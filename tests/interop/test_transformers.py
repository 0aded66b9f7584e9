"""compressed-tensors files in transformers, in this environment."""

from importlib.metadata import version

import pytest
import torch

import bitwright
from bitwright.runtime.checkpoint import open_checkpoint

RECIPES = {
    "rtn-4": {"bits": 4},
    "gptq-4": {"bits": 4, "method": "gptq"},
    "rtn-2": {"bits": 2},
    "rtn-8": {"bits": 8},
    "rtn-8-channel": {"bits": 8, "group_size": "channel"},
}
IDS = torch.arange(5, 133).reshape(2, 64)


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model):
    """The first forward pass is also what decodes a compressed model."""
    return model(IDS, use_cache=False).logits.float()


def unequal(folder, model, dtype):
    source, state = open_checkpoint(folder), model.state_dict()
    assert len(source.modules) == 56
    names = [f"{name}.weight" for name in source.modules]
    return [name for name in names if not torch.equal(source.read(name).to(dtype), state[name])]


@pytest.mark.parametrize("recipe", RECIPES)
def test_symmetric_files_decode_to_the_same_float32_weights(recipe, checkpoint, report):
    folder = checkpoint(f"ct-{recipe}", **RECIPES[recipe])
    model = load(folder, dtype=torch.float32)
    theirs = logits(model)
    assert unequal(folder, model, torch.float32) == []
    ours = logits(bitwright.load(folder, dtype=torch.float32))
    difference = float((theirs - ours).abs().max())
    report(f"56 of 56 weights equal in float32, logits differ by at most {difference:.2g}")
    assert difference < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_symmetric_files_decode_to_the_same_weights_in_the_dtype_of_the_model(recipe, checkpoint, report):
    folder = checkpoint(f"ct-{recipe}", **RECIPES[recipe])
    model = load(folder, dtype="auto")
    theirs = logits(model)
    assert model.dtype == torch.bfloat16
    assert unequal(folder, model, torch.bfloat16) == []
    difference = float((theirs - logits(bitwright.load(folder))).abs().max())
    report(f"56 of 56 weights equal in bfloat16, logits differ by at most {difference:.2g}")
    assert difference < 0.25


# transformers says that an option overrides the file; to override it is the point.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_asymmetric_files_need_dequantize(checkpoint, report):
    from transformers import CompressedTensorsConfig

    folder = checkpoint("ct-4-asymmetric", bits=4, symmetric=False)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder, dtype=torch.bfloat16)
    model = load(folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert unequal(folder, model, torch.bfloat16) == []
    difference = float((logits(model) - logits(bitwright.load(folder))).abs().max())
    versions = f"transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}"
    report(f"56 of 56 weights equal in bfloat16, logits differ by at most {difference:.2g} ({versions})")
    assert difference < 0.25
