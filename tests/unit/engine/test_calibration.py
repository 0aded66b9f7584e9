"""Calibration tokens: which, how many, in which order."""

import hashlib
import json

import pytest
import torch
from tests.small import add_tokenizer

import bitwright
from bitwright.engine.calibration import load_texts, load_tokenizer, tokens_from_texts, tokens_from_windows
from bitwright.engine.recipe import Calibration
from bitwright.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One byte, one token; a template that marks turns by ``<`` and ``>``."""
    folder = tmp_path_factory.mktemp("tokenizer")
    add_tokenizer(folder, template="{% for m in messages %}<{{ m.role[0] }}{{ m.content }}>{% endfor %}")
    return load_tokenizer(folder)


def _tokens(texts, tokenizer, *, seed=0, **options):
    calibration = Calibration(**options)
    return tokens_from_texts(texts, tokenizer, calibration, seed=seed, vocab_size=256, origin="here")


def _rows(found, tokenizer):
    return [tokenizer.decode(row) for batch in found.batches for row in batch]


def test_packing_joins_texts_and_cuts_windows_of_equal_length(tokenizer):
    found = _tokens(["abcdefghij" * 5, "0123456789" * 5], tokenizer, length=40, samples=9, shuffle=False)
    assert _rows(found, tokenizer) == ["abcdefghij" * 4, "abcdefghij" + "0123456789" * 3]
    assert (found.count, found.sequences) == (80, 2)


def test_rows_take_one_text_a_sample_and_cut_it(tokenizer):
    texts = ["a" * 50, "b" * 20, "c" * 30]
    found = _tokens(texts, tokenizer, length=30, samples=9, packing="rows", shuffle=False)
    assert _rows(found, tokenizer) == ["a" * 30, "b" * 20, "c" * 30]
    # Rows of different lengths never share a batch: nothing is padded.
    assert [tuple(batch.shape) for batch in found.batches] == [(1, 30), (1, 20), (1, 30)]


def test_batches_hold_at_most_2048_tokens():
    windows = [[1] * 1000] * 9
    found = tokens_from_windows(windows, Calibration(length=1000), vocab_size=2, origin="here")
    assert [tuple(batch.shape) for batch in found.batches] == [(2, 1000)] * 4 + [(1, 1000)]


def test_shuffle_is_a_seeded_choice_without_repetition(tokenizer):
    text = "".join(f"{i:08d}" for i in range(100))
    options = {"length": 8, "samples": 20}
    chosen = [_rows(_tokens([text], tokenizer, seed=seed, **options), tokenizer) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]
    assert len(set(chosen[0])) == 20
    assert chosen[0] != sorted(chosen[0])
    first = _rows(_tokens([text], tokenizer, shuffle=False, **options), tokenizer)
    assert first == [f"{i:08d}" for i in range(20)]


def test_chat_template_is_applied_to_texts_and_to_messages(tokenizer):
    messages = json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo" * 40}])
    found = _tokens(["x" * 40, messages], tokenizer, length=100, packing="rows", chat_template=True, samples=2)
    assert _rows(found, tokenizer) == ["<u" + "x" * 40 + ">", "<uhi><a" + "yo" * 40 + ">"]


@pytest.mark.parametrize(("tokens", "samples", "warnings"), [(100, 1, 1), (100, 5, 2), (16_400, 2, 0)])
def test_few_tokens_are_warned_about(tokens, samples, warnings, tokenizer):
    found = _tokens(
        ["a" * tokens], tokenizer, length=max(8, tokens // samples // 2 if samples < 5 else 100), samples=samples
    )
    assert len(found.warnings) >= warnings - 1
    assert any("statistics are steadier" in note for note in found.warnings) == (found.count < 16_384)
    assert any("of the 5 asked for" in note for note in found.warnings) == (samples == 5)


def test_digest_depends_on_the_tokens_alone(tokenizer):
    text = "the quick brown fox " * 20
    first, again = (_tokens([text], tokenizer, length=40, samples=4) for _ in range(2))
    other = _tokens([text.replace("fox", "cat")], tokenizer, length=40, samples=4)
    assert first.digest == again.digest != other.digest
    expected = hashlib.sha256()
    for batch in first.batches:
        expected.update(repr(tuple(batch.shape)).encode() + batch.numpy().tobytes())
    assert first.digest == expected.hexdigest()


def test_jsonl_names_its_field(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one", "body": "eins"}\n\n{"text": "two", "body": "zwei"}\n')
    assert load_texts(Calibration(text=str(file))) == ["one", "two"]
    assert load_texts(Calibration(text=str(file), field="body")) == ["eins", "zwei"]
    with pytest.raises(InputError, match=r"line 1: no text in field 'prose' \(has: body, text\)"):
        load_texts(Calibration(text=str(file), field="prose"))
    file.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        load_texts(Calibration(text=str(file)))
    file.write_text('{"text": "one"}\n[1]\n')
    with pytest.raises(InputError, match="line 2: no text"):
        load_texts(Calibration(text=str(file)))


def test_plain_text_is_one_text_packed_and_a_text_a_line_in_rows(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo\n")
    assert load_texts(Calibration(text=str(file))) == ["one\n\ntwo\n"]
    assert load_texts(Calibration(text=str(file), packing="rows")) == ["one", "two"]


def test_id_beyond_the_vocabulary_is_refused_with_both_numbers():
    with pytest.raises(InputError, match="makes id 9, the model has a vocabulary of 5"):
        tokens_from_windows([[1, 9]], Calibration(), vocab_size=5, origin="here")


def test_own_samples_are_seeded_and_recorded(llama, tmp_path):
    calibration = {"samples": 6, "length": 24}
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = {"layout": "native", "group_size": 32, "calibration": calibration, "seed": seed}
        bitwright.quantize(llama, tmp_path / name, **options)
        record = json.loads((tmp_path / name / "bitwright.json").read_text())["calibration"]
        assert (record["origin"], record["tokens"], record["sequences"]) == ("model samples", 6 * 24, 6)
        hashes.append(record["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_named_text_is_recorded(llama, text, tmp_path):
    calibration = {"text": str(text), "samples": 2, "length": 40, "shuffle": False}
    bitwright.quantize(llama, tmp_path / "out", layout="native", group_size=32, calibration=calibration)
    record = json.loads((tmp_path / "out" / "bitwright.json").read_text())["calibration"]
    ids = load_tokenizer(llama)(text.read_text())["input_ids"]
    batch = torch.tensor(ids[:80]).view(2, 40)
    expected = hashlib.sha256(b"(2, 40)" + batch.numpy().tobytes()).hexdigest()
    assert record == {"origin": "text.txt", "tokens": 80, "sequences": 2, "sha256": expected}
