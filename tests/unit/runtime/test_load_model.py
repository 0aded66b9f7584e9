"""Loading packed checkpoints: the model computes what a plain transformers model with the decoded weights computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.zoo import VOCAB, make

import bitwright
from bitwright.errors import InputError
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint
from bitwright.runtime.linear import QuantizedLinear
from bitwright.runtime.load import load_model

#: zoo model -> layout and options
OUTPUTS = {
    "llama": ("compressed-tensors", {"bits": 4}),
    "qwen2": ("gptq", {"bits": 4, "symmetric": False}),
    "gpt2": ("native", {"bits": 3}),
    "mixtral": ("compressed-tensors", {"bits": 4}),
    "opt": ("compressed-tensors", {"bits": 8, "group_size": "channel"}),
}
MODELS = list(OUTPUTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (source, quantized); made once, on demand."""
    root, made = tmp_path_factory.mktemp("runtime"), {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            layout, options = OUTPUTS[name]
            source = make(name, root / name)
            bitwright.quantize(source, root / f"{name}-q", method="rtn", layout=layout, **{"group_size": 32, **options})
            made[name] = (source, root / f"{name}-q")
        return made[name]

    return get


def decoded_folder(quantized: Path, folder: Path) -> Path:
    """A dense float32 checkpoint of the decoded weights, for transformers' own loader."""
    source = open_checkpoint(quantized)
    assert isinstance(source, DecodedSource)
    folder.mkdir()
    tensors = {name: source.read(name).float().contiguous() for name in source.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain(folder: Path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def tokens(batch=2, length=12) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_plain_model_with_the_decoded_weights(folders, name, kernel, tmp_path):
    source, quantized = folders(name)
    wanted = logits(plain(decoded_folder(quantized, tmp_path / "dense")), tokens())
    found = logits(load_model(quantized, dtype=torch.float32, kernel=kernel), tokens())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    original = logits(plain(source), tokens())
    assert (found - original).norm() > 1e-3 * original.norm()  # it is the quantized model, not the source


@pytest.mark.parametrize("name", MODELS)
def test_decoded_weights_are_near_the_originals(folders, name):
    """An end-to-end check of orientation and order: at these bits no weight moves by more than a step or two."""
    source, quantized = folders(name)
    original, decoded = SafetensorsDir.open(source), open_checkpoint(quantized)
    assert isinstance(decoded, DecodedSource)
    for module in decoded.modules:
        a, b = original.read(module + ".weight").float(), decoded.read(module + ".weight")
        step = {3: 2 / 7, 4: 2 / 15, 8: 2 / 255}[OUTPUTS[name][1]["bits"]]
        assert ((a - b).abs() <= step * a.abs().max()).all(), module
        assert (a - b).norm() < 0.6 * step / 0.15 * a.norm()


@pytest.mark.parametrize("name", MODELS)
def test_decoded_source_looks_like_the_source(folders, name):
    source, quantized = folders(name)
    original, decoded = SafetensorsDir.open(source), open_checkpoint(quantized)
    assert isinstance(decoded, DecodedSource)
    assert {n: s.shape for n, s in decoded.tensors.items()} == {n: s.shape for n, s in original.tensors.items()}
    assert {n: s.dtype for n, s in decoded.tensors.items()} == {n: s.dtype for n, s in original.tensors.items()}
    assert decoded.path == quantized
    assert decoded.config["model_type"] == original.config["model_type"]
    assert dict(decoded.fingerprint()) == dict(SafetensorsDir.open(quantized).fingerprint())
    for tensor, spec in decoded.tensors.items():
        value = decoded.read(tensor)
        assert tuple(value.shape) == spec.shape
        if tensor.removesuffix(".weight") not in decoded.modules:
            assert torch.equal(value, original.read(tensor))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_of_a_decoded_tensor_are_read_alone(folders, name):
    decoded = open_checkpoint(folders(name)[1])
    assert isinstance(decoded, DecodedSource)
    module = next(iter(decoded.modules))
    whole = decoded.read(module + ".weight")
    assert torch.equal(decoded.read(module + ".weight", (3, 17)), whole[3:17])
    kept = next(n for n in decoded.tensors if n.removesuffix(".weight") not in decoded.modules)
    assert torch.equal(decoded.read(kept, (1, 5)), decoded.read(kept)[1:5])


def test_linears_hold_packed_weights_and_the_rest_is_as_it_was(folders):
    source, quantized = folders("llama")
    model, dense = load_model(quantized), plain(source)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not model.training
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    linears = {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert packed == linears
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # still tied
    assert torch.equal(model.get_input_embeddings().weight.float(), dense.get_input_embeddings().weight)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_experts_and_conv1d_are_loaded(folders):
    gpt2 = load_model(folders("gpt2")[1])
    first = gpt2.transformer.h[0].attn.c_attn
    assert isinstance(first, QuantizedLinear)
    assert (first.in_features, first.out_features) == (64, 192)
    assert first.bias is not None
    mixtral = load_model(folders("mixtral")[1])
    assert not any(value.is_meta for value in (*mixtral.parameters(), *mixtral.buffers()))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_a_plain_model_s(folders, name, tmp_path):
    _, quantized = folders(name)
    dense, model = plain(decoded_folder(quantized, tmp_path / "dense")), load_model(quantized, dtype=torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = tokens(1, 6)
    mask = torch.ones_like(ids)
    wanted = dense.generate(ids, attention_mask=mask, **options)
    found = model.generate(ids, attention_mask=mask, **options)
    assert found.shape == (1, 14)
    assert torch.equal(found, wanted)


def test_generation_in_the_checkpoint_s_dtype_works(folders):
    model = load_model(folders("llama")[1])
    assert model.model.layers[0].self_attn.q_proj.kernel == "int4"
    ids = tokens(1, 6)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert out.shape == (1, 10)


def test_a_dense_checkpoint_is_loaded_as_it_is(folders):
    source, _ = folders("llama")
    assert isinstance(open_checkpoint(source), SafetensorsDir)
    found = logits(load_model(source, dtype=torch.float32), tokens())
    torch.testing.assert_close(found, logits(plain(source), tokens()), rtol=1e-5, atol=1e-5)


def test_quantized_embeddings_of_gpt2_are_not_turned_round(folders, tmp_path):
    source, _ = folders("gpt2")
    bitwright.quantize(source, tmp_path / "out", method="rtn", bits=8, group_size=32, layout="native", embeddings=True)
    decoded = open_checkpoint(tmp_path / "out")
    assert isinstance(decoded, DecodedSource)
    assert decoded.tensors["transformer.wte.weight"].shape == (VOCAB, 64)
    original = logits(plain(source), tokens())
    found = logits(load_model(tmp_path / "out", dtype=torch.float32), tokens())
    assert (found - original).norm() < 0.1 * original.norm()


# --- what cannot be loaded ---------------------------------------------------------------------------------------------


def changed(folder: Path, target: Path, **quantization: object) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **quantization}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("method", ["hqq", "quanto", "no-such-method"])
def test_unknown_quantizations_are_refused_by_name(folders, tmp_path, method):
    folder = changed(folders("llama")[1], tmp_path / "other", quant_method=method)
    for function in (open_checkpoint, load_model):
        with pytest.raises(InputError, match=f"quant_method '{method}'"):
            function(folder)


@pytest.mark.parametrize("content", [[], ["notes.txt"], ["config.json"]], ids=["empty", "text only", "config only"])
def test_folders_without_a_model_are_refused(tmp_path, content):
    for name in content:
        (tmp_path / name).write_text('{"model_type": "llama"}')
    for function in (open_checkpoint, load_model):
        with pytest.raises(InputError):
            function(tmp_path)
        with pytest.raises(InputError):
            function(tmp_path / "absent")


def test_a_quantized_layer_without_its_parts_is_refused(folders, tmp_path):
    _, quantized = folders("llama")
    folder = tmp_path / "damaged"
    shutil.copytree(quantized, folder)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    lost = next(name for name in tensors if name.endswith("weight_scale"))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError):
        load_model(folder)


def test_unknown_kernels_are_refused(folders):
    with pytest.raises(InputError, match="marlin"):
        load_model(folders("llama")[1], kernel="marlin")
