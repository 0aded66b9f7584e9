"""The Source and Sink contracts: lazy reads of single tensors, and writes of planned tensors in any order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from bitwright.core.tensor import TensorSpec

__all__ = ["Sink", "Source"]


class Source(Protocol):
    """A checkpoint that can be read tensor by tensor. Names are those on disk."""

    @property
    def path(self) -> Path:
        """Where the checkpoint lies, for messages."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed ``config.json``."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor's name, shape and dtype, in the order of the files; from headers alone."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One tensor (or rows ``start .. stop`` of its first axis) in its stored dtype, freshly allocated."""

    def fingerprint(self) -> Mapping[str, str]:
        """File name -> a short string that changes when the file does (size, mtime, header hash)."""


class Sink(Protocol):
    """A checkpoint being written. Nothing is visible at the output path before it is whole."""

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Store ``tensor`` as (part of) the planned tensor ``name``, from row ``row`` of its first axis on."""

    def sync(self) -> None:
        """Return only when everything written so far is on the disk."""
