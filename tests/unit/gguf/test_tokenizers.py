"""Tokenizers: what is written, against definitions; and through GGUF and back, against the ids that transformers gives."""

import json

import numpy as np
import pytest
from tests.gguf_tokenizers import SPECIAL_TEXTS, TEXTS, write_bpe, write_spm_bpe, write_unigram, write_wordpiece

from bitwright.blocks.types import TYPES
from bitwright.errors import InputError
from bitwright.gguf.pre_tokenizer import rules_of
from bitwright.gguf.tokenizer import tokenizer_values
from bitwright.gguf.tokenizer_spm import merge_scores
from bitwright.gguf.tokenizer_to_hf import write_tokenizer
from bitwright.gguf.vocabulary import TokenType
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import string
from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf

PRES = [
    "gpt-2",
    "starcoder",
    "llama-bpe",
    "qwen2",
    "tekken",
    "gpt-4o",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "falcon",
]
KINDS = [*PRES, "spm", "spm-gemma", "spm-metaspace", "unigram", "wordpiece", "wordpiece-cased"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, made = tmp_path_factory.mktemp("tokenizers"), {}

    def get(kind):
        if kind not in made:
            folder = made[kind] = base / kind
            if kind.startswith("spm"):
                write_spm_bpe(folder, prefix=kind != "spm-gemma", metaspace=kind == "spm-metaspace")
            elif kind == "unigram":
                write_unigram(folder)
            elif kind.startswith("wordpiece"):
                write_wordpiece(folder, lowercase=kind == "wordpiece")
            else:
                rules, whole = rules_of(kind)
                write_bpe(folder, rules, ignore_merges=whole)
        return made[kind]

    return get


def rows_of(folder):
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


def container(values, path):
    """A GGUF file of nothing but these keys."""
    parts = plan_gguf(
        {"general.architecture": string("llama"), **values}, [GgufEntry("x", (32,), TYPES["F32"])], stem=path.stem
    )
    with GgufWriter(path.parent, parts) as writer:
        writer.write("x", np.zeros((1, 128), np.uint8))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_same_after_gguf(kind, folders, tmp_path):
    from transformers import AutoTokenizer

    folder = folders(kind)
    values = tokenizer_values(folder, {}, rows=rows_of(folder) + 3)
    back = tmp_path / "back"
    back.mkdir()
    with GgufFile.open(container(values, tmp_path / "a.gguf")) as file:
        write_tokenizer(file, back)
    first, second = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(back)
    for text in [*TEXTS, *SPECIAL_TEXTS]:
        if kind == "spm-metaspace" and text.startswith(" "):
            continue  # Metaspace puts no space before one; SentencePiece does
        for special in (False, True):
            assert (
                second(text, add_special_tokens=special)["input_ids"]
                == first(text, add_special_tokens=special)["input_ids"]
            ), text
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    wanted = {name: getattr(first, name) for name in names if getattr(first, name) is not None}
    assert {name: getattr(second, name) for name in wanted} == wanted
    again = tokenizer_values(back, {}, rows=rows_of(folder) + 3)
    same = set(values) - {"tokenizer.ggml.scores"}
    assert {key: again.get(key) for key in same} == {key: values[key] for key in same}


def test_a_byte_level_vocabulary(folders):
    folder = folders("llama-bpe")
    rows = rows_of(folder) + 2
    values = tokenizer_values(folder, {}, rows=rows)
    document = json.loads((folder / "tokenizer.json").read_text())
    tokens = values["tokenizer.ggml.tokens"].value.tolist()
    types = values["tokenizer.ggml.token_type"].value.tolist()
    assert values["tokenizer.ggml.model"] == string("gpt2")
    assert values["tokenizer.ggml.pre"] == string("llama-bpe")
    assert len(tokens) == len(types) == rows
    assert all(tokens[number] == token for token, number in document["model"]["vocab"].items())
    assert values["tokenizer.ggml.merges"].value.tolist() == [" ".join(merge) for merge in document["model"]["merges"]]
    assert tokens[-2:] == [f"[PAD{rows - 2}]", f"[PAD{rows - 1}]"]
    assert types[-2:] == [TokenType.UNUSED] * 2
    assert types[tokens.index("<|begin|>")] == TokenType.CONTROL
    assert types[tokens.index("<|tool|>")] == TokenType.CONTROL
    assert values["tokenizer.ggml.bos_token_id"].value == tokens.index("<|begin|>")
    assert values["tokenizer.ggml.add_bos_token"].value is False


def test_scores_follow_the_order_of_merges(folders):
    values = tokenizer_values(folders("spm"), {}, rows=rows_of(folders("spm")))
    document = json.loads((folders("spm") / "tokenizer.json").read_text())
    tokens = values["tokenizer.ggml.tokens"].value.tolist()
    types = np.asarray(values["tokenizer.ggml.token_type"].value)
    scores = dict(zip(tokens, values["tokenizer.ggml.scores"].value.tolist(), strict=True))
    made = [scores["".join(merge)] for merge in document["model"]["merges"]]
    assert made == sorted(made, reverse=True)
    assert (types == TokenType.BYTE).sum() == 256
    assert types[:3].tolist() == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert values["tokenizer.ggml.add_bos_token"].value is True
    assert values["tokenizer.ggml.add_space_prefix"].value is True


def test_merges_that_no_score_stands_for_are_refused():
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    with pytest.raises(InputError, match="no merge makes 'abc'"):
        merge_scores(vocab, [("a", "b"), ("b", "c"), ("ab", "c")], set(), "x")
    with pytest.raises(InputError, match="stand together"):
        merge_scores(vocab, [("ab", "c"), ("a", "b"), ("a", "bc"), ("b", "c")], set(), "x")


def test_words_are_marked_where_they_begin(folders):
    values = tokenizer_values(folders("wordpiece"), {"type_vocab_size": 2}, rows=rows_of(folders("wordpiece")))
    vocab = json.loads((folders("wordpiece") / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = values["tokenizer.ggml.tokens"].value.tolist()
    assert tokens[vocab["[CLS]"]] == "[CLS]"
    assert tokens[vocab["the"]] == "▁the"
    assert tokens[vocab["##ing"]] == "ing"
    assert values["tokenizer.ggml.token_type_count"].value == 2
    assert values["tokenizer.ggml.bos_token_id"].value == values["tokenizer.ggml.cls_token_id"].value == vocab["[CLS]"]
    assert values["tokenizer.ggml.seperator_token_id"].value == vocab["[SEP]"]
    assert values["tokenizer.ggml.normalizer.lowercase"].value is True
    cased = tokenizer_values(folders("wordpiece-cased"), {}, rows=rows_of(folders("wordpiece-cased")))
    assert cased["tokenizer.ggml.normalizer.lowercase"].value is False


def test_unigram_scores_are_kept(folders):
    values = tokenizer_values(folders("unigram"), {}, rows=rows_of(folders("unigram")))
    listed = json.loads((folders("unigram") / "tokenizer.json").read_text())["model"]["vocab"]
    scores = values["tokenizer.ggml.scores"].value
    np.testing.assert_array_equal(scores[3:], np.asarray([score for _, score in listed[3:]], np.float32))
    assert values["tokenizer.ggml.model"] == string("t5")
    assert values["tokenizer.ggml.remove_extra_whitespaces"].value is True
    assert values["tokenizer.ggml.add_eos_token"].value is True


def edited(folders, kind, tmp_path, change, **settings):
    """A copy whose tokenizer.json went through ``change``."""
    source = folders(kind)
    document = json.loads((source / "tokenizer.json").read_text())
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    beside = json.loads((source / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**beside, **settings}))
    return tmp_path


def nothing(document):
    del document


@pytest.mark.parametrize("kind", ["qwen2", "spm"])
def test_the_post_processor_outweighs_the_settings_as_in_transformers(kind, folders, tmp_path):
    from transformers import AutoTokenizer

    folder = edited(folders, kind, tmp_path, nothing, add_bos_token=kind == "qwen2", add_eos_token=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a")["input_ids"]
    values = tokenizer_values(folder, {}, rows=len(tokenizer))
    assert values["tokenizer.ggml.add_bos_token"].value is (ids[0] == tokenizer.bos_token_id)
    assert values["tokenizer.ggml.add_eos_token"].value is (ids[-1] == tokenizer.eos_token_id)


def test_another_end_of_text_stays_known_as_end_of_turn(folders, tmp_path):
    def change(document):
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|tool|>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }

    folder = edited(folders, "qwen2", tmp_path, change)
    values = tokenizer_values(folder, {}, rows=rows_of(folders("qwen2")))
    tokens = values["tokenizer.ggml.tokens"].value.tolist()
    assert values["tokenizer.ggml.eos_token_id"].value == tokens.index("<|tool|>")
    assert values["tokenizer.ggml.eot_token_id"].value == tokens.index("<|end|>")
    assert values["tokenizer.ggml.add_eos_token"].value is True


def test_special_ids_that_only_the_config_names(folders, tmp_path):
    folder = edited(folders, "qwen2", tmp_path, nothing, bos_token=None, eos_token=None)
    values = tokenizer_values(folder, {"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": 10**6}, rows=1000)
    assert values["tokenizer.ggml.bos_token_id"].value == 5
    assert values["tokenizer.ggml.eos_token_id"].value == 7
    assert "tokenizer.ggml.padding_token_id" not in values


def test_chat_templates(folders, tmp_path):
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    folder = edited(folders, "qwen2", tmp_path, nothing, chat_template=named)
    values = tokenizer_values(folder, {}, rows=1000)
    assert values["tokenizer.chat_template"] == string("A")
    assert values["tokenizer.chat_template.tool_use"] == string("B")
    assert values["tokenizer.chat_templates"].value.tolist() == ["tool_use"]
    back = tmp_path / "back"
    back.mkdir()
    with GgufFile.open(container(values, tmp_path / "a.gguf")) as file:
        write_tokenizer(file, back)
    assert (back / "chat_template.jinja").read_text() == "A"
    assert (back / "additional_chat_templates" / "tool_use.jinja").read_text() == "B"
    again = tokenizer_values(back, {}, rows=1000)
    assert {key: again[key] for key in values if "chat" in key} == {key: values[key] for key in values if "chat" in key}


def test_more_tokens_than_rows_are_refused_with_both_numbers(folders):
    with pytest.raises(InputError, match=r"ids up to 700.*100 rows"):
        tokenizer_values(folders("qwen2"), {}, rows=100)


def test_two_tokens_spelled_alike_are_refused(folders, tmp_path):
    def change(document):
        document["added_tokens"].append({"id": 900, "content": "Ġthe", "special": False})

    with pytest.raises(InputError, match="two tokens"):
        tokenizer_values(edited(folders, "gpt-2", tmp_path, change), {}, rows=1000)


def test_no_tokenizer_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"neither tokenizer\.json"):
        tokenizer_values(tmp_path, {}, rows=10)


def test_a_given_name_overrides_the_rules(folders, tmp_path):
    def change(document):
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "use_regex": False}]}

    folder = edited(folders, "qwen2", tmp_path, change)
    with pytest.raises(InputError, match="pre-tokenizer"):
        tokenizer_values(folder, {}, rows=1000)
    assert tokenizer_values(folder, {}, rows=1000, pre="smollm")["tokenizer.ggml.pre"] == string("smollm")
    with pytest.raises(InputError, match="only byte-level"):
        tokenizer_values(folders("spm"), {}, rows=2000, pre="smollm")


