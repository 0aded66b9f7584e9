"""Upper factors against float64, and a matrix that float32 cannot factorise."""

from __future__ import annotations

import pytest
import torch

from bitwright.core.linalg import one_thread, upper_factor


def positive_definite(n: int, *, seed: int = 0, tokens: int = 3) -> torch.Tensor:
    x = torch.randn(tokens * n, n, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_upper_factor_times_its_transpose_is_the_matrix(n):
    h = positive_definite(n)
    before = h.clone()
    u = upper_factor(h)
    assert u is not None
    assert u.dtype == torch.float32
    assert torch.equal(u, u.triu())
    assert (u.diagonal() > 0).all()
    torch.testing.assert_close(u.double() @ u.double().T, h.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(h, before)


def test_upper_factor_is_the_inverse_transpose_of_the_inverse_s_lower_factor():
    h = positive_definite(24).double()
    # GPTQ's usual matrix: the upper Cholesky factor C of inv(H), inv(H) = Cᵀ C. Then H = C⁻¹ C⁻ᵀ, so U = C⁻¹.
    c = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    u = upper_factor(h.float())
    assert u is not None
    torch.testing.assert_close(u.double(), torch.linalg.inv(c), rtol=1e-4, atol=1e-5)


def cassini() -> list[torch.Tensor]:
    """[[F(n-1), F(n)], [F(n), F(n+1)]] of Fibonacci numbers below 2^24 and the same turned round, n even.

    Cassini's identity makes every determinant exactly 1: positive definite, with a last pivot of 1 / F, far below what float32
    keeps of numbers as large as F.
    """
    fibonacci = [1, 1]
    while len(fibonacci) < 36:
        fibonacci.append(fibonacci[-2] + fibonacci[-1])
    found = []
    for n in range(25, 35, 2):  # fibonacci[0] is F(1)
        a, b, c = fibonacci[n - 1 : n + 2]
        assert a * c - b * b == 1
        assert c < 2**24
        found += [
            torch.tensor([[a, b], [b, c]], dtype=torch.float32),
            torch.tensor([[c, b], [b, a]], dtype=torch.float32),
        ]
    return found


def breaks_float32(h: torch.Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(h.flip(0, 1))[1]) != 0


def test_float64_takes_over_where_float32_breaks_down():
    broken = [h for h in cassini() if breaks_float32(h)]
    assert broken, "float32 factorised every one of them: find harder matrices"
    for h in broken:
        u = upper_factor(h)
        assert u is not None
        assert u.dtype == torch.float32
        torch.testing.assert_close(u.double() @ u.double().T, h.double(), rtol=1e-6, atol=0)
        # det(h) = 1 = (u00 u11)^2, which only the float64 factor knows.
        assert float(u[0, 0]) * float(u[1, 1]) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    "h",
    [[[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, float("nan")], [float("nan"), 1.0]], [[-1.0]]],
    ids=["indefinite", "zero", "nan", "negative"],
)
def test_what_is_not_positive_definite_has_no_factor(h):
    assert upper_factor(torch.tensor(h)) is None


def test_one_thread_puts_the_thread_count_back():
    before = torch.get_num_threads()

    def fail():
        with one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
