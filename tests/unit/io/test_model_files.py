import json

import pytest

from bitwright.errors import InputError
from bitwright.io.safetensors_dir import already_quantized, refuse_remote_code, side_files, tokenizer_vocab_size


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "modeling_x.X"}},
        {"text_config": {"auto_map": {"AutoModel": "x"}}},
        {"parts": [{"deep": [{"auto_map": "x"}]}]},
    ],
)
def test_remote_code_is_refused_at_any_depth(config, tmp_path):
    with pytest.raises(InputError, match="auto_map"):
        refuse_remote_code(config, tmp_path)
    refuse_remote_code(config, tmp_path, trust_remote_code=True)


def test_configs_without_remote_code_pass(tmp_path):
    refuse_remote_code({"model_type": "llama", "auto_map": None, "architectures": ["auto_map"]}, tmp_path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": "x"}, "unknown"),
    ],
)
def test_quantized_checkpoints_are_recognised(config, method):
    assert already_quantized(config) == method


@pytest.mark.parametrize(
    ("document", "size"),
    [
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 6}}, "added_tokens": [{"id": 9, "content": "x"}]}, 10),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 6}}, "added_tokens": [{"id": 2, "content": "x"}]}, 7),
        ({"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", -2.0]]}, "added_tokens": None}, 2),
    ],
)
def test_vocabulary_size_counts_added_tokens(tmp_path, document, size):
    assert tokenizer_vocab_size(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert tokenizer_vocab_size(tmp_path) == size


def test_vocabulary_size_agrees_with_the_tokenizers_library(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_vocab_size(tmp_path) == tokenizer.get_vocab_size(with_added_tokens=True) == 5


@pytest.mark.parametrize(
    "document",
    [
        *([], {}, {"model": {"vocab": {"a": "0"}}}, {"model": {"vocab": {"a": -1}}}, {"model": {"vocab": 3}}),
        *({"model": {"vocab": {}}, "added_tokens": [{}]}, {"model": {"vocab": {}}, "added_tokens": {"id": 1}}),
    ],
    ids=range(7),
)
def test_tokenizer_files_that_are_not_sound_are_refused(tmp_path, document):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer_vocab_size(tmp_path)


def test_side_files_are_those_an_output_keeps(tmp_path):
    keep = [
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
    ]
    drop = [
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.py",
        "tokenization_x.py",
        "tokenizer.bin",
        "vocab.pkl",
        "chat_template.py",
        "pytorch_model.bin",
        ".gitattributes",
        "training_args.bin",
    ]
    for name in keep + drop:
        (tmp_path / name).write_text("x")
    (tmp_path / "tokenizer_folder").mkdir()
    assert [file.name for file in side_files(tmp_path)] == sorted(keep)
    with pytest.raises(InputError, match="no such folder"):
        side_files(tmp_path / "none")
    with pytest.raises(InputError, match="not a folder"):
        side_files(tmp_path / "LICENSE")