@pytest.mark.parametrize(
    ("kind", "part", "step"),
    [
        ("qwen2", "normalizer", {"type": "Lowercase"}),
        ("spm", "normalizer", {"type": "NFKC"}),
        ("spm", "pre_tokenizer", {"type": "Whitespace"}),
        ("unigram", "normalizer", {"type": "Lowercase"}),
        ("unigram", "pre_tokenizer", {"type": "ByteLevel", "use_regex": True}),
        ("wordpiece", "pre_tokenizer", {"type": "Whitespace"}),
        ("wordpiece", "normalizer", {"type": "NFC"}),
    ],
)
def test_steps_that_llamacpp_has_not_are_refused(kind, part, step, folders, tmp_path):
    with pytest.raises(InputError) as caught:
        tokenizer_values(edited(folders, kind, tmp_path, lambda document: document.update({part: step})), {}, rows=2000)
    assert caught.value.mend


@pytest.mark.parametrize("kind", ["qwen2", "spm", "unigram", "wordpiece"])
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(vocab=[1, 2]),
        lambda d: d["model"].update(vocab={"a": -1}),
        lambda d: d["model"].update(vocab={"a": 2**40}),
        lambda d: d["model"].update(vocab={"a": 0, "b": 0}),
        lambda d: d["model"].update(type="Strange"),
        lambda d: d.update(model=[]),
        lambda d: d.update(added_tokens=[{"id": -1, "content": "x"}]),
        lambda d: d.update(added_tokens=[{"id": 2**40, "content": "x"}]),
        lambda d: d.update(added_tokens=[3]),
    ],
)
def test_a_faulty_tokenizer_is_an_input_error(kind, change, folders, tmp_path):
    with pytest.raises(InputError):
        tokenizer_values(edited(folders, kind, tmp_path, change), {}, rows=5000)
