"""A GGUF file as a transformers model: its blocks decoded, its settings and tokenizer read from its header."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bitwright.gguf.to_hf import HfView
from bitwright.io.gguf_check import check_hyperparameters
from bitwright.io.gguf_file import GgufFile
from bitwright.model.blocks import BlockRunner
from bitwright.model.names import map_names
from bitwright.model.skeleton import build_skeleton

__all__ = ["gguf_folder", "load_gguf"]


@contextmanager
def gguf_folder(path: Path) -> Iterator[Path]:
    """A temporary folder with what the file says besides weights: ``config.json`` and the tokenizer."""
    with GgufFile.open(path) as file, tempfile.TemporaryDirectory(prefix="bitwright-gguf-") as name:
        check_hyperparameters(file)
        yield _write_header(HfView(file), Path(name))


def _write_header(view: HfView, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(dict(view.config)), encoding="utf-8")
    view.write_tokenizer(folder)
    return folder


def load_gguf(path: Path, *, dtype: torch.dtype | None = None) -> Any:
    """A transformers causal language model in eval mode, its weights decoded from the file.

    dtype: of weights and activations (default: float32). Raises InputError for files that are damaged, absurd or of an architecture that
    is not known.
    """
    wanted = dtype or torch.float32
    with GgufFile.open(path) as file, tempfile.TemporaryDirectory(prefix="bitwright-gguf-") as name:
        check_hyperparameters(file)
        view = HfView(file, dtype=wanted)
        skeleton = build_skeleton(_write_header(view, Path(name)), dtype=wanted)
        names = map_names(skeleton, view.tensors)
        BlockRunner(skeleton, names, view, wanted).fill("", skeleton.model)
        skeleton.model.tie_weights()
        return skeleton.model.eval()
