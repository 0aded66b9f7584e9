"""A GGUF file seen as a checkpoint: dtypes, other writers' shapes, damaged keys."""

from types import MappingProxyType

import numpy as np
import pytest
import torch

import bitwright.io.gguf_values as values
from bitwright.blocks.codec import decode, quantize
from bitwright.blocks.types import TYPES
from bitwright.errors import InputError
from bitwright.gguf.to_hf import HfView
from bitwright.gguf.tokenizer_to_hf import write_tokenizer
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf


def rewrite(source, path, types=lambda tensor: "F32", shape=lambda tensor: tensor.shape, **changed):
    """The file again, with other types, shapes or keys; None drops a key."""
    keys = {key: value for key, value in {**source.values, **changed}.items() if value is not None}
    entries = [GgufEntry(tensor.name, shape(tensor), TYPES[types(tensor)]) for tensor in source.tensors.values()]
    with GgufWriter(path.parent, plan_gguf(keys, entries, stem=path.stem)) as writer:
        for tensor in source.tensors.values():
            writer.write(tensor.name, quantize(source.read(tensor.name), types(tensor)))
    return path


def matrices(name):
    return lambda tensor: name if len(tensor.shape) > 1 else "F32"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float16)],
)
def test_the_dtype_is_that_of_the_matrices(name, dtype, zoo, tmp_path):
    with GgufFile.open(zoo("llama")[1]) as source:
        path = rewrite(source, tmp_path / "a.gguf", matrices(name))
        wanted = decode(quantize(source.read("blk.0.ffn_down.weight"), name), name, 128)
    with GgufFile.open(path) as file:
        view = HfView(file)
        assert {spec.dtype for spec in view.tensors.values()} == {dtype}
        assert view.config["dtype"] == str(dtype).removeprefix("torch.")
        found = view.read("model.layers.0.mlp.down_proj.weight")
        assert torch.equal(found, torch.from_numpy(wanted).to(dtype))


def test_a_single_row_that_other_writers_store_flat(zoo, tmp_path):
    gate = "ffn_gate_inp_shexp.weight"
    with GgufFile.open(zoo("qwen2-moe")[1]) as source:
        flat = rewrite(source, tmp_path / "a.gguf", shape=lambda t: t.shape[-1:] if t.name.endswith(gate) else t.shape)
        with GgufFile.open(flat) as file:
            name = "model.layers.1.mlp.shared_expert_gate.weight"
            assert file.tensors[f"blk.1.{gate}"].shape == (64,)
            assert HfView(file).tensors[name].shape == (1, 64)
            assert torch.equal(HfView(file).read(name), HfView(source).read(name))


def test_ids_and_ties_come_from_the_file(zoo):
    with GgufFile.open(zoo("llama-tied")[1]) as file:
        config = HfView(file).config
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == 256
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_unknown_tensors_are_listed(zoo, tmp_path):
    with GgufFile.open(zoo("llama")[1]) as source:
        entries = [GgufEntry(tensor.name, tensor.shape, TYPES["F32"]) for tensor in source.tensors.values()]
        entries.append(GgufEntry("blk.0.attn_sinks.weight", (4,), TYPES["F32"]))
        with GgufWriter(tmp_path, plan_gguf(source.values, entries)) as writer:
            for tensor in source.tensors.values():
                writer.write(tensor.name, quantize(source.read(tensor.name), "F32"))
            writer.write("blk.0.attn_sinks.weight", np.zeros((1, 16), np.uint8))
    with GgufFile.open(tmp_path / "model.gguf") as file:
        assert set(HfView(file).left_out) == {"blk.0.attn_sinks.weight"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", values.string("martian")),
        ("general.architecture", values.u32(1)),
        ("llama.block_count", values.u32(2**31)),
        ("llama.block_count", values.u32(4)),
        ("llama.block_count", values.string("3")),
        ("llama.attention.head_count", values.u32(0)),
        ("llama.attention.head_count", values.u32s([4, 2, 4])),
        ("llama.attention.key_length", values.u32(2**31)),
        ("llama.rope.freq_base", values.f32(float("nan"))),
        ("llama.rope.scaling.factor", values.string("4")),
        ("llama.attention.layer_norm_rms_epsilon", values.u32(1)),
        ("llama.expert_count", values.u32(4)),
    ],
)
def test_damaged_keys_are_input_errors(key, value, zoo):
    with GgufFile.open(zoo("llama")[1]) as file:
        file._values = MappingProxyType({**file.values, key: value})
        with pytest.raises(InputError):
            HfView(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.model", values.string("martian")),
        ("tokenizer.ggml.pre", values.string("martian")),
        ("tokenizer.ggml.tokens", values.u32s([1])),
        ("tokenizer.ggml.token_type", values.i32s([1, 2])),
        ("tokenizer.ggml.token_type", values.i32s([9] * 256)),
        ("tokenizer.ggml.merges", values.strings(["ab"])),
        ("tokenizer.chat_templates", values.strings(["../x"])),
        ("tokenizer.ggml.bos_token_id", values.string("0")),
    ],
)
def test_damaged_tokenizers_are_input_errors(key, value, zoo, tmp_path):
    with GgufFile.open(zoo("llama")[1]) as file:
        file._values = MappingProxyType({**file.values, key: value})
        with pytest.raises(InputError):
            write_tokenizer(file, tmp_path)


def test_rows_and_names_that_do_not_exist(zoo):
    with GgufFile.open(zoo("llama")[1]) as file:
        view = HfView(file)
        with pytest.raises(InputError, match="no tensor"):
            view.read("model.nothing")
        with pytest.raises(InputError, match="rows"):
            view.read("model.norm.weight", (0, 65))
