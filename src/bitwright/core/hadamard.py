"""Hadamard matrices: entries +1 and -1, rows orthogonal, ``H Hᵀ = n I``.

Sylvester's construction doubles: ``H_2n = [[H, H], [H, -H]]``. Paley's takes the quadratic residues of a prime q: order ``q + 1``
where q leaves 3 on division by 4, order ``2 (q + 1)`` where it leaves 1 (R. E. A. C. Paley, "On orthogonal matrices", 1933). Kronecker
products of Hadamard matrices are Hadamard matrices, so that orders such as 1536 = 128 x 12, 5120 = 256 x 20 or 3584 = 128 x 28 need no
table.
"""

from __future__ import annotations

import torch

__all__ = ["hadamard", "hadamard_orders", "paley"]

#: Powers of two are split into factors of at most this order, so that a product costs little.
_LARGEST_POWER = 64


def hadamard_orders(n: int) -> tuple[int, ...] | None:
    """Orders whose Kronecker product has order ``n``: powers of two up to 64 and at most one Paley order; None where none is known.

    >>> hadamard_orders(4096), hadamard_orders(1536), hadamard_orders(96), hadamard_orders(6)
    ((64, 64), (64, 2, 12), (8, 12), None)
    """
    power, odd = 1, n
    while odd > 0 and odd % 2 == 0:
        power, odd = power * 2, odd // 2
    if odd == 1:
        return _powers(power) or (1,)
    order = 4 * odd
    while n % order == 0:
        if _paley_prime(order) is not None:
            return (*_powers(n // order), order)
        order *= 2
    return None


def hadamard(order: int) -> torch.Tensor:
    """``(order, order)`` float64 of +1 and -1, first row and first column all +1; order is a power of two or of Paley's kind.

    >>> hadamard(4).int().tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    if order & (order - 1):
        return paley(order)
    found = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(found) < order:
        found = torch.kron(step, found)
    return found


def paley(order: int) -> torch.Tensor:
    """Paley's matrix of an order ``q + 1`` or ``2 (q + 1)``, normalized: first row and first column all +1.

    >>> matrix = paley(12)
    >>> bool((matrix @ matrix.T == 12 * torch.eye(12)).all())
    True
    """
    q = _paley_prime(order)
    assert q is not None, order
    residues = torch.zeros(q, dtype=torch.float64)
    residues[1:] = -1.0
    residues[torch.arange(1, q).square() % q] = 1.0
    numbers = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    core[1:, 1:] = residues[(numbers.unsqueeze(0) - numbers.unsqueeze(1)) % q]
    eye = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        found = eye + core
    else:
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        found = torch.kron(core, plus) + torch.kron(eye, minus)
    found = found * found[0]
    return found * found[:, :1]


def _powers(power: int) -> tuple[int, ...]:
    found = []
    while power > 1:
        found.append(min(power, _LARGEST_POWER))
        power //= found[-1]
    return tuple(found)


def _paley_prime(order: int) -> int | None:
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    half = order // 2 - 1
    return half if order % 2 == 0 and _is_prime(half) and half % 4 == 1 else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
