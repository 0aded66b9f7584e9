"""Byte-level BPE (GPT-2, Llama 3, Qwen ...): vocabulary and merges as they are, and the name of the splitter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.errors import InputError
from bitwright.gguf.pre_tokenizer import find_pre, known_pre
from bitwright.gguf.vocabulary import MAX_TOKENS, TokenizerFolder, TokenType, Vocabulary, place_added
from bitwright.io.text import quoted

__all__ = ["by_id", "from_document", "is_byte_level", "pairs"]

#: normalizers that llama.cpp leaves out, and texts in normal form do not need
_PASSING = {None, "NFC"}


def is_byte_level(document: Mapping[str, Any]) -> bool:
    """Whether pieces are written in the byte alphabet: a ByteLevel step before or after."""
    return any(_has_byte_level(document.get(part)) for part in ("pre_tokenizer", "decoder"))


def _has_byte_level(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    inner = [*part.get("pretokenizers", []), *part.get("decoders", [])]
    return part.get("type") == "ByteLevel" or any(_has_byte_level(one) for one in inner)


def by_id(vocab: Any, where: str) -> list[str | None]:
    """Tokens in order of ids; None where an id is missing. InputError for ids that are no small whole numbers, or used twice."""
    if not isinstance(vocab, Mapping):
        raise InputError(f"{where}: the vocabulary is not a map of tokens to ids", mend="check the download")
    found: list[str | None] = []
    for token, number in sorted(vocab.items(), key=lambda item: item[1] if type(item[1]) is int else -1):
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise InputError(f"{where}: token {quoted(token)} has id {quoted(str(number))}", mend="check the download")
        found += [None] * (number + 1 - len(found))
        if found[number] is not None:
            raise InputError(f"{where}: two tokens with id {number}", mend="check the download")
        found[number] = token
    return found


def pairs(model: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """Merges as pairs, from either way of writing them."""
    found: list[tuple[str, str]] = []
    for merge in model.get("merges", []):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{where}: a faulty merge {quoted(str(merge))}", mend="check the download")
        found.append((parts[0], parts[1]))
    return found


def from_document(files: TokenizerFolder, pre: str | None) -> Vocabulary:
    """The vocabulary of a byte-level BPE ``tokenizer.json``."""
    assert files.document is not None
    document, model = files.document, files.model
    normalizer = (document.get("normalizer") or {}).get("type")
    if normalizer not in _PASSING and pre is None:
        raise InputError(
            f"{files.where}: llama.cpp does not normalize by {quoted(str(normalizer))} before byte-level BPE",
            mend="give --pre NAME, if llama.cpp has a splitter that does",
        )
    name = find_pre(document, files.where) if pre is None else known_pre(pre)
    known = by_id(model.get("vocab"), files.where)
    tokens = [f"[PAD{number}]" if token is None else token for number, token in enumerate(known)]
    types = [TokenType.UNUSED if token is None else TokenType.NORMAL for token in known]
    place_added(tokens, types, list(files.added().values()))
    # A space inside a piece would be taken for the gap between the two.
    merges = [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in pairs(model, files.where)]
    return Vocabulary(model="gpt2", pre=name, tokens=tokens, types=types, merges=merges)
