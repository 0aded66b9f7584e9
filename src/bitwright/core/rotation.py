"""Rotations: orthogonal matrices Q that multiply row vectors from the right, kept as products of small factors.

A rotation that keeps the ones vector (``1 Q = 1``) also keeps the mean of every vector, and so commutes with LayerNorm's subtraction of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bitwright.core.hadamard import hadamard, hadamard_orders
from bitwright.core.linalg import one_thread
from bitwright.errors import PlanError

__all__ = ["Rotation", "hadamard_rotation", "random_rotation"]


@dataclass(frozen=True, eq=False)
class _Stage:
    """Multiply by signs, then by the Kronecker product of orthogonal factors. signs: ``(width,)`` float64 or None."""

    signs: torch.Tensor | None
    factors: tuple[torch.Tensor, ...]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        if self.signs is not None:
            x = x * self.signs
        after = shape[-1]
        for factor in self.factors:
            after //= len(factor)
            x = x.reshape(-1, len(factor), after)
            x = torch.matmul(factor.T, x) if after > 1 else x.squeeze(-1) @ factor
        return x.reshape(shape)


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal ``(width, width)`` matrix."""

    width: int
    stages: tuple[_Stage, ...]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q`` for ``(..., width)`` float64."""
        for stage in self.stages:
            x = stage.apply(x)
        return x

    def matrix(self) -> torch.Tensor:
        """Q itself, float64."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


def hadamard_rotation(width: int, *, rng: torch.Generator, keep_ones: bool = False) -> Rotation:
    """A randomized Hadamard matrix (arXiv:2404.00456, section 3): random signs, then ``H / sqrt(width)``.

    keep_ones: ``Hᵀ D H / width`` with random signs D, the first of which is +1; H's first row is all ones, so ``1 Hᵀ`` is a multiple of the
    first unit vector, which D keeps. Raises PlanError where no Hadamard matrix of this order is known here.
    """
    orders = hadamard_orders(width)
    if orders is None:
        raise PlanError(
            f"no Hadamard matrix of order {width} is known here",
            mend="use the option kind=random, whose matrix exists for every width",
        )
    factors = tuple(hadamard(order) / math.sqrt(order) for order in orders)
    signs = torch.randint(0, 2, (width,), generator=rng).double() * 2 - 1
    if not keep_ones:
        return Rotation(width, (_Stage(signs, factors),))
    signs[0] = 1.0
    return Rotation(width, (_Stage(None, tuple(f.T.contiguous() for f in factors)), _Stage(signs, factors)))


def random_rotation(width: int, *, rng: torch.Generator, keep_ones: bool = False) -> Rotation:
    """An orthogonal matrix drawn uniformly (QR of a Gaussian matrix); keep_ones: uniformly among those that keep the ones vector."""
    size = width - 1 if keep_ones else width
    with one_thread():
        q, r = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
        q = q * r.diagonal().sign()
        if keep_ones:
            # The reflection that swaps the first unit vector and the ones vector brings the rotation of the others in place.
            v = torch.full((width, 1), -1 / math.sqrt(width), dtype=torch.float64)
            v[0] += 1.0
            swap = torch.eye(width, dtype=torch.float64)
            if width > 1:
                swap -= 2 / v.square().sum() * (v @ v.T)
            whole = torch.eye(width, dtype=torch.float64)
            whole[1:, 1:] = q
            q = swap @ whole @ swap
    return Rotation(width, (_Stage(None, (q,)),))
