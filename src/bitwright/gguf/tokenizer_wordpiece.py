"""WordPiece (BERT): GGUF marks the beginnings of words, where the vocabulary marks what goes on.

``##ing`` becomes ``ing`` and ``play`` becomes ``▁play``; control tokens stay as they are.
"""

from __future__ import annotations

from bitwright.errors import InputError
from bitwright.gguf.tokenizer_bpe import by_id
from bitwright.gguf.vocabulary import TokenizerFolder, TokenType, Vocabulary, place_added
from bitwright.io.gguf_values import boolean
from bitwright.io.text import quoted

__all__ = ["from_document"]


def from_document(files: TokenizerFolder) -> Vocabulary:
    """The vocabulary of a WordPiece ``tokenizer.json``. InputError where it is cut or normalized otherwise than BERT does."""
    assert files.document is not None
    model, where = files.model, files.where
    if model.get("continuing_subword_prefix", "##") != "##":
        raise InputError(f"{where}: the mark of continued words is not '##'", mend="this tokenizer cannot be expressed")
    cut = (files.document.get("pre_tokenizer") or {}).get("type")
    normalizer = files.document.get("normalizer") or {}
    if cut != "BertPreTokenizer" or normalizer.get("type") != "BertNormalizer":
        kinds = f"{quoted(str(normalizer.get('type')))} and {quoted(str(cut))}"
        raise InputError(
            f"{where}: llama.cpp cuts words as BERT does, not by {kinds}", mend="this tokenizer cannot be expressed"
        )
    known = by_id(model.get("vocab"), where)
    tokens = [f"[PAD{number}]" if token is None else token for number, token in enumerate(known)]
    types = [TokenType.UNUSED if token is None else TokenType.NORMAL for token in known]
    place_added(tokens, types, list(files.added().values()))
    lowercase = bool(normalizer.get("lowercase", True))
    accents = normalizer.get("strip_accents")
    return Vocabulary(
        model="bert",
        pre="default",
        tokens=[
            _phantom(token) if kind is TokenType.NORMAL else token for token, kind in zip(tokens, types, strict=True)
        ],
        types=types,
        extra={
            "normalizer.lowercase": boolean(lowercase),
            "normalizer.strip_accents": boolean(lowercase if accents is None else bool(accents)),
        },
        adds={"sep": True},
    )


def _phantom(token: str) -> str:
    return token[2:] if token.startswith("##") and len(token) > 2 else f"▁{token}"
