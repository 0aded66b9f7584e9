"""The tokenizer of a GGUF file as ``tokenizer.json``, ``tokenizer_config.json`` and chat templates.

GGUF holds the vocabulary and names the splitter, so the rules are written as the model family's own files have them. Merges of
SentencePiece vocabularies are made from the scores: every way to make a token of two others, best scored token first.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.errors import InputError
from bitwright.gguf.pre_tokenizer import rules_of
from bitwright.gguf.tokenizer import SPECIAL
from bitwright.gguf.vocabulary import TokenType
from bitwright.io.gguf_file import GgufFile
from bitwright.io.text import printable, quoted

__all__ = ["write_tokenizer"]

_SPACE = "▁"
_TO_SPACES: dict[str, Any] = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_FROM_SPACES: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write the files into ``folder``. InputError where the file has no tokenizer, or one that is not known."""
    tokens = _Tokens(file)
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram, "bert": _wordpiece}
    maker = makers.get(tokens.model)
    if maker is None:
        raise InputError(
            f"{tokens.where}: tokenizer model {quoted(tokens.model)} is unknown", mend=f"known are: {', '.join(makers)}"
        )
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens.added(), **maker(tokens)}
    _write(folder / "tokenizer.json", document)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get(f"{file.get('general.architecture', str)}.context_length", int, 1024),
        **{f"{name}_token": tokens.texts[number] for name, number in tokens.special.items() if name in _NAMED},
    }
    _write(folder / "tokenizer_config.json", settings)
    _templates(file, folder)


_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class _Tokens:
    """The ``tokenizer.ggml`` keys of a file, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.where = printable(str(file.path))
        self.model = file.get("tokenizer.ggml.model", str)
        self.texts: list[str] = file.get("tokenizer.ggml.tokens", list)
        count = len(self.texts)
        kinds = file.get("tokenizer.ggml.token_type", np.ndarray, None)
        numbers = [1] * count if kinds is None else [int(kind) for kind in kinds]
        if len(numbers) != count or not all(0 <= number <= 6 for number in numbers):
            raise InputError(f"{self.where}: token types do not fit the tokens", mend="the file is damaged")
        self.types = [TokenType(number or 1) for number in numbers]
        self.special: dict[str, int] = {}
        for name, key in SPECIAL.items():
            number = file.get(f"tokenizer.ggml.{key}", int, None)
            if number is not None and number < count:
                self.special[name] = number
        if any("\udc80" <= character <= "\udcff" for text in self.texts for character in text):
            raise InputError(f"{self.where}: a token is not UTF-8", mend="the file is damaged")

    def flag(self, name: str, default: bool) -> bool:
        """A switch below ``tokenizer.ggml``."""
        return self.file.get(f"tokenizer.ggml.{name}", bool, default)

    def scores(self) -> list[float]:
        """One for each token."""
        found = self.file.get("tokenizer.ggml.scores", np.ndarray)
        if len(found) != len(self.texts) or not np.isfinite(found).all():
            raise InputError(f"{self.where}: scores do not fit the tokens", mend="the file is damaged")
        return [float(score) for score in found]

    def added(self) -> list[dict[str, Any]]:
        """Control and user-defined tokens, as tokenizer.json lists them."""
        wanted = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        return [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind is not TokenType.USER_DEFINED,
            }
            for number, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if kind in wanted and text
        ]

    def vocab(self) -> dict[str, int]:
        """Every token but unused ones."""
        pairs = zip(self.texts, self.types, strict=True)
        return {text: number for number, (text, kind) in enumerate(pairs) if kind is not TokenType.UNUSED and text}

    def template(self, *, bos: bool, eos: bool) -> dict[str, Any] | None:
        """What is put around a text; defaults as llama.cpp's for this kind."""
        first, last = self.flag("add_bos_token", bos), self.flag("add_eos_token", eos)
        before = self.special.get("bos") if first else None
        after = self.special.get("eos") if last else None
        if before is None and after is None:
            return None
        around = [number for number in (before, after) if number is not None]
        return {
            "type": "TemplateProcessing",
            "single": [*self._one(before, 0), _sequence("A", 0), *self._one(after, 0)],
            "pair": [
                *self._one(before, 0), _sequence("A", 0), *self._one(after, 0),
                *self._one(before, 1), _sequence("B", 1), *self._one(after, 1),
            ],
            "special_tokens": {
                self.texts[number]: {"id": self.texts[number], "ids": [number], "tokens": [self.texts[number]]}
                for number in around
            },
        }  # fmt: skip

    def _one(self, number: int | None, kind: int) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": self.texts[number], "type_id": kind}}]


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _byte_level(tokens: _Tokens) -> dict[str, Any]:
    pre = tokens.file.get("tokenizer.ggml.pre", str, "default")
    pre_tokenizer, whole = rules_of(pre)
    template = tokens.template(bos=False, eos=False)
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    merges = [_pair(merge, tokens.where) for merge in tokens.file.get("tokenizer.ggml.merges", list)]
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": template if template is not None else plain,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens.vocab(), merges) | {"ignore_merges": whole},
    }


