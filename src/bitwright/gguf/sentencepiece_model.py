"""Reads ``tokenizer.model``, SentencePiece's file: a protocol buffer of which only the vocabulary and a few switches are wanted.

A small strict reader of our own, because the file comes from a stranger: lengths are checked against what is left, numbers are at most ten
bytes, unknown fields are skipped by their wire type. Field numbers: ``sentencepiece_model.proto`` (Apache 2.0).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import InputError
from bitwright.io.files import read_small_file
from bitwright.io.text import printable

__all__ = ["SentencePieceModel", "read_sentencepiece"]

_MAX_BYTES = 64 * 2**20
_VARINT, _WIDE, _BYTES, _NARROW = 0, 1, 2, 5
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SentencePieceModel:
    """pieces: (text, score, type) by id; types as in GGUF. kind: unigram, bpe, word or char. ids: special tokens, -1 for none."""

    pieces: tuple[tuple[str, float, int], ...]
    kind: str
    ids: dict[str, int]
    charsmap: bytes
    add_prefix: bool
    remove_spaces: bool
    suffix_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The vocabulary and switches of a ``tokenizer.model``. InputError where the file is no such thing."""
    where = printable(str(path))
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(read_small_file(path, max_bytes=_MAX_BYTES)):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer |= dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer |= dict(_fields(value))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: no SentencePiece model: {error}", mend="download it again") from error
    kind = _KINDS.get(_number(trainer.get(3, 1)))
    if not pieces or kind is None:
        raise InputError(f"{where}: no SentencePiece model: no vocabulary in it", mend="download it again")
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=kind,
        ids={
            "unk": _number(trainer.get(40, 0)),
            "bos": _number(trainer.get(41, 1)),
            "eos": _number(trainer.get(42, 2)),
            "pad": _number(trainer.get(43, -1)),
        },
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_prefix=bool(normalizer.get(3, 1)),
        remove_spaces=bool(normalizer.get(4, 1)),
        suffix_spaces=bool(trainer.get(24, 0)),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not math.isfinite(score) or not 1 <= kind <= 6:
        raise ValueError("a piece with a faulty score or type")
    return text, score, kind


def _number(value: int | bytes) -> int:
    """A varint as the signed 32-bit number that it is for these fields."""
    if not isinstance(value, int):
        raise InputError("a number of the SentencePiece model is no number", mend="download it again")
    low = value & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: whole numbers, or the bytes of everything else. ValueError where it ends too early."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError(f"field 0 at byte {place}")
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == _BYTES:
            length, place = _varint(data, place)
        elif wire in (_WIDE, _NARROW):
            length = 8 if wire == _WIDE else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if length > len(data) - place:
            raise ValueError(f"{length} bytes wanted at byte {place}, {len(data) - place} left")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), place
    raise ValueError(f"a number of more than ten bytes at byte {place}")
