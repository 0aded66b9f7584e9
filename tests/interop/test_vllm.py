"""bitwright's files in vLLM's CPU build: the same greedy tokens, or the refusal that docs/interop.md tells of."""

import pytest
import torch
from tests.interop import venvs
from tests.interop.greedy import agreement

GPTQ = {"layout": "gptq"}
GPTQ_V2 = {"layout": "gptq", "layout_options": {"checkpoint_format": "gptq_v2"}}
LOADS = {
    "ct-rtn-4": {"bits": 4},
    "ct-gptq-4": {"bits": 4, "method": "gptq"},
    "ct-4-asymmetric": {"bits": 4, "symmetric": False},
    "ct-w8a8-token": {"bits": 8, "group_size": "channel", "inputs": "int8-token"},
    "gptq-4": {"bits": 4, **GPTQ},
    "gptq_v2-4": {"bits": 4, **GPTQ_V2},
}
#: Under one static scale a step of the inputs is coarse, so that an input that falls on the other side of a tie moves logits further.
STATIC = {
    "ct-w8a8-static": {"bits": 8, "group_size": "channel", "inputs": "int8-tensor-static"},
    "ct-w8a8-static-asym": {"bits": 8, "group_size": "channel", "inputs": "int8-tensor-static-asym"},
}
REFUSED = {
    "ct-rtn-2": ({"bits": 2}, "not supported by CPUWNA16"),
    "ct-rtn-8": ({"bits": 8}, "not supported by CPUWNA16"),
    "ct-rtn-8-channel": ({"bits": 8, "group_size": "channel"}, "not supported by CPUWNA16"),
    "gptq-2": ({"bits": 2, **GPTQ}, "Unsupported quantization config: bits=2, sym=True"),
    "gptq-3": ({"bits": 3, **GPTQ}, "Unsupported quantization config: bits=3, sym=True"),
    "gptq-8": ({"bits": 8, **GPTQ}, "Marlin does not support weight_bits"),
    "gptq-4-asymmetric": (
        {"bits": 4, "symmetric": False, **GPTQ},
        "Unsupported quantization config: bits=4, sym=False",
    ),
    "gptq_v2-4-asymmetric": (
        {"bits": 4, "symmetric": False, **GPTQ_V2},
        "Unsupported quantization config: bits=4, sym=False",
    ),
}


def generate(folder, prompts_file):
    return venvs.run("vllm", "vllm_greedy.py", "--model", folder, "--prompts", prompts_file)


@pytest.mark.parametrize("name", LOADS)
def test_greedy_tokens_are_those_of_bitwright(name, checkpoint, prompts, prompts_file, report):
    folder = checkpoint(name, **LOADS[name])
    found = generate(folder, prompts_file)
    assert "refused" not in found, found["refused"]
    assert found["prompts"] == prompts
    result = agreement(folder, prompts, found["tokens"], torch.bfloat16)
    report(f"{result} (vllm {found['vllm']})")
    assert result.different == 0
    assert result.compared > result.positions / 2


@pytest.mark.parametrize("name", STATIC)
def test_static_inputs_give_nearly_the_tokens_of_bitwright(name, checkpoint, prompts, prompts_file, report):
    folder = checkpoint(name, **STATIC[name])
    found = generate(folder, prompts_file)
    assert "refused" not in found, found["refused"]
    result = agreement(folder, prompts, found["tokens"], torch.bfloat16)
    report(f"{result} (vllm {found['vllm']})")
    assert result.different <= result.compared / 200
    assert result.worst < 0.5
    assert result.compared > result.positions / 2


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_the_known_ones(name, checkpoint, prompts_file, report):
    options, message = REFUSED[name]
    found = generate(checkpoint(name, **options), prompts_file)
    assert message in found.get("refused", "it loads"), f"docs/interop.md and Layout.loads_in are to be mended: {found}"
    report(f"refused as expected: {message}")
