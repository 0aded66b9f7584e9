"""Hadamard matrices and rotations, against their definitions."""

import pytest
import scipy.linalg
import torch

from bitwright.core.hadamard import hadamard, hadamard_orders, paley
from bitwright.core.rotation import hadamard_rotation, random_rotation
from bitwright.errors import PlanError

#: hidden sizes and head widths of published models
WIDTHS = [64, 80, 96, 112, 120, 128, 256, 512, 576, 768, 896, 960, 1024, 1152, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 4544, 5120,
          5376, 6144, 6656, 7168, 8192]  # fmt: skip


@pytest.mark.parametrize("order", [12, 20, 24, 28, 36, 44, 48, 60, 68, 76, 84, 104, 180])
def test_paley_matrices_are_hadamard_matrices(order):
    matrix = paley(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert bool((matrix[0] == 1).all())
    assert bool((matrix[:, 0] == 1).all())


@pytest.mark.parametrize("order", [1, 2, 8, 64])
def test_powers_of_two_follow_sylvester(order):
    assert hadamard(order).tolist() == scipy.linalg.hadamard(order).tolist()


def test_widths_of_published_models_have_hadamard_matrices():
    for width in WIDTHS:
        orders = hadamard_orders(width)
        assert orders is not None, width
        assert torch.tensor(orders).prod() == width


@pytest.mark.parametrize("make", [hadamard_rotation, random_rotation])
@pytest.mark.parametrize("keep_ones", [False, True])
@pytest.mark.parametrize("width", [2, 12, 64, 96, 320])
def test_rotations_are_orthogonal_and_spread_a_single_channel(make, keep_ones, width):
    q = make(width, rng=torch.Generator().manual_seed(1), keep_ones=keep_ones).matrix()
    assert torch.allclose(q @ q.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    if keep_ones:
        assert torch.allclose(q.sum(0), torch.ones(width, dtype=torch.float64), atol=1e-12)
    if width >= 64:
        # An orthogonal matrix with a channel left alone has an entry of 1.
        assert float(q.abs().max()) < 6 / width**0.5


@pytest.mark.parametrize("make", [hadamard_rotation, random_rotation])
def test_rotations_follow_from_the_seed_alone(make):
    first, same, other = (make(48, rng=torch.Generator().manual_seed(seed)).matrix() for seed in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)


def test_products_of_factors_are_kronecker_products():
    rotation = hadamard_rotation(1536, rng=torch.Generator().manual_seed(0))
    assert hadamard_orders(1536) == (64, 2, 12)
    whole = torch.kron(torch.kron(hadamard(64), hadamard(2)), paley(12)) / 1536**0.5
    signs = torch.randint(0, 2, (1536,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    assert torch.allclose(rotation.matrix(), signs.unsqueeze(1) * whole, atol=1e-12)


def test_random_rotations_are_uniform():
    """A uniformly drawn rotation turns a fixed vector into one whose first channel has variance 1 / width."""
    rng = torch.Generator().manual_seed(0)
    first = torch.stack([random_rotation(8, rng=rng).matrix()[0, 0] for _ in range(4000)])
    assert abs(float(first.mean())) < 4 * (1 / 8 / 4000) ** 0.5
    assert abs(float(first.square().mean()) * 8 - 1) < 0.1


def test_widths_without_a_known_matrix_are_refused():
    with pytest.raises(PlanError, match="order 52"):
        hadamard_rotation(52, rng=torch.Generator())
