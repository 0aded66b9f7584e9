"""Forecasts: parts, sums, and what training keeps, against what autograd really saves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from tests.small import make_model
from typer.testing import CliRunner

from bitwright.advise.decoder import ModelShape
from bitwright.advise.memory import MemoryForecast, forecast_serving, forecast_training
from bitwright.advise.shape import model_shape, shape_for
from bitwright.advise.training import adapter_sizes, optimizer_bytes, saved_per_token
from bitwright.advise.weights import weight_bytes
from bitwright.api import quantize
from bitwright.cli.memory import app
from bitwright.errors import InputError

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
}  # fmt: skip


def saved(layers: int, tokens: int, *, rank: int = 0, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that autograd keeps for backward, parameters not counted."""
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=layers)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if rank:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    model.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is held, so that its address is not used again.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


# Of bitsandbytes, when peft looks for it, and of transformers, when peft asks it by an old name.
QUIET = ("ignore:Failed to load CPU gemm", "ignore:.is_gradient_checkpointing. is deprecated")


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(0, torch.bfloat16), (0, torch.float32), (8, torch.bfloat16), (16, torch.bfloat16), (8, torch.float32)],
)
def test_a_layer_saves_for_backward_what_autograd_saves(rank: int, dtype: torch.dtype) -> None:
    tokens = 256
    one = saved(3, tokens, rank=rank, dtype=dtype) - saved(2, tokens, rank=rank, dtype=dtype)
    shape = model_shape(transformers.LlamaConfig(**SMALL, num_hidden_layers=2).to_dict())
    assert saved_per_token(shape, dtype.itemsize, rank) * tokens == one


@pytest.mark.filterwarnings(*QUIET)
def test_adapters_are_those_that_peft_makes() -> None:
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=3)
    shape = model_shape(config.to_dict())
    for targets, words in ((("all-linear",), "all-linear"), (("q_proj", "v_proj"), ["q_proj", "v_proj"])):
        model = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_config(config), peft.LoraConfig(r=4, target_modules=words)
        )
        wanted = sorted(p.numel() for p in model.parameters() if p.requires_grad)
        assert sorted(adapter_sizes(shape, 4, targets)) == wanted


def test_optimizer_states_are_those_that_torch_makes() -> None:
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (10, 5000)]
    for optimizer, name in ((torch.optim.AdamW(parameters), "adamw"), (torch.optim.SGD(parameters), "sgd")):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        found = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
        assert optimizer_bytes([10, 5000], name, 4) == found


def test_full_training_in_float32_takes_16_bytes_a_parameter_beside_activations() -> None:
    shape = shape_for(8_000_000_000)
    weights = weight_bytes(shape, layout="dense", dtype="float32")
    found = forecast_training(shape, weight_bytes=weights, finetune="full", dtype="float32")
    assert found.total_bytes - found.activations - found.overhead == 16 * shape.parameters


def test_checkpointing_and_adapters_save_memory() -> None:
    shape = shape_for(1_500_000_000)
    dense, nf4 = weight_bytes(shape, layout="dense"), weight_bytes(shape, layout="bitsandbytes")
    full = forecast_training(shape, weight_bytes=dense, finetune="full")
    lora = forecast_training(shape, weight_bytes=dense, finetune="lora")
    qlora = forecast_training(shape, weight_bytes=nf4, finetune="qlora", optimizer="adamw8bit")
    assert full.total_bytes > lora.total_bytes > qlora.total_bytes
    assert forecast_training(shape, weight_bytes=dense, checkpointing=False).activations > lora.activations
    assert lora.adapters == lora.gradients == lora.optimizer // 2


