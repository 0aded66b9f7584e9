"""Rotation: the residual stream, and the values of each attention head, in another orthonormal basis (arXiv:2404.00456, arXiv:2405.16406).

With an orthogonal Q, every matrix that writes to the residual stream is multiplied by Q and every matrix that reads it by ``Qᵀ``; RMSNorm
commutes with Q once its weight is folded into the matrices behind it. The same is done per head between the values and the output
projection. The model computes what it computed before, but outliers that sat in a few channels are spread over all of them. This is the
part that needs nothing at run time; the papers' online rotations inside the MLP and of queries and keys are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.rotation import Rotation, hadamard_rotation, random_rotation
from bitwright.core.transform import ModelTransform
from bitwright.errors import InputError

__all__ = ["TRANSFORM", "Rotate"]


@dataclass(frozen=True, kw_only=True)
class Rotate(ModelTransform):
    """kind: ``hadamard`` (randomized, fast) or ``random`` (any width, slow for wide models). values: rotate values per head too."""

    name: ClassVar[str] = "rotate"

    kind: str = "hadamard"
    values: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random"):
            raise InputError(f"rotate: kind '{self.kind}' is unknown", mend="use hadamard or random")

    def stream_rotation(self, width: int, *, rng: torch.Generator, keep_ones: bool) -> Rotation:
        """The residual stream's rotation."""
        make = hadamard_rotation if self.kind == "hadamard" else random_rotation
        return make(width, rng=rng, keep_ones=keep_ones)

    def head_rotation(self, head_dim: int, *, rng: torch.Generator) -> Rotation | None:
        """That of the values of every head."""
        if not self.values:
            return None
        make = hadamard_rotation if self.kind == "hadamard" else random_rotation
        return make(head_dim, rng=rng)


TRANSFORM = Rotate
