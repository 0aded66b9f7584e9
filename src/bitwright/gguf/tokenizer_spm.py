"""SentencePiece tokenizers: from ``tokenizer.model``, or from a ``tokenizer.json`` that was made of one.

Two kinds. GGUF's ``llama`` merges the neighbours whose union has the best score; its ``tokenizer.json`` is a BPE with byte fallback over
text in which spaces are ``▁``. Scores are then made from the order of merges, which works where every way to make a token is listed, as
files converted from SentencePiece have it; others are refused. GGUF's ``t5`` is Unigram: the segmentation with the best sum of scores.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.errors import InputError
from bitwright.gguf.sentencepiece_model import read_sentencepiece
from bitwright.gguf.tokenizer_bpe import by_id, pairs
from bitwright.gguf.vocabulary import MAX_TOKENS, AddedToken, TokenizerFolder, TokenType, Vocabulary
from bitwright.io.gguf_values import GgufValue, boolean, u8s
from bitwright.io.strict import load_json
from bitwright.io.text import printable, quoted

__all__ = ["from_merges", "from_model", "from_unigram", "merge_scores"]

_SPACE = "▁"
#: llama.cpp's converter gives these to added tokens and to ids without a token; they only matter for texts that spell such a token
_ADDED, _MISSING = -1000.0, -10000.0


def from_model(files: TokenizerFolder) -> Vocabulary:
    """The vocabulary of a ``tokenizer.model``, with the added tokens of the files beside it."""
    path = files.path / "tokenizer.model"
    model = read_sentencepiece(path)
    if model.kind not in {"bpe", "unigram"}:
        raise InputError(
            f"{printable(str(path))}: a model of {model.kind}s", mend="only BPE and Unigram can be expressed"
        )
    if model.suffix_spaces:
        raise InputError(f"{printable(str(path))}: spaces are suffixes", mend="such tokenizers cannot be expressed")
    tokens = [text for text, _, _ in model.pieces]
    scores = [score for _, score, _ in model.pieces]
    types = [TokenType(kind) for _, _, kind in model.pieces]
    for number, kind in enumerate(types):
        if kind is TokenType.USER_DEFINED:
            tokens[number] = tokens[number].replace(_SPACE, " ")
    added = {token.id: token for token in _added_file(files)} | files.added()
    _place(tokens, types, scores, list(added.values()))
    prefix = files.settings.get("add_prefix_space")
    extra: dict[str, GgufValue] = {
        "add_space_prefix": boolean(prefix if isinstance(prefix, bool) else model.add_prefix)
    }
    ids = {name: number for name, number in model.ids.items() if 0 <= number < len(tokens)}
    if model.kind == "bpe":
        return Vocabulary(
            model="llama", pre="default", tokens=tokens, types=types, scores=scores, extra=extra, ids=ids,
            adds={"bos": True, "eos": False},
        )  # fmt: skip
    extra["remove_extra_whitespaces"] = boolean(model.remove_spaces)
    if model.charsmap:
        extra["precompiled_charsmap"] = u8s(bytearray(model.charsmap))
    return Vocabulary(
        model="t5", pre="default", tokens=tokens, types=types, scores=scores, extra=extra, ids=ids,
        adds={"bos": False, "eos": True},
    )  # fmt: skip


def _added_file(files: TokenizerFolder) -> list[AddedToken]:
    path = files.path / "added_tokens.json"
    found = load_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(type(number) is int and number >= 0 for number in found.values()):
        raise InputError(f"{printable(str(path))}: not a map of tokens to ids", mend="check the download")
    return [AddedToken(number, text, special=False) for text, number in found.items()]


def _place(tokens: list[str], types: list[TokenType], scores: list[float], added: Sequence[AddedToken]) -> None:
    for token in added:
        if token.id >= MAX_TOKENS:
            raise InputError(f"added token {quoted(token.content)} has id {token.id}", mend="check the download")
        while len(tokens) <= token.id:
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(TokenType.UNUSED)
            scores.append(_MISSING)
        if types[token.id] is TokenType.UNKNOWN and tokens[token.id] == token.content:
            continue
        types[token.id] = token.type
        # llama.cpp looks for these in the text as it comes, before spaces become ▁
        own = token.type is TokenType.USER_DEFINED
        tokens[token.id] = token.content.replace(_SPACE, " ") if own else token.content
        scores[token.id] = _ADDED


def from_merges(files: TokenizerFolder) -> Vocabulary:
    """The vocabulary of a ``tokenizer.json`` of BPE with byte fallback (Llama 2, Mistral, Gemma)."""
    assert files.document is not None
    model = files.model
    known = by_id(model.get("vocab"), files.where)
    tokens = [f"[PAD{number}]" if token is None else token for number, token in enumerate(known)]
    missing = next((byte for byte in range(256) if _byte(byte) not in model["vocab"]), None)
    if missing is not None or not model.get("byte_fallback"):
        what = f"no token {_byte(missing)}" if missing is not None else "no byte_fallback"
        raise InputError(
            f"{files.where}: {what}; llama.cpp spells unknown characters in bytes",
            mend="this tokenizer cannot be expressed",
        )
    bytewise = {_byte(byte) for byte in range(256)}
    types = [
        TokenType.UNUSED if token is None else TokenType.BYTE if token in bytewise else TokenType.NORMAL
        for token in known
    ]
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in model["vocab"]:
        types[model["vocab"][unknown]] = TokenType.UNKNOWN
    added = files.added()
    beside = {token.content for token in added.values()} | bytewise
    ranks = merge_scores(model["vocab"], pairs(model, files.where), beside, files.where)
    scores = [_MISSING if token is None else ranks.get(token, 0.0) for token in known]
    _place(tokens, types, scores, list(added.values()))
    prefix = _spaces(files.document, files.where)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        extra={"add_space_prefix": boolean(prefix)},
    )


def merge_scores(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], beside: set[str], where: str
) -> dict[str, float]:
    """A score for every token that merging makes, so that the best scored union is the first merge of the list.

    beside: tokens that merging never makes. Raises InputError where merges of one token stand apart with others between, or where two
    tokens make up a third without a merge.

    >>> merge_scores({"a": 0, "b": 1, "ab": 2, "aab": 3}, [("a", "b"), ("a", "ab")], set(), "x")
    {'ab': 0.0, 'aab': -1.0}
    """
    scores: dict[str, float] = {}
    last = None
    for left, right in merges:
        made = left + right
        if made != last and made in scores:
            raise InputError(
                f"{where}: the merges to {quoted(made)} do not stand together, so that no score stands for them",
                mend="keep tokenizer.model beside the model, if there is one; other tokenizers of this kind cannot be expressed",
            )
        scores.setdefault(made, float(-len(scores)))
        last = made
    listed = set(merges)
    for token in vocab:
        if token in beside:
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in listed and pair[0] in vocab and pair[1] in vocab and not beside & set(pair):
                raise InputError(
                    f"{where}: no merge makes {quoted(token)} of {quoted(pair[0])} and {quoted(pair[1])}, as SentencePiece would",
                    mend="keep tokenizer.model beside the model, if there is one; other tokenizers of this kind cannot be expressed",
                )
    return scores


def _byte(value: int) -> str:
    return f"<0x{value:02X}>"


def _spaces(document: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before a text. InputError for steps that SentencePiece has not."""
    prefix = False
    for step in _steps(document.get("normalizer"), "normalizers"):
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif kind != "Replace" or pattern != {"String": " "} or step.get("content") != _SPACE:
            raise InputError(
                f"{where}: llama.cpp does not normalize by {quoted(str(kind))} here",
                mend="this tokenizer cannot be expressed",
            )
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Metaspace":
            prefix = _prefixed(step)
        elif kind != "Split" or step.get("pattern") != {"String": " "}:
            raise InputError(
                f"{where}: llama.cpp does not cut by {quoted(str(kind))} here",
                mend="this tokenizer cannot be expressed",
            )
    return prefix