def _pair(merge: str, where: str) -> list[str]:
    cut = merge.find(" ", 1)
    if cut < 0 or cut == len(merge) - 1:
        raise InputError(f"{where}: a faulty merge {quoted(merge)}", mend="the file is damaged")
    return [merge[:cut], merge[cut + 1 :]]


def _bpe(vocab: dict[str, int], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    known = [list(pair) for pair in merges if pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": known,
    }


def _sentencepiece(tokens: _Tokens) -> dict[str, Any]:
    vocab, scores = tokens.vocab(), tokens.scores()
    plain = {text for text, kind in zip(tokens.texts, tokens.types, strict=True) if kind is TokenType.NORMAL and text}
    best = sorted(plain, key=lambda text: (-scores[vocab[text]], vocab[text]))
    merges = [
        (text[:cut], text[cut:])
        for text in best
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    ]
    prefix = tokens.flag("add_space_prefix", True)
    unknown = tokens.special.get("unk", 0)
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, _FROM_SPACES]},
        "pre_tokenizer": None,
        "post_processor": tokens.template(bos=True, eos=False),
        "decoder": {"type": "Sequence", "decoders": [_TO_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
        "model": _bpe(vocab, merges) | {"unk_token": tokens.texts[unknown], "fuse_unk": True, "byte_fallback": True},
    }


def _unigram(tokens: _Tokens) -> dict[str, Any]:
    prefix, shorten = tokens.flag("add_space_prefix", False), tokens.flag("remove_extra_whitespaces", False)
    space = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "always" if prefix else "never",
        "split": True,
    }
    charsmap = tokens.file.get("tokenizer.ggml.precompiled_charsmap", np.ndarray, None)
    steps: list[dict[str, Any]] = []
    if charsmap is not None:
        encoded = base64.b64encode(charsmap.astype(np.uint8).tobytes()).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if shorten:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    cut = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]} if shorten else space
    scores = tokens.scores()
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": cut,
        "post_processor": tokens.template(bos=False, eos=True),
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": tokens.special.get("unk", 2),
            "vocab": [[text, score] for text, score in zip(tokens.texts, scores, strict=True)],
            "byte_fallback": False,
        },
    }


def _wordpiece(tokens: _Tokens) -> dict[str, Any]:
    vocab: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True)):
        if kind is TokenType.NORMAL:
            vocab[text[1:] if text.startswith(_SPACE) else f"##{text}"] = number
        elif kind is not TokenType.UNUSED:
            vocab[text] = number
    lowercase = tokens.flag("normalizer.lowercase", True)
    unknown = tokens.special.get("unk", 100)
    first, last = tokens.special.get("bos", 101), tokens.special.get("sep", 102)
    if max(unknown, first, last) >= len(tokens.texts):
        raise InputError(f"{tokens.where}: special tokens beyond the vocabulary", mend="the file is damaged")
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": tokens.flag("normalizer.strip_accents", lowercase),
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*tokens._one(first, 0), _sequence("A", 0), *tokens._one(last, 0)],
            "pair": [
                *tokens._one(first, 0), _sequence("A", 0), *tokens._one(last, 0), _sequence("B", 1), *tokens._one(last, 1),
            ],
            "special_tokens": {
                tokens.texts[number]: {"id": tokens.texts[number], "ids": [number], "tokens": [tokens.texts[number]]}
                for number in (first, last)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": tokens.texts[unknown],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }  # fmt: skip


def _templates(file: GgufFile, folder: Path) -> None:
    template = file.get("tokenizer.chat_template", str, None)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in file.get("tokenizer.chat_templates", list, []):
        if not name.replace("_", "").replace("-", "").isalnum():
            raise InputError(
                f"{printable(str(file.path))}: chat template {quoted(name)} has no plain name", mend="rename it"
            )
        text = file.get(f"tokenizer.chat_template.{name}", str)
        beside = folder / "additional_chat_templates"
        beside.mkdir(exist_ok=True)
        (beside / f"{name}.jinja").write_text(text, encoding="utf-8")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
