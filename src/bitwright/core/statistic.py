"""The Statistic contract: what is accumulated over the inputs of a layer, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch

from bitwright.errors import InputError

__all__ = ["Statistic"]


@dataclass
class Statistic(ABC):
    """Base of all statistics. count: tokens seen so far."""

    name: ClassVar[str]
    columns: int
    count: int = field(default=0, init=False)

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.columns:
            raise InputError(f"{self.name} expects (tokens, {self.columns}), got {tuple(x.shape)}")

    @abstractmethod
    def update(self, x: torch.Tensor) -> None:
        """Add ``(tokens, columns)`` activations."""

    def _check_same(self, other: Statistic, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        # Shapes that broadcast would merge silently.
        if type(self) is not type(other) or mine.shape != theirs.shape:
            raise InputError(f"{self.name} of {tuple(mine.shape)} cannot merge {other.name} of {tuple(theirs.shape)}")

    def _check_like(self, other: Statistic) -> None:
        if type(self) is not type(other) or self.columns != other.columns:
            raise InputError(f"{self.name} of {self.columns} columns cannot merge {other.name} of {other.columns}")

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add what another instance has seen."""