def _prefixed(metaspace: Mapping[str, Any]) -> bool:
    scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
    return bool(scheme != "never")


def _steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(part, Mapping):
        return []
    if part.get("type") == "Sequence":
        return [step for one in part.get(key, []) for step in _steps(one, key)]
    return [part]


def from_unigram(files: TokenizerFolder) -> Vocabulary:
    """The vocabulary of a Unigram ``tokenizer.json`` (T5, XLM-R)."""
    assert files.document is not None
    model, where = files.model, files.where
    listed = model.get("vocab")
    if not isinstance(listed, list) or not all(_is_piece(one) for one in listed):
        raise InputError(f"{where}: the vocabulary is not a list of pieces and scores", mend="check the download")
    if model.get("byte_fallback"):
        raise InputError(
            f"{where}: Unigram with byte_fallback; llama.cpp has unknown tokens there", mend="it cannot be expressed"
        )
    tokens = [str(piece) for piece, _ in listed]
    scores = [float(score) for _, score in listed]
    types = [TokenType.UNUSED if text == f"[PAD{number}]" else TokenType.NORMAL for number, text in enumerate(tokens)]
    unknown = model.get("unk_id")
    if type(unknown) is int and 0 <= unknown < len(tokens):
        types[unknown] = TokenType.UNKNOWN
    _place(tokens, types, scores, list(files.added().values()))
    extra: dict[str, GgufValue] = {}
    prefix = shorten = False
    for step in _steps(files.document.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Precompiled":
            extra["precompiled_charsmap"] = u8s(bytearray(_charsmap(step.get("precompiled_charsmap"), where)))
        elif kind == "Replace" and step.get("pattern") == {"Regex": " {2,}"}:
            shorten = True
        elif kind != "Strip":
            raise InputError(
                f"{where}: llama.cpp does not normalize by {quoted(str(kind))} here",
                mend="this tokenizer cannot be expressed",
            )
    for step in _steps(files.document.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Metaspace":
            prefix = _prefixed(step)
        elif kind == "WhitespaceSplit":
            shorten = True
        else:
            raise InputError(
                f"{where}: llama.cpp does not cut by {quoted(str(kind))} here",
                mend="this tokenizer cannot be expressed",
            )
    extra |= {"add_space_prefix": boolean(prefix), "remove_extra_whitespaces": boolean(shorten)}
    ids = {"unk": unknown} if type(unknown) is int else {}
    return Vocabulary(model="t5", pre="default", tokens=tokens, types=types, scores=scores, extra=extra, ids=ids)


def _is_piece(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and type(entry[1]) in (int, float)
        and abs(entry[1]) < 1e30
    )


def _charsmap(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"{where}: precompiled_charsmap is not base64", mend="download it again") from error
