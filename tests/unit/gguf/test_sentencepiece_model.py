"""The reader of ``tokenizer.model`` against files made by hand and by SentencePiece itself."""

import json
import random
import struct

import pytest
from tests.gguf_tokenizers import TEXTS, corpus

from bitwright.errors import InputError
from bitwright.gguf.sentencepiece_model import read_sentencepiece
from bitwright.gguf.tokenizer import tokenizer_values
from bitwright.gguf.vocabulary import TokenType


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields):
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁a", -1.5, 1), ("<0x0A>", 0.0, 6), ("▁▁", -2.0, 4)]


def proto(*more, pieces=PIECES, kind=2):
    listed = [
        (1, message((1, text.encode()), (2, score), *([(3, number)] if number != 1 else [])))
        for text, score, number in pieces
    ]
    return message(*listed, (2, message((3, kind), (40, 0), (41, 1), (43, 2**64 - 1))), *more)


def test_pieces_and_switches(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto((3, message((3, 0), (4, 0), (2, b"\x01\x02"))), (99, b"later"), (98, 7), (97, 1.0)))
    found = read_sentencepiece(path)
    assert found.pieces == tuple(PIECES)
    assert (found.kind, found.add_prefix, found.remove_spaces, found.charsmap) == ("bpe", False, False, b"\x01\x02")
    assert found.ids == {"unk": 0, "bos": 1, "eos": 2, "pad": -1}


def test_defaults_where_the_file_is_silent(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(message((1, message((1, b"a")))))
    found = read_sentencepiece(path)
    assert found.kind == "unigram"
    assert found.add_prefix
    assert found.remove_spaces
    assert found.pieces == (("a", 0.0, 1),)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\xff" * 11,
        b"\x00\x01",
        b"\x0b\x01",
        b"\x08\x01" * 3,
        message((1, message((1, b"\xff\xfe")))),
        message((1, message((1, b"a"), (2, float("nan"))))),
        message((1, message((1, b"a"), (3, 9)))),
        proto(kind=7),
        proto()[:-3],
    ],
)
def test_what_is_no_model_is_an_input_error(data, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(InputError, match="no SentencePiece model"):
        read_sentencepiece(path)


def test_flipped_and_cut_files_never_do_worse_than_an_input_error(tmp_path):
    rng, data, path = random.Random(0), proto(), tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(300):
        damaged = bytearray(data[: rng.randrange(len(data) + 1)])
        for _ in range(rng.randrange(3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_sentencepiece(path)
        except InputError:
            refused += 1
    assert refused > 100


def test_added_tokens_go_over_the_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(proto())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 7, "x▁y": 8}))
    decoder = {"0": {"content": "<unk>", "special": True}, "9": {"content": "<|im_end|>", "special": False}}
    settings = {
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    values = tokenizer_values(tmp_path, {}, rows=11)
    assert values["tokenizer.ggml.tokens"].value.tolist() == [
        "<unk>", "<s>", "</s>", "▁a", "<0x0A>", "  ", "[PAD6]", "<pad>", "x y", "<|im_end|>", "[PAD10]"
    ]  # fmt: skip
    kinds = TokenType
    assert values["tokenizer.ggml.token_type"].value.tolist() == [
        kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.NORMAL, kinds.BYTE, kinds.USER_DEFINED, kinds.UNUSED, kinds.CONTROL,
        kinds.USER_DEFINED, kinds.CONTROL, kinds.UNUSED,
    ]  # fmt: skip
    assert values["tokenizer.ggml.scores"].value.tolist() == [0, 0, 0, -1.5, 0, -2, -10000, -1000, -1000, -1000, -10000]
    assert values["tokenizer.ggml.eos_token_id"].value == 9
    assert values["tokenizer.ggml.add_bos_token"].value is False
    assert values["tokenizer.ggml.add_space_prefix"].value is True


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_files_of_sentencepiece_itself(kind, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(line for line in [*corpus(), *TEXTS] if line.strip()), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=900, model_type=kind, byte_fallback=kind == "bpe",
        minloglevel=2, user_defined_symbols=["<tool>"],
    )  # fmt: skip
    peer = spm.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    found = read_sentencepiece(tmp_path / "tokenizer.model")
    assert found.kind == kind
    assert len(found.pieces) == peer.vocab_size()
    for number, (piece, score, _) in enumerate(found.pieces):
        assert (piece, score) == (peer.IdToPiece(number), peer.GetScore(number))
    kinds = [number for _, _, number in found.pieces]
    assert [kind == 3 for kind in kinds] == [peer.IsControl(number) for number in range(len(kinds))]
    assert [kind == 6 for kind in kinds] == [peer.IsByte(number) for number in range(len(kinds))]
    assert len(found.charsmap) > 1000
