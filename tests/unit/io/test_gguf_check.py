import numpy as np
import pytest

from bitwright.blocks.types import TYPES
from bitwright.errors import InputError
from bitwright.io import gguf_values as v
from bitwright.io.gguf_check import check_hyperparameters
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf

MODEL = {
    "general.architecture": v.string("llama"),
    "llama.block_count": v.u32(2),
    "llama.context_length": v.u32(128),
    "llama.embedding_length": v.u32(32),
    "llama.feed_forward_length": v.u32(64),
    "llama.attention.head_count": v.u32(4),
    "llama.attention.head_count_kv": v.u32(2),
    "llama.attention.layer_norm_rms_epsilon": v.f32(1e-5),
    "llama.rope.dimension_count": v.u32(8),
    "llama.rope.freq_base": v.f32(10000),
    "tokenizer.ggml.tokens": v.strings(["<unk>", "<s>", "</s>", "a"]),
    "tokenizer.ggml.scores": v.f32s([0, 0, 0, -1]),
    "tokenizer.ggml.token_type": v.i32s([2, 3, 3, 1]),
    "tokenizer.ggml.bos_token_id": v.u32(1),
    "tokenizer.ggml.eos_token_id": v.u32(2),
    "tokenizer.ggml.padding_token_id": v.u32(2**32 - 1),
}
ENTRIES = [
    GgufEntry("token_embd.weight", (4, 32), TYPES["F16"]),
    GgufEntry("blk.0.ffn_up.weight", (64, 32), TYPES["Q8_0"]),
    GgufEntry("blk.1.ffn_up.weight", (64, 32), TYPES["Q8_0"]),
]


def checked(folder, changes, entries=ENTRIES):
    values = {key: value for key, value in (MODEL | changes).items() if value is not None}
    parts = plan_gguf(values, entries)
    GgufWriter(folder, parts).close()
    with GgufFile.open(folder / "model.gguf") as file:
        check_hyperparameters(file)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"llama.attention.head_count_kv": v.i32s([2, 0])},
        {"llama.attention.head_count": v.u32s([4, 2])},
        {"llama.feed_forward_length": v.i32s([64, 32])},
        {"llama.expert_count": v.u32(8), "llama.expert_used_count": v.u32(2)},
        {"llama.vocab_size": v.u32(4), "tokenizer.ggml.tokens": None},
        {"llama.attention.head_count": None},
    ],
)
def test_models_that_make_sense_pass(tmp_path, changes):
    checked(tmp_path, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": None}, "key 'general.architecture': missing"),
        ({"general.architecture": v.string("")}, "key 'general.architecture': it is empty"),
        ({"llama.block_count": None}, "key 'llama.block_count': missing"),
        ({"llama.block_count": v.u32(0)}, "key 'llama.block_count': 0 is not from 1 to 512"),
        ({"llama.block_count": v.u32(2**31)}, "key 'llama.block_count': 2147483648 is not from 1 to 512"),
        ({"llama.block_count": v.i32(2)}, "key 'llama.block_count': it is i32, u32 is demanded"),
        ({"llama.block_count": v.u32(1)}, "1 blocks, tensor 'blk.1.ffn_up.weight' is of one beyond"),
        ({"llama.block_count": v.u32(3)}, "3 blocks, but no tensor is of block 2"),
        ({"llama.context_length": v.u32(0)}, "key 'llama.context_length': 0 is not from 1"),
        ({"llama.context_length": v.u32(2**32 - 1)}, "key 'llama.context_length': 4294967295"),
        ({"llama.embedding_length": v.u32(64)}, "64, token_embd.weight has 32 columns"),
        ({"llama.attention.head_count": v.u32(33)}, "33 heads for fewer values"),
        ({"llama.attention.head_count_kv": v.u32(3)}, "3 does not divide the 4 heads"),
        ({"llama.attention.head_count_kv": v.u32s([2])}, "1 values for 2 blocks"),
        ({"llama.attention.head_count": v.i32s([4, -1])}, "-1 is not from 0"),
        ({"llama.attention.head_count": v.f32(4)}, "it is f32, u32 or an array"),
        ({"llama.attention.layer_norm_rms_epsilon": v.f32(float("nan"))}, "nan is not from 0"),
        ({"llama.rope.freq_base": v.f32(0)}, "key 'llama.rope.freq_base': 0.0 is not from"),
        ({"llama.rope.freq_base": v.f32(float("inf"))}, "inf is not from"),
        ({"llama.expert_count": v.u32(2000)}, "key 'llama.expert_count': 2000"),
        ({"llama.expert_count": v.u32(8), "llama.expert_used_count": v.u32(9)}, "9 of 8 experts"),
        ({"llama.expert_count": v.u32(8)}, "none of 8 experts is used"),
        ({"llama.expert_used_count": v.u32(1)}, "1 of 0 experts"),
        ({"llama.vocab_size": v.u32(2**31 - 1)}, "key 'llama.vocab_size': 2147483647 is not from 1"),
        ({"llama.vocab_size": v.u32(5), "tokenizer.ggml.tokens": None}, "5 tokens, token_embd.weight has 4 rows"),
        ({"tokenizer.ggml.tokens": v.strings(["a"])}, "1 tokens, token_embd.weight has 4 rows"),
        ({"tokenizer.ggml.tokens": v.strings([])}, "0 tokens, 1 to"),
        ({"tokenizer.ggml.tokens": v.i32s([1])}, "it is array of i32, an array of strings"),
        ({"tokenizer.ggml.scores": v.f32s([0, 0])}, "2 values for 4 tokens"),
        ({"tokenizer.ggml.scores": v.f32s([0, 0, 0, np.nan])}, "a score is NaN"),
        ({"tokenizer.ggml.token_type": v.f32s([0, 0, 0, 0])}, "it is array of f32, an array of i32"),
        ({"tokenizer.ggml.bos_token_id": v.u32(4)}, "key 'tokenizer.ggml.bos_token_id': token 4, the vocabulary has 4"),
        ({"tokenizer.ggml.eos_token_id": v.u32(2**32 - 1)}, "token 4294967295, the vocabulary has 4"),
        ({"tokenizer.ggml.padding_token_id": v.u32(4)}, "token 4, the vocabulary has 4"),
        ({"tokenizer.ggml.bos_token_id": v.i32(1)}, "it is i32, u32 is demanded"),
    ],
)
def test_absurd_models_are_refused_with_file_and_key(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        checked(tmp_path, changes)
    assert caught.value.message.startswith(f"{tmp_path / 'model.gguf'}, key ")
    assert caught.value.mend


def test_blocks_that_only_predict_further_tokens_may_be_left_out(tmp_path):
    changes = {"llama.block_count": v.u32(3), "llama.nextn_predict_layers": v.u32(1)}
    checked(tmp_path, changes)
