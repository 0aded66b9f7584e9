"""Every architecture of the zoo, end to end, against plain transformers with the decoded weights put in."""

import json

import pytest
import torch
from safetensors import safe_open
from tests.small import left_over, make_model
from tests.zoo import ZOO

import bitwright

BLOCKS = 3
#: stored matrices a block that are quantized, counted by hand from each architecture's published tensor names
LINEARS = {
    "llama": 7,  # q k v o, gate up down
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3_text": 7,
    "phi3": 4,  # qkv_proj, o_proj, gate_up_proj, down_proj
    "gpt2": 4,  # c_attn, c_proj, c_fc, c_proj
    "opt": 6,  # q k v out, fc1 fc2
    "gpt_neox": 4,  # query_key_value, dense, dense_h_to_4h, dense_4h_to_h
    "falcon": 4,  # the same
    "mixtral": 4 + 3 * 4,  # q k v o; w1 w2 w3 of four experts; the router is kept
    "qwen3_moe": 4 + 3 * 4,
}
GROUP = 32


@pytest.fixture(scope="module", params=list(ZOO))
def model(request, tmp_path_factory):
    return request.param, make_model(request.param, tmp_path_factory.mktemp("zoo") / request.param)


def _unpack(words: torch.Tensor, count: int) -> torch.Tensor:
    """4-bit codes of the native layout: a dense little-endian stream, eight to an int32 word."""
    shifts = torch.arange(0, 32, 4)
    return ((words.to(torch.int64).unsqueeze(-1) >> shifts) & 15).flatten(1)[:, :count]


def _decoded(folder, transposed):
    """Every tensor of a native checkpoint under its original name, from the layout's documented formula alone."""
    tensors = {}
    count = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for name, value in stored.items():
        if name.endswith(".weight.codes"):
            module = name.removesuffix(".weight.codes")
            rows, columns = stored[f"{module}.weight.shape"].tolist()
            codes = _unpack(value, columns).view(rows, columns // GROUP, GROUP)
            weight = ((codes - 8) * stored[f"{module}.weight.scale"].float().unsqueeze(-1)).view(rows, columns)
            tensors[f"{module}.weight"] = weight.T.contiguous() if transposed else weight
            count += 1
        elif not name.endswith((".weight.shape", ".weight.scale")):
            tensors[name] = value.float()
    return tensors, count


def _reference_logits(source, tensors, folder, tokens):
    """transformers itself loads the decoded weights, in float32, from a folder that knows nothing of quantization."""
    import transformers
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return dense(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_loaded_model_computes_what_its_decoded_weights_compute(method, model, text, tmp_path):
    name, source = model
    output = tmp_path / "out"
    calibration = {"text": str(text), "samples": 8, "length": 32}
    options = {"layout": "native", "group_size": GROUP, "min_expert_tokens": 16, "calibration": calibration}
    result = bitwright.quantize(source, output, method=method, **options)
    tensors, count = _decoded(output, transposed=name == "gpt2")
    assert count == BLOCKS * LINEARS[name]
    assert left_over(output) == ["out"]
    with safe_open(source / "model.safetensors", "pt") as file:
        assert set(tensors) == set(file.keys())
        for kept in sorted(set(tensors) - {line["tensor"] for line in result.report}):
            assert torch.equal(tensors[kept], file.get_tensor(kept).float())
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    loaded = bitwright.load(output, dtype=torch.float32)
    with torch.no_grad():
        found = loaded(input_ids=tokens, use_cache=False).logits
    expected = _reference_logits(source, tensors, tmp_path / "dense", tokens)
    assert torch.isfinite(expected).all()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if method == "gptq":
        _check_better_than_rounding(result, source, output, options, tmp_path)


def _check_better_than_rounding(result, source, output, options, tmp_path):
    """On the calibration text itself GPTQ ends nearer to the original model than round-to-nearest."""
    losses = {line["tensor"]: line["loss"] for line in result.report}
    assert all(0 <= loss < 1 for loss in losses.values())
    # Round-to-nearest carried through the same calibrated run, so that both losses are on the same inputs.
    search = bitwright.quantize(
        source, tmp_path / "plain", method="search", method_options={"steps": 0, "refits": 0}, **options
    )
    plain = {line["tensor"]: line["loss"] for line in search.report}
    assert losses.keys() == plain.keys()
    better = sum(losses[tensor] <= plain[tensor] for tensor in losses)
    assert better >= 0.9 * len(losses)
