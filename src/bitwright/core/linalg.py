"""Factorizations whose bits do not depend on the thread count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread", "upper_factor"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run LAPACK on one thread: the summation order of a threaded factorization depends on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def upper_factor(h: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with ``U Uᵀ = h``, or None where h is not positive definite.

    h: ``(n, n)`` float32 symmetric. Tried in float32 first, then in float64: an ill-conditioned h whose float32 factorization
    breaks down can still be positive definite (see tests/unit/core/test_linalg.py for one). The result is float32.

    >>> upper_factor(torch.tensor([[2.0, 1.0], [1.0, 1.0]])).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    # Reversing rows and columns turns a lower factor into an upper one.
    for dtype in (torch.float32, torch.float64):
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1).to(dtype))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            upper: torch.Tensor = lower.flip(0, 1).float()
            return upper
    return None
