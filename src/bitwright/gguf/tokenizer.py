"""The tokenizer of a Hugging Face folder as the ``tokenizer.*`` keys of a GGUF file.

``tokenizer.json`` says what kind it is; ``tokenizer_bpe``, ``tokenizer_spm`` and ``tokenizer_wordpiece`` write the vocabulary of theirs.
What is common is here: special tokens by id, which of them are added to every text, the chat template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.errors import InputError
from bitwright.gguf import tokenizer_bpe, tokenizer_spm, tokenizer_wordpiece
from bitwright.gguf.vocabulary import (
    TokenizerFolder,
    TokenType,
    Vocabulary,
    read_object,
    read_text,
)
from bitwright.io.gguf_values import GgufValue, boolean, f32s, i32s, string, strings, u32
from bitwright.io.text import printable, quoted

__all__ = ["SPECIAL", "tokenizer_values"]

#: what tokenizer_config.json calls a special token -> its key
SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "prefix": "fim_pre_token_id",
    "suffix": "fim_suf_token_id",
    "middle": "fim_mid_token_id",
}


def tokenizer_values(
    folder: Path, config: Mapping[str, Any], *, rows: int, pre: str | None = None
) -> dict[str, GgufValue]:
    """The ``tokenizer.*`` keys.

    config: the model's, for special ids that only it names. rows: of the embedding, so many tokens are written. pre: the splitter's name
    where it is to be set by hand. Raises InputError where there is no tokenizer, or one that GGUF cannot express.
    """
    files = TokenizerFolder.open(folder)
    vocabulary = _vocabulary(files, pre)
    _fill(vocabulary, rows, files.where)
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):  # llama.cpp ends the process over these
        twice = next(token for token, count in Counter(vocabulary.tokens).items() if count > 1)
        raise InputError(f"{files.where}: two tokens spelled {quoted(twice)}", mend="GGUF needs every token to differ")
    values = {
        "model": string(vocabulary.model),
        "pre": string(vocabulary.pre),
        "tokens": strings(vocabulary.tokens),
        "token_type": i32s([int(kind) for kind in vocabulary.types]),
    }
    if vocabulary.scores is not None:
        values["scores"] = f32s(vocabulary.scores)
    if vocabulary.merges is not None:
        values["merges"] = strings(vocabulary.merges)
    values |= vocabulary.extra
    ids = _special_ids(files, _special_texts(files), vocabulary, config)
    values |= {SPECIAL[name]: u32(number) for name, number in ids.items()}
    values |= {f"add_{name}_token": boolean(flag) for name, flag in _adds(files, ids, vocabulary).items()}
    kinds = config.get("type_vocab_size")
    if type(kinds) is int and kinds > 0:
        values["token_type_count"] = u32(kinds)
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()} | _templates(files)


def _vocabulary(files: TokenizerFolder, pre: str | None) -> Vocabulary:

    if files.document is None:
        if (files.path / "tokenizer.model").is_file():
            return tokenizer_spm.from_model(files)
        raise InputError(
            f"{printable(str(files.path))}: neither tokenizer.json nor tokenizer.model",
            mend="save the tokenizer into the folder with transformers (AutoTokenizer ... save_pretrained)",
        )
    kind = files.model.get("type", "BPE" if "merges" in files.model else None)
    if kind == "BPE" and tokenizer_bpe.is_byte_level(files.document):
        return tokenizer_bpe.from_document(files, pre)
    if pre is not None:
        raise InputError(f"--pre {pre}: only byte-level BPE tokenizers have one", mend="leave --pre away")
    if kind == "BPE":
        return tokenizer_spm.from_merges(files)
    if kind == "Unigram":
        return tokenizer_spm.from_unigram(files)
    if kind == "WordPiece":
        return tokenizer_wordpiece.from_document(files)
    raise InputError(
        f"{files.where}: tokenizers of type {quoted(str(kind))} cannot be expressed",
        mend="use BPE, Unigram or WordPiece",
    )


def _fill(vocabulary: Vocabulary, rows: int, where: str) -> None:
    """As many tokens as the embedding has rows. InputError where there are more."""
    count = len(vocabulary.tokens)
    if count > rows:
        raise InputError(
            f"{where}: token ids up to {count - 1}, but the embedding has {rows} rows",
            mend="use the tokenizer that belongs to the model, or resize its embedding",
        )
    vocabulary.tokens += [f"[PAD{number}]" for number in range(count, rows)]
    vocabulary.types += [TokenType.UNUSED] * (rows - count)
    if vocabulary.scores is not None:
        vocabulary.scores += [-10000.0] * (rows - count)


def _special_texts(files: TokenizerFolder) -> dict[str, str]:
    texts = {name: text for name in SPECIAL if (text := files.special_text(name)) is not None}
    # Encoders name the ends of a text cls and sep; llama.cpp asks for bos and eos.
    for name, other in (("bos", "cls"), ("eos", "sep")):
        if other in texts:
            texts.setdefault(name, texts[other])
    # What the post-processor puts around a text is what llama.cpp must put there; another end of text stays known as end of turn.
    first, last, _ = _template(None if files.document is None else files.document.get("post_processor")) or (
        None,
        None,
        False,
    )
    if first is not None:
        texts["bos"] = first
    if last is not None and last != texts.get("eos"):
        if "eos" in texts:
            texts.setdefault("eot", texts["eos"])
        texts["eos"] = last
    return texts


def _special_ids(
    files: TokenizerFolder, texts: Mapping[str, str], vocabulary: Vocabulary, config: Mapping[str, Any]
) -> dict[str, int]:
    added = {token.content: token.id for token in files.added().values()}
    ids: dict[str, int] = {}
    for name, text in texts.items():
        number = added.get(text)
        if number is None and files.document is not None:
            vocab = files.model.get("vocab")
            number = vocab.get(text) if isinstance(vocab, Mapping) else None
        if number is None and text in vocabulary.tokens:
            number = vocabulary.tokens.index(text)
        if number is not None:
            ids[name] = number
    for name, number in vocabulary.ids.items():
        ids.setdefault(name, number)
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        stated = config.get(f"{name}_token_id")
        first = stated[0] if isinstance(stated, list) and stated else stated
        if name not in ids and type(first) is int and 0 <= first < len(vocabulary.tokens):
            ids[name] = first
    return ids


def _adds(files: TokenizerFolder, ids: Mapping[str, int], vocabulary: Vocabulary) -> dict[str, bool]:
    """Whether the beginning and the end of a text get a token: the post-processor says so, else the settings, else the kind."""
    flags = dict(vocabulary.adds)
    template = None if files.document is None else _template(files.document.get("post_processor"))
    if files.document is not None:
        first, last, between = template or (None, None, False)
        flags |= {"bos": first is not None, "eos": last is not None}
        if between:
            flags["sep"] = True
    else:  # transformers heeds these switches only where no tokenizer.json says what is added
        stated = {name: files.settings.get(f"add_{name}_token") for name in ("bos", "eos")}
        flags |= {name: flag for name, flag in stated.items() if isinstance(flag, bool)}
    return {name: flag for name, flag in flags.items() if not flag or name in ids}


def _template(processor: Any) -> tuple[str | None, str | None, bool] | None:
    """(token before, token after, whether a pair gets one between) that a post-processor adds; None where it adds none by itself."""
    if not isinstance(processor, Mapping):
        return None
    kind = processor.get("type")
    if kind == "Sequence":
        found = [_template(part) for part in processor.get("processors", [])]
        return next((one for one in found if one is not None), None)
    if kind in {"BertProcessing", "RobertaProcessing"}:
        first, last = (
            one[0] if isinstance(one := processor.get(end), list) and one else None for end in ("cls", "sep")
        )
        return (str(first), str(last), True) if first and last else None
    if kind != "TemplateProcessing":
        return None
    single = _ids(processor.get("single"))
    place = single.index(None) if None in single else 0
    first, last = (single[0] if place else None), (single[-1] if place < len(single) - 1 else None)
    pair = _ids(processor.get("pair"))
    between = pair[pair.index(None) + 1 : len(pair) - pair[::-1].index(None) - 1] if pair.count(None) == 2 else []
    return first, last, bool(between)


def _ids(parts: Any) -> list[str | None]:
    """Special tokens of a template by name, the texts as None."""
    if not isinstance(parts, list):
        return []
    found = [part.get("SpecialToken") for part in parts if isinstance(part, Mapping)]
    return [str(one.get("id")) if isinstance(one, Mapping) else None for one in found]


def _templates(files: TokenizerFolder) -> dict[str, GgufValue]:
    """Chat templates: a file of its own, or an entry of the settings, which may be a list of named ones."""
    single, legacy = files.path / "chat_template.jinja", files.path / "chat_template.json"
    found: Any = files.settings.get("chat_template")
    named: dict[str, str] = {}
    if single.is_file():  # goes before the settings, as in transformers
        found = read_text(single)
        named = {
            file.stem: read_text(file) for file in sorted((files.path / "additional_chat_templates").glob("*.jinja"))
        }
    elif found is None and legacy.is_file():
        found = (read_object(legacy) or {}).get("chat_template")
    if isinstance(found, list):
        named = {str(one.get("name")): str(one.get("template")) for one in found if isinstance(one, Mapping)}
        found = named.pop("default", None)
    values = {"tokenizer.chat_template": string(found)} if isinstance(found, str) else {}
    if named:
        values["tokenizer.chat_templates"] = strings(list(named))
        values |= {f"tokenizer.chat_template.{name}": string(text) for name, text in named.items()}
    return values
