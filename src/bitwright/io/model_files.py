"""What lies beside the weights of a model folder: its config, tokenizer and the other files that an output keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.errors import InputError
from bitwright.io.files import os_error
from bitwright.io.strict import load_json
from bitwright.io.text import printable, quoted

__all__ = [
    "already_quantized",
    "list_files",
    "load_config",
    "refuse_remote_code",
    "side_files",
    "tokenizer_vocab_size",
]

_SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
#: code, weights and pickles, whatever their name begins with
_NEVER = {
    *(".py", ".pyc", ".so", ".sh"),
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npy", ".npz"),
    *(".pkl", ".pickle", ".joblib"),
}
_CONFIG_BYTES = 16 * 2**20


def list_files(folder: Path) -> list[Path]:
    """The regular files of a folder (also through symbolic links), sorted by name; raises InputError if unreadable."""
    try:
        if not folder.is_dir():
            fault = "not a folder" if folder.exists() else "no such folder"
            raise InputError(f"{printable(str(folder))}: {fault}", mend="name a folder with config.json and weights")
        return sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise os_error(error, printable(str(folder))) from error


def load_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, parsed strictly. Raises InputError if missing or not an object."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{printable(str(folder))}: no config.json", mend="name the folder of a transformers model")
    config = load_json(path, max_bytes=_CONFIG_BYTES, allow_infinity=True)
    if not isinstance(config, dict):
        raise InputError(f"{printable(str(path))}: not an object", mend="check the download")
    return config


def refuse_remote_code(config: Mapping[str, Any], path: Path, trust_remote_code: bool = False) -> None:
    """Raise InputError if ``config`` (of the model at ``path``) asks for code from the model folder, at any depth."""
    if trust_remote_code:
        return
    for value in _find(config, {"auto_map"}):
        if value:
            raise InputError(
                f"{printable(str(path))}: config.json has 'auto_map': the model brings its own code, which is not run",
                mend="use a model that transformers itself knows; bitwright runs no code from checkpoints",
            )


def already_quantized(config: Mapping[str, Any]) -> str | None:
    """The method by which a checkpoint is already quantized, or None.

    >>> already_quantized({"text_config": {"quantization_config": {"quant_method": "gptq"}}})
    'gptq'
    """
    for value in _find(config, {"quantization_config", "compression_config"}):
        if value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            return printable(method) if isinstance(method, str) and method else "unknown"
    return None


def _find(value: Any, keys: set[str]) -> Iterator[Any]:
    """Values under any of ``keys``, at any depth, outer ones first."""
    level = [value]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                yield from (item[key] for key in item if key in keys)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below


def tokenizer_vocab_size(folder: Path) -> int | None:
    """Highest token id plus one according to ``tokenizer.json`` with its added tokens; None if there is none.

    Raises InputError where the file is not a tokenizer's.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    where = printable(str(path))
    document = load_json(path)
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"{where}: no model in it", mend="check the download")
    vocab, added = model.get("vocab", {}), document.get("added_tokens") or []
    if isinstance(vocab, list):  # Unigram: the position is the id
        highest = len(vocab) - 1
    elif isinstance(vocab, dict) and all(_is_id(token) for token in vocab.values()):
        highest = max(vocab.values(), default=-1)
    else:
        raise InputError(f"{where}: the vocabulary is not a map of tokens to ids", mend="check the download")
    if not isinstance(added, list):
        raise InputError(f"{where}: added_tokens is not a list", mend="check the download")
    for token in added:
        if not isinstance(token, dict) or not _is_id(token.get("id")):
            raise InputError(f"{where}: an added token without an id: {quoted(str(token))}", mend="check the download")
        highest = max(highest, token["id"])
    return highest + 1


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def side_files(path: Path) -> list[Path]:
    """The files of the model folder ``path`` that belong into an output as they are, sorted by name.

    Tokenizer, generation and preprocessor settings, licence; never weights, code, README or config.json.
    """
    return [
        file
        for file in list_files(path)
        if any(fnmatchcase(file.name, pattern) for pattern in _SIDE_FILES) and file.suffix.lower() not in _NEVER
    ]
