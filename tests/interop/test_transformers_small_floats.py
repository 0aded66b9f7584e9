"""int8 with int8 inputs and small floats in transformers, in this environment: the same weights, and inputs rounded alike."""

import pytest
import torch
from tests.interop.test_transformers import load, logits, unequal

import bitwright

MX = {"number": "float", "strategy": "group", "group_size": 32, "power_of_two": True}
NVFP4 = {"number": "float", "bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": False}
GROUPS = {"number": "float", "strategy": "group", "group_size": 128}
INT8 = {"bits": 8, "group_size": "channel"}
BLOCKS = {"scheme": "float8", "scheme_options": {"granularity": "block"}, "inputs": GROUPS}


def micro(element, **options):
    return {"scheme": "microscaling", "scheme_options": {"element": element}, **options}


#: name -> recipe, and how far the logits may be apart in bfloat16. Loaders round inputs in bfloat16, bitwright in float32, so
#: that some inputs fall on the other side of a tie, and they round static scales themselves to bfloat16.
RECIPES = {
    "int8-token": ({**INT8, "inputs": "int8-token"}, 0.5),
    "int8-static": ({**INT8, "inputs": "int8-tensor-static"}, 1.5),
    "int8-static-asym": ({**INT8, "inputs": "int8-tensor-static-asym"}, 1.5),
    "w4a8": ({"bits": 4, "inputs": "int8-token"}, 0.5),
    "fp8-token": ({"scheme": "float8", "group_size": "channel", "inputs": "fp8-token"}, 1.0),
    "fp8-static": ({"scheme": "float8", "group_size": "tensor", "inputs": "fp8-tensor-static"}, 1.0),
    "fp8-block": (BLOCKS, 1.0),
    "fp8-a16": ({"scheme": "float8", "group_size": "channel"}, 0.25),
    "nvfp4": (micro("nvfp4", inputs=NVFP4), 3.0),
    "nvfp4-a16": (micro("nvfp4"), 0.25),
    "mxfp4": (micro("mxfp4", inputs={**MX, "bits": 4}), 3.0),
    "mxfp4-a16": (micro("mxfp4"), 0.25),
    "mxfp8": (micro("mxfp8", inputs=MX), 1.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_files_decode_to_the_same_weights_and_nearly_the_same_logits(name, checkpoint, report):
    options, tolerance = RECIPES[name]
    folder = checkpoint(f"ct-{name}", **options)
    model = load(folder, dtype="auto")
    theirs = logits(model)
    assert model.dtype == torch.bfloat16
    assert unequal(folder, model, torch.bfloat16) == []
    difference = (theirs - logits(bitwright.load(folder))).abs()
    report(
        f"56 of 56 weights equal, logits differ by {float(difference.mean()):.2g}, at most {float(difference.max()):.2g}"
    )
    assert float(difference.max()) < tolerance


def test_fine_grained_fp8_files_decode_to_the_same_weights(checkpoint, report):
    folder = checkpoint("fp8-layout", layout="fp8", **BLOCKS)
    model = load(folder, dtype="auto")
    theirs = logits(model)
    assert unequal(folder, model, torch.bfloat16) == []
    # Without a GPU transformers decodes the file and leaves inputs as they are; bitwright rounds them.
    difference = (theirs - logits(bitwright.load(folder))).abs()
    report(
        f"56 of 56 weights equal, logits differ by {float(difference.mean()):.2g}, at most {float(difference.max()):.2g}"
    )
    assert float(difference.max()) < 2.0
