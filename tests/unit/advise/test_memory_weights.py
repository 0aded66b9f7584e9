"""Bytes of weights against what is written: files of real runs, and plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.small import add_tokenizer
from tests.zoo import make

from bitwright.advise.shape import model_shape, shape_for
from bitwright.advise.stored import is_quantized, planned_weights, stored_weights
from bitwright.advise.weights import default_recipe, gguf_type, weight_bytes
from bitwright.api import quantize, to_gguf
from bitwright.engine.recipe import make_recipe
from bitwright.errors import InputError, PlanError
from bitwright.io.strict import load_json

SMALL: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": 32}, "awq": {"group_size": 32}, "compressed-tensors": {"group_size": 32},
    "native": {"group_size": 32, "bits": 3}, "bitsandbytes": {},
}  # fmt: skip


def data_bytes(folder: Path) -> int:
    """Bytes of all tensors, as the safetensors library sees them."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - no mapping
    return total


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("layout", list(SMALL))
def test_a_formula_gives_the_bytes_that_are_written(tmp_path: Path, name: str, layout: str) -> None:
    folder = make(name, tmp_path / "model")
    options = SMALL[layout]
    recipe = make_recipe(default_recipe(layout, **options))
    quantize(folder, tmp_path / "out", recipe=recipe)
    written = data_bytes(tmp_path / "out")
    shape = model_shape(load_json(folder / "config.json"))
    assert weight_bytes(shape, layout=layout, **options).total == written
    planned, stored = planned_weights(folder, recipe), stored_weights(tmp_path / "out")
    assert planned.weights.total == written
    assert stored.weights.total == written
    assert (stored.weights.weights, stored.weights.scales) == (planned.weights.weights, planned.weights.scales)
    assert not is_quantized(folder)
    assert is_quantized(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "mixtral", "qwen3_moe", "phi3"])
def test_plain_weights_are_counted_as_they_are(tmp_path: Path, name: str) -> None:
    folder = make(name, tmp_path / "model")
    shape = model_shape(load_json(folder / "config.json"))
    assert stored_weights(folder).weights.total == data_bytes(folder)
    assert weight_bytes(shape, layout="dense").total == data_bytes(folder)
    assert weight_bytes(shape, layout="dense", dtype="float32").total == 2 * data_bytes(folder)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "Q4_K_M"), ("qwen2", "Q8_0"), ("mistral", "Q3_K_M"), ("mixtral", "Q4_0")]
)
def test_a_gguf_file_holds_the_bytes_of_its_mixture(tmp_path: Path, name: str, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    folder = make(name, tmp_path / "model")
    add_tokenizer(folder)
    to_gguf(folder, tmp_path / "model.gguf", gguf={"type": kind})
    written = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    known = stored_weights(tmp_path / "model.gguf")
    assert known.weights.total == written
    assert known.file
    recipe = make_recipe({"layout": "gguf", "gguf": {"type": kind}})
    assert planned_weights(folder, recipe).weights.total == written
    assert weight_bytes(model_shape(load_json(folder / "config.json")), layout="gguf", type=kind).total == written


def test_known_sizes_of_a_large_model() -> None:
    # 4 bits and a float16 scale for 128 weights, embeddings and head in 16 bits, worked out by hand for Llama 3.1 8B.
    shape = shape_for(8_000_000_000)
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    found = weight_bytes(shape)
    assert found.weights == linears // 2 + 2 * (65 * 4096)
    # compressed-tensors stores the shape of each of the 7 x 32 linears, two numbers of 8 bytes.
    assert found.scales == linears // 128 * 2 + 7 * 32 * 16
    assert found.embeddings == found.head == 2 * 128256 * 4096
    assert weight_bytes(shape, bits=16).total == 2 * 8_030_261_248


def test_float8_blocks_have_one_scale_for_128_by_128() -> None:
    shape = shape_for(8_000_000_000)
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    found = weight_bytes(shape, layout="fp8")
    assert found.weights == linears + 2 * (65 * 4096)
    assert found.scales == linears // 128**2 * 4


def test_odd_groups_are_refused() -> None:
    with pytest.raises(PlanError):
        weight_bytes(shape_for(500_000_000), layout="gptq", group_size=1000)


def test_unknown_names_are_refused() -> None:
    shape = shape_for(500_000_000)
    for options in (
        {"layout": "zip"},
        {"layout": "bitsandbytes", "bits": 3},
        {"layout": "fp8", "bits": 4},
        {"dtype": "int4"},
    ):
        with pytest.raises(InputError):
            weight_bytes(shape, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        gguf_type(7)
