"""What the kinds of tokenizers share: a folder's tokenizer files, and a vocabulary on its way into a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from bitwright.errors import InputError
from bitwright.io.files import read_small_file
from bitwright.io.gguf_values import GgufValue
from bitwright.io.strict import load_json
from bitwright.io.text import printable, quoted

__all__ = [
    "MAX_TOKENS", "TEMPLATE_BYTES", "AddedToken", "TokenType", "TokenizerFolder", "Vocabulary", "place_added", "read_object", "read_text",
]  # fmt: skip

#: larger ids are damage; lists made for them would fill the memory
MAX_TOKENS = 2**22
#: a chat template longer than this is none
TEMPLATE_BYTES = 2**20


class TokenType(IntEnum):
    """Kinds of tokens, by their numbers in ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the trained vocabulary."""

    id: int
    content: str
    special: bool
    normalized: bool = False

    @property
    def type(self) -> TokenType:
        """CONTROL if it is special or looks so: some families mark theirs as ordinary."""
        text = self.content
        bracketed = any(
            text.startswith(left) and text.endswith(right)
            for left, right in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
        )
        named = text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        return TokenType.CONTROL if self.special or bracketed or named else TokenType.USER_DEFINED


@dataclass(kw_only=True)
class Vocabulary:
    """What one of the kinds makes of a tokenizer, in order of ids.

    model and pre: ``tokenizer.ggml.model`` and ``.pre``. extra: further keys below ``tokenizer.ggml.``. adds: which special tokens are
    added where the files do not say. ids: special tokens where the files do not say.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    extra: Mapping[str, GgufValue] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenizerFolder:
    """The tokenizer files of a model folder, parsed. document: ``tokenizer.json``; settings: ``tokenizer_config.json``."""

    path: Path
    document: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    special: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> TokenizerFolder:
        """Read what there is. InputError where a file is not what its name says."""
        document = read_object(path / "tokenizer.json")
        if document is not None:
            _check_document(document, f"{printable(str(path))}/tokenizer.json")
        settings = read_object(path / "tokenizer_config.json")
        special = read_object(path / "special_tokens_map.json")
        return cls(path=path, document=document, settings=settings or {}, special=special or {})

    @property
    def where(self) -> str:
        """The file that messages name."""
        return printable(str(self.path / ("tokenizer.json" if self.document is not None else "tokenizer.model")))

    @property
    def model(self) -> Mapping[str, Any]:
        """The ``model`` part of ``tokenizer.json``."""
        assert self.document is not None
        found: Mapping[str, Any] = self.document["model"]
        return found

    def added(self) -> dict[int, AddedToken]:
        """Added tokens by id, from ``tokenizer.json`` and ``added_tokens_decoder`` of the settings."""
        found: dict[int, AddedToken] = {}
        beside = self.settings.get("added_tokens_decoder") or {}
        listed = [] if self.document is None else self.document.get("added_tokens") or []
        if not isinstance(beside, Mapping) or not isinstance(listed, list):
            raise InputError(f"{self.where}: faulty added tokens", mend="check the download")
        for token in [
            *({**value, "id": int(key)} for key, value in beside.items() if key.isdecimal() and value),
            *listed,
        ]:
            if not isinstance(token, Mapping):
                raise InputError(f"{self.where}: a faulty added token {quoted(str(token))}", mend="check the download")
            number, content = token.get("id"), token.get("content")
            if type(number) is not int or not 0 <= number < MAX_TOKENS or not isinstance(content, str):
                raise InputError(f"{self.where}: a faulty added token {quoted(str(token))}", mend="check the download")
            found[number] = AddedToken(number, content, bool(token.get("special")), bool(token.get("normalized")))
        return dict(sorted(found.items()))

    def special_text(self, name: str) -> str | None:
        """The text of a special token such as ``bos``, as the settings name it."""
        for place in (self.settings, self.special):
            entry = place.get(f"{name}_token")
            content = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(content, str):
                return content
        return None


def _check_document(document: Mapping[str, Any], where: str) -> None:
    """InputError unless the parts of ``tokenizer.json`` are objects with a type, and their lists are lists of such."""
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges", []), list):
        raise InputError(f"{where}: no model in it", mend="check the download")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        parts = [document.get(name)]
        while parts:
            part = parts.pop()
            if part is None:
                continue
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise InputError(f"{where}: a faulty {name}", mend="check the download")
            for key in ("normalizers", "pretokenizers", "processors", "decoders"):
                inner = part.get(key, [])
                if not isinstance(inner, list) or None in inner:
                    raise InputError(f"{where}: a faulty {name}", mend="check the download")
                parts += inner


def read_text(path: Path) -> str:
    """A small UTF-8 file. InputError where it is not."""
    try:
        return read_small_file(path, max_bytes=TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(str(path))}: not UTF-8", mend="save it as UTF-8") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None where there is no such file."""
    if not path.exists():
        return None
    found = load_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{printable(str(path))}: not an object", mend="check the download")
    return found


def place_added(tokens: list[str], types: list[TokenType], added: Sequence[AddedToken]) -> None:
    """Put added tokens at their ids. Ids that nobody uses become ``[PADi]``."""
    for token in added:
        while len(tokens) <= token.id:
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(TokenType.UNUSED)
        tokens[token.id] = token.content
        types[token.id] = token.type
