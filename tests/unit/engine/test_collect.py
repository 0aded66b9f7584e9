"""Gram products whose bits do not depend on the thread count."""

import pytest
import torch

from bitwright.engine.collect import fast_accumulate


@pytest.mark.parametrize("columns", [64, 128, 256, 384, 768, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_the_same_for_every_number_of_threads(columns, dtype):
    x = torch.randn(2500, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            into = torch.zeros(columns, columns)
            fast_accumulate(into, x, x)
            found.append(into)
    finally:
        torch.set_num_threads(before)
    exact = x.double().T @ x.double()
    assert (found[0] - exact).abs().max() < 1e-5 * exact.abs().max()
    assert all(torch.equal(matrix, found[0]) for matrix in found)
