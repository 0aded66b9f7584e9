"""Tiny checkpoints with a tokenizer and a text, and the command line run in this process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bitwright.cli.main import main
from tests.zoo import VOCAB, make

EXAMPLES = Path(__file__).parents[1] / "examples"
STORY = EXAMPLES / "storylm-8m"
STORY_TEXT = EXAMPLES / "storylm-8m-selfgen.txt"


def add_tokenizer(folder: Path, *, template: str | None = None, extra_tokens: int = 0) -> None:
    """A byte-level tokenizer without merges: every byte is one token, ids 0 to 255."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    vocab |= {f"extra{index}": VOCAB + index for index in range(extra_tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 100000}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def add_text(folder: Path, characters: int = 4000) -> Path:
    """A text file beside the model folders."""
    file = folder / "text.txt"
    file.write_text(STORY_TEXT.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return file


def make_model(name: str, folder: Path, **options: object) -> Path:
    """A zoo model with its tokenizer."""
    make(name, folder, **options)  # type: ignore[arg-type]
    add_tokenizer(folder)
    return folder


def run(*arguments: object) -> int:
    """The command line, in this process."""
    return main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, for every file below the folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def left_over(output: Path) -> list[str]:
    """What a run has left at or beside its output path."""
    return sorted(file.name for file in output.parent.iterdir() if output.name in file.name)
