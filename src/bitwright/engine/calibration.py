"""Calibration tokens: from a text file, JSONL, a dataset, or sampled from the model itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitwright.engine.recipe import Calibration
from bitwright.errors import HubError, InputError

__all__ = [
    "BATCH_TOKENS",
    "CalibrationTokens",
    "load_texts",
    "load_tokenizer",
    "tokens_from_texts",
    "tokens_from_windows",
]

#: tokens that run through a block at a time
BATCH_TOKENS = 2048
#: fewer tokens than this make poor statistics: a warning, not an error
_FEW_TOKENS = 16_384
#: fewer than this make none
_TOO_FEW = 64


@dataclass(frozen=True)
class CalibrationTokens:
    """Token ids in batches of equal length, and where they came from.

    batches: ``(batch, length)`` int64 each. count: tokens in all. origin: the file or "model samples". digest: SHA-256 of the ids.
    """

    batches: tuple[torch.Tensor, ...]
    origin: str
    digest: str
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Tokens truly used."""
        return sum(batch.numel() for batch in self.batches)

    @property
    def sequences(self) -> int:
        """Windows or rows."""
        return sum(len(batch) for batch in self.batches)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder. Raises InputError where there is none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise InputError(
            f"{path}: no usable tokenizer: {reason}", mend="copy the tokenizer files into the folder"
        ) from error


def load_texts(calibration: Calibration) -> list[str]:
    """The raw texts. Raises InputError for files that yield none (before any model is loaded)."""
    name = calibration.text
    if name is None:
        raise InputError("no calibration text is named")
    if name.startswith("dataset:"):
        texts = _dataset_texts(name.removeprefix("dataset:"), calibration.field)
    else:
        path = Path(name)
        if path.is_dir():
            texts = _dataset_texts(name, calibration.field)
        else:
            texts = _file_texts(path, calibration)
    if not any(text.strip() for text in texts):
        raise InputError(f"{name}: holds no text", mend="give a text of some thousand words")
    return texts


def _file_texts(path: Path, calibration: Calibration) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", mend="check the path of the calibration text") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})", mend="convert it to UTF-8") from error
    if path.suffix not in (".jsonl", ".ndjson"):
        return [text] if calibration.packing == "pack" else [part for part in text.split("\n") if part.strip()]
    texts: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON", mend="one JSON object a line") from error
        value = row.get(calibration.field) if isinstance(row, dict) else None
        if isinstance(value, list):
            texts.append(json.dumps(value))
        elif isinstance(value, str):
            texts.append(value)
        else:
            have = ", ".join(sorted(row)[:8]) if isinstance(row, dict) else type(row).__name__
            raise InputError(
                f"{path}, line {number}: no text in field '{calibration.field}' (has: {have})",
                mend="name the field with --calibration-field",
            )
    return texts


def _dataset_texts(name: str, field: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "datasets are read with the 'datasets' package", mend="pip install bitwright[datasets]"
        ) from error
    if Path(name).is_dir():
        try:
            data = datasets.load_from_disk(name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{name}: not a dataset that was saved to disk: {error}", mend="check the folder"
            ) from error
    else:
        repo, _, split = name.partition(":")
        try:
            data = datasets.load_dataset(repo, split=split or "train")
        except (OSError, ValueError, ConnectionError) as error:
            raise HubError(
                f"dataset {repo} could not be loaded: {error}", mend="check the name and the network"
            ) from error
    if isinstance(data, dict):
        data = data[next(iter(data))]
    if field not in data.column_names:
        raise InputError(
            f"{name}: no column '{field}' (has: {', '.join(data.column_names)})", mend="--calibration-field"
        )
    return [json.dumps(text) if isinstance(text, list) else str(text) for text in data[field]]


def _ids(tokenizer: Any, text: str, calibration: Calibration) -> list[int]:
    if not calibration.chat_template:
        ids = tokenizer(text, add_special_tokens=calibration.special_tokens, verbose=False)["input_ids"]
        return [int(i) for i in ids]
    messages = [{"role": "user", "content": text}]
    if text.startswith("["):
        try:
            messages = json.loads(text)
        except ValueError:
            messages = [{"role": "user", "content": text}]
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template", mend="drop the chat_template option")
    import jinja2

    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.exceptions.SecurityError as error:
        raise InputError(
            f"the chat template tries something unsafe: {error}", mend="use a template you trust"
        ) from error
    # A template is a program: it can divide by zero, index past an end, recurse without one.
    except (
        *(jinja2.exceptions.TemplateError, TypeError, LookupError, ValueError, ArithmeticError),
        *(AttributeError, RecursionError),
    ) as error:
        raise InputError(
            f"the chat template cannot be rendered: {str(error) or type(error).__name__}",
            mend="check the template and the text",
        ) from error
    return [int(i) for i in tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]]


def tokens_from_texts(
    texts: Sequence[str], tokenizer: Any, calibration: Calibration, *, seed: int, vocab_size: int, origin: str
) -> CalibrationTokens:
    """Windows or rows of token ids, chosen by ``seed``. Raises InputError where the text yields too few tokens."""
    rows = [_ids(tokenizer, text, calibration) for text in texts]
    total = sum(len(row) for row in rows)
    if total < _TOO_FEW:
        raise InputError(
            f"{origin}: only {total} tokens of text, {_TOO_FEW} are the least",
            mend="give a text of some thousand words",
        )
    if calibration.packing == "pack":
        joined = [i for row in rows for i in row]
        length = min(calibration.length, len(joined))
        windows = [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]
    else:
        windows = [row[: calibration.length] for row in rows if row]
    if calibration.shuffle and len(windows) > calibration.samples:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
        windows = [windows[i] for i in order[: calibration.samples]]
    return tokens_from_windows(windows[: calibration.samples], calibration, vocab_size=vocab_size, origin=origin)


def tokens_from_windows(
    windows: Sequence[Sequence[int]], calibration: Calibration, *, vocab_size: int, origin: str
) -> CalibrationTokens:
    """Batches of about 2048 tokens from windows; windows of different lengths never share a batch, so nothing is padded."""
    largest = max(max(window) for window in windows)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer makes id {largest}, the model has a vocabulary of {vocab_size}",
            mend="use the tokenizer that belongs to this model",
        )
    batches: list[torch.Tensor] = []
    pending: list[Sequence[int]] = []
    for window in windows:
        if pending and (len(pending[0]) != len(window) or (len(pending) + 1) * len(window) > BATCH_TOKENS):
            batches.append(torch.tensor(pending, dtype=torch.int64))
            pending = []
        pending.append(window)
    batches.append(torch.tensor(pending, dtype=torch.int64))
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(tuple(batch.shape)).encode())
        digest.update(batch.numpy().tobytes())
    count = sum(batch.numel() for batch in batches)
    notes: list[str] = []
    if count < _FEW_TOKENS:
        notes.append(f"only {count} calibration tokens; statistics are steadier with {_FEW_TOKENS} or more")
    if len(windows) < calibration.samples:
        notes.append(f"the text yields {len(windows)} samples of the {calibration.samples} asked for")
    return CalibrationTokens(tuple(batches), origin, digest.hexdigest(), tuple(notes))