def test_parts_add_up_and_fit() -> None:
    shape = shape_for(8_000_000_000)
    weights = weight_bytes(shape)
    found = forecast_serving(shape, weight_bytes=weights, context=4096, batch=2, engine="vllm", device="cuda")
    assert found.total_bytes == sum(value for _, value in found.parts)
    assert found.weights + found.scales + found.embeddings + found.head == weights.total
    assert found.kv_cache == 2 * 4096 * 32 * 2 * 1024 * 2
    assert found.fits(found.total_bytes)
    assert not found.fits(found.total_bytes - 1)
    assert any("Llama-3.1-8B" in sentence for sentence in found.assumptions)
    assert json.loads(json.dumps(found.to_json()))["total_bytes"] == found.total_bytes
    assert forecast_serving(shape, weight_bytes=10, context=8).weights == 10
    assert MemoryForecast().total_bytes == 0


def test_logits_of_all_positions_cost_their_bytes() -> None:
    shape = ModelShape(name="x", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=50_000)
    options: dict[str, Any] = {"weight_bytes": 0, "context": 100, "batch": 2, "dtype": "float32", "kv": "fp32"}
    last = forecast_serving(shape, **options)
    every = forecast_serving(shape, **options, all_logits=True)
    assert every.activations - last.activations == (200 - 2) * 50_000 * 8


def test_longer_contexts_never_take_less() -> None:
    shape = model_shape(transformers.Gemma3TextConfig(num_hidden_layers=12, sliding_window=512).to_dict())
    for engine, kv in (("transformers", "bf16"), ("llamacpp", "q8_0"), ("vllm", "fp8")):
        totals = [
            forecast_serving(shape, weight_bytes=1, context=context, kv=kv, engine=engine).total_bytes
            for context in (1, 100, 511, 512, 513, 2048, 8192)
        ]
        assert totals == sorted(totals)


def test_impossible_wishes_are_refused() -> None:
    shape = shape_for(500_000_000)
    for options in (
        {"finetune": "half"},
        {"optimizer": "lion"},
        {"lora_rank": 0},
        {"lora_targets": ("w1",)},
        {"dtype": "int8"},
    ):
        with pytest.raises(InputError):
            forecast_training(shape, weight_bytes=1, **options)
    with pytest.raises(InputError):
        forecast_serving(shape, weight_bytes=1, context=0)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_counts_a_folder_and_a_number_of_parameters(tmp_path: Any) -> None:
    folder = make_model("llama", tmp_path / "model")
    found = json.loads(invoke(folder, "--context", 64, "--json").stdout)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0 < stored - sum(found[key] for key in ("weights", "scales", "embeddings", "head")) < 10_000
    planned = json.loads(invoke(folder, "--bits", 4, "--group-size", 32, "--json").stdout)
    assert planned["weights"] < found["weights"]
    assert planned["scales"] > 0
    as_nf4 = json.loads(invoke(folder, "--finetune", "qlora", "--context", 64, "--json").stdout)
    assert 0 < as_nf4["weights"] < found["weights"]
    shown = invoke("--params", "8B", "--type", "Q4_K_M", "--kv", "q8_0", "--fits", "200GB")
    assert shown.exit_code == 0
    assert "fits 200.00 GB" in shown.stdout
    assert invoke("--params", "70B", "--fits", "1GB").exit_code == 1
    assert json.loads(invoke("--params", "8B", "--finetune", "qlora", "--json").stdout)["adapters"] > 0
    assert (
        json.loads(invoke("--params", "8B", "--kv-heads", 32, "--json").stdout)["kv_cache"] == 32 * 8192 * 2 * 4096 * 2
    )


def test_a_quantized_checkpoint_is_counted_as_it_is(tmp_path: Any) -> None:
    folder = make_model("llama", tmp_path / "model")
    quantize(folder, tmp_path / "out", method="rtn", bits=4, group_size=32)
    served = json.loads(invoke(tmp_path / "out", "--context", 64, "--json").stdout)
    trained = json.loads(invoke(tmp_path / "out", "--context", 64, "--finetune", "qlora", "--json").stdout)
    assert served["scales"] == trained["scales"] > 0
    with pytest.raises(InputError, match="quantized already"):
        CliRunner().invoke(app, [str(tmp_path / "out"), "--bits", "8"], catch_exceptions=False)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("model", "--params", "7B"),
        ("--params", "7B", "--device", "tpu"),
        ("--params", "8B", "--engine", "llamacpp"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InputError):
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
