"""From the rules of published tokenizers to the names of llama.cpp's splitters."""

import pytest

from bitwright.errors import InputError
from bitwright.gguf.pre_tokenizer import PRE, find_pre, known_pre, rules_of

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
    "|\\s+(?!\\S)|\\s+"
)
POSSESSIVE = "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def document(pre_tokenizer, **model):
    return {"pre_tokenizer": pre_tokenizer, "model": {"type": "BPE", **model}}


@pytest.mark.parametrize(
    ("rules", "whole", "name"),
    [
        (WORDS, False, "gpt-2"),
        (sequence(split(LLAMA3), BYTES), True, "llama-bpe"),
        (sequence(split(LLAMA3), BYTES), False, "dbrx"),
        (sequence(split(LLAMA3, "Removed", True), BYTES), False, "dbrx"),
        (sequence(split(LLAMA3.replace("{1,3}", "")), BYTES), False, "qwen2"),
        (sequence(split(POSSESSIVE), BYTES), False, "bailingmoe"),
        (sequence({"type": "Digits", "individual_digits": True}, WORDS), False, "starcoder"),
        (
            sequence(
                {"type": "Punctuation", "behavior": "Contiguous"},
                WORDS,
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ),
            False,
            "falcon",
        ),
        (
            sequence(
                split("[\r\n]"), split("\\s?\\p{L}+"), split("\\s?\\p{P}+"), split("[一-龥ࠀ-一가-\ud7ff]+"),
                {"type": "Digits", "individual_digits": True}, BYTES,
            ),
            False,
            "deepseek-coder",
        ),
        (sequence(split(" ?[^(\\s|.,!?…。，、।۔،)]+"), BYTES), False, "bloom"),
    ],
)  # fmt: skip
def test_published_rules_are_recognized(rules, whole, name):
    assert find_pre(document(rules, ignore_merges=whole), "tokenizer.json") == name


@pytest.mark.parametrize("name", PRE)
def test_every_splitter_is_found_by_its_own_rules(name):
    rules, whole = rules_of(name)
    found = find_pre(document(rules, ignore_merges=whole), "tokenizer.json")
    assert PRE[found][0] == PRE[name][0]


@pytest.mark.parametrize(
    "rules",
    [
        None,
        {"type": "Whitespace"},
        sequence(split("\\w+"), BYTES),
        {**WORDS, "add_prefix_space": True},
        {"type": "Split"},
    ],
)
def test_unknown_rules_ask_for_a_name(rules):
    with pytest.raises(InputError) as caught:
        find_pre(document(rules), "tokenizer.json")
    assert "--pre NAME" in caught.value.mend


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError) as caught:
        known_pre("gpt-9")
    assert "llama-bpe" in caught.value.mend


def test_repetitions_in_a_set_of_characters_are_no_possessives():
    rules, _ = rules_of("deepseek-v3")
    assert any("*+," in str(step) for step in rules["pretokenizers"])
    assert find_pre(document(rules), "x") == "deepseek-v3"
