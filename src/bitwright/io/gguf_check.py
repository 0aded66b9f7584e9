"""Hyper-parameters of a GGUF language model that no program should act on: well-formed, and absurd.

A reader of the container cannot know them to be wrong; llama.cpp stops the whole process for some. The bounds are its own
(512 blocks, 1024 experts, types of integers) where it has one, else far above any published model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bitwright.errors import InputError
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import GgufValue, ValueType
from bitwright.io.text import printable, quoted

__all__ = ["check_hyperparameters"]

_MEND = "the file is damaged or made by hand; download or convert it again"
_MAX_VOCABULARY = 2**22
#: an id that old converters write for "none"
_NO_TOKEN = 2**32 - 1
_TOKENS = "tokenizer.ggml.tokens"
_EMBEDDING = "token_embd.weight"
_BLOCK = re.compile(r"blk\.([0-9]+)\.")

#: key without the architecture -> least and largest value, and whether it must be there
_INTEGERS: Mapping[str, tuple[int, int, bool]] = {
    "block_count": (1, 512, True),
    "context_length": (1, 2**31 - 1, True),
    "embedding_length": (1, 2**20, True),
    "attention.key_length": (1, 2**16, False),
    "attention.value_length": (1, 2**16, False),
    "attention.sliding_window": (0, 2**31 - 1, False),
    "expert_count": (0, 1024, False),
    "rope.dimension_count": (0, 2**16, False),
    "vocab_size": (1, _MAX_VOCABULARY, False),
}
#: the same for keys that may also be arrays with one value per block
_PER_BLOCK: Mapping[str, tuple[int, int]] = {
    "feed_forward_length": (0, 2**24),
    "attention.head_count": (0, 2**16),
    "attention.head_count_kv": (0, 2**16),
    "expert_used_count": (0, 1024),
}
_FLOATS: Mapping[str, tuple[float, float]] = {
    "attention.layer_norm_epsilon": (0.0, 1.0),
    "attention.layer_norm_rms_epsilon": (0.0, 1.0),
    "rope.freq_base": (1e-6, 1e30),
    "rope.scaling.factor": (0.0, 1e9),
}


def check_hyperparameters(file: GgufFile) -> None:
    """Raise InputError, naming file and key, where a hyper-parameter is absurd or contradicts the tensors.

    For language models: ``block_count``, ``context_length`` and ``embedding_length`` must be there. Checked are types and ranges,
    that every block has tensors and no tensor a block beyond the last, heads and experts against each other, the sizes of
    vocabulary and embedding, and that special tokens are in the vocabulary.
    """
    _Check(file).run()


class _Check:
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._where = printable(str(file.path))
        self._architecture = file.get("general.architecture", str)

    def run(self) -> None:
        if not self._architecture:
            raise self._fault("general.architecture", "it is empty")
        found = {key: self._integer(self._own(key), *bounds) for key, bounds in _INTEGERS.items()}
        blocks = found["block_count"] or 0
        for key, (least, most) in _FLOATS.items():
            self._float(self._own(key), least, most)
        self._check_blocks(blocks)
        lists = {key: self._per_block(self._own(key), blocks, *bounds) for key, bounds in _PER_BLOCK.items()}
        self._check_heads(lists["attention.head_count"], lists["attention.head_count_kv"], found)
        self._check_experts(lists["expert_used_count"], found["expert_count"] or 0)
        self._check_vocabulary(found["vocab_size"], found["embedding_length"] or 0)

    def _own(self, key: str) -> str:
        return f"{self._architecture}.{key}"

    def _fault(self, key: str, message: str) -> InputError:
        return InputError(f"{self._where}, key {quoted(key)}: {message}", mend=_MEND)

    def _scalar(self, key: str, kind: ValueType) -> Any:
        found = self._file.values.get(key)
        if found is None:
            return None
        if found.type is not kind:
            raise self._fault(key, f"it is {found.kind}, {kind.name.lower()} is demanded")
        return found.value

    def _integer(self, key: str, least: int, most: int, demanded: bool) -> int | None:
        value = self._scalar(key, ValueType.U32)
        if value is None:
            if demanded:
                raise self._fault(key, "missing")
            return None
        if not least <= value <= most:
            raise self._fault(key, f"{value} is not from {least} to {most}")
        return int(value)

    def _float(self, key: str, least: float, most: float) -> None:
        value = self._scalar(key, ValueType.F32)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise self._fault(key, f"{value} is not from {least} to {most}")

    def _per_block(self, key: str, blocks: int, least: int, most: int) -> list[int]:
        """One value per block; empty where the key is missing."""
        found = self._file.values.get(key)
        if found is None:
            return []
        if found.type is ValueType.U32:
            values = [int(found.value)] * blocks
        elif found.element in (ValueType.U32, ValueType.I32):
            values = [int(value) for value in found.value[: blocks + 1]]
            if len(found.value) != blocks:
                raise self._fault(key, f"{len(found.value)} values for {blocks} blocks")
        else:
            raise self._fault(key, f"it is {found.kind}, u32 or an array of u32 or i32 is demanded")
        for value in values:
            if not least <= value <= most:
                raise self._fault(key, f"{value} is not from {least} to {most}")
        return values

    def _check_blocks(self, blocks: int) -> None:
        key = self._own("block_count")
        present: set[int] = set()
        for name in self._file.tensors:
            hit = _BLOCK.match(name)
            if hit is None:
                continue
            # a name has at most 63 bytes, so the number is short
            number = int(hit[1])
            if number >= blocks:
                raise self._fault(key, f"{blocks} blocks, tensor {quoted(name)} is of one beyond them")
            present.add(number)
        predicting = self._integer(self._own("nextn_predict_layers"), 0, blocks, False) or 0
        absent = next((number for number in range(blocks - predicting) if present and number not in present), None)
        if absent is not None:
            raise self._fault(key, f"{blocks} blocks, but no tensor is of block {absent}")

    def _check_heads(self, heads: list[int], shared: list[int], found: Mapping[str, int | None]) -> None:
        if not heads:
            return  # llama.cpp takes such a model as one without attention
        for count, key_count in zip(heads, shared or heads, strict=True):
            if count and found["attention.key_length"] is None and count > (found["embedding_length"] or 0):
                raise self._fault(self._own("attention.head_count"), f"{count} heads for fewer values")
            if count and key_count and count % key_count:
                raise self._fault(
                    self._own("attention.head_count_kv"), f"{key_count} does not divide the {count} heads of the block"
                )

    def _check_experts(self, used: list[int], experts: int) -> None:
        key = self._own("expert_used_count")
        if max(used, default=0) > experts:
            raise self._fault(key, f"{max(used)} of {experts} experts")
        if experts and not max(used, default=0):
            raise self._fault(key, f"none of {experts} experts is used")

    def _check_vocabulary(self, vocabulary: int | None, width: int) -> None:
        tokens = self._file.values.get(_TOKENS)
        size = vocabulary
        if tokens is not None:
            if tokens.element is not ValueType.STRING:
                raise self._fault(_TOKENS, f"it is {tokens.kind}, an array of strings is demanded")
            size = len(tokens.value)
            if not 1 <= size <= _MAX_VOCABULARY:
                raise self._fault(_TOKENS, f"{size} tokens, 1 to {_MAX_VOCABULARY} make sense")
            self._check_beside_tokens(size)
        embedding = self._file.tensors.get(_EMBEDDING)
        if embedding is not None:
            key = _TOKENS if tokens is not None else self._own("vocab_size")
            if size is not None and embedding.rows != size:
                raise self._fault(key, f"{size} tokens, {_EMBEDDING} has {embedding.rows} rows")
            if embedding.columns != width:
                key = self._own("embedding_length")
                raise self._fault(key, f"{width}, {_EMBEDDING} has {embedding.columns} columns")
            size = embedding.rows
        for key, value in self._special_tokens():
            if value.type is not ValueType.U32:
                raise self._fault(key, f"it is {value.kind}, u32 is demanded")
            none = value.value == _NO_TOKEN and not key.endswith((".bos_token_id", ".eos_token_id"))
            if size is not None and value.value >= size and not none:
                raise self._fault(key, f"token {value.value}, the vocabulary has {size}")

    def _check_beside_tokens(self, size: int) -> None:
        for key, kinds in (
            ("tokenizer.ggml.scores", (ValueType.F32,)),
            ("tokenizer.ggml.token_type", (ValueType.I32, ValueType.U32)),
        ):
            found = self._file.values.get(key)
            if found is None:
                continue
            if found.element not in kinds:
                raise self._fault(key, f"it is {found.kind}, an array of {kinds[0].name.lower()} is demanded")
            if len(found.value) < size:
                raise self._fault(key, f"{len(found.value)} values for {size} tokens")
            if key.endswith("scores") and not np.isfinite(found.value).all():
                raise self._fault(key, "a score is NaN or infinite")

    def _special_tokens(self) -> Iterator[tuple[str, GgufValue]]:
        for key, value in self._file.values.items():
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
                yield key, value
