"""GPTQ on Gram matrices that cannot be factorized, through the engine's own context."""

import pytest
import torch

from bitwright import catalog
from bitwright.core.method import Context
from bitwright.core.stats import Gram
from bitwright.errors import NumericError
from bitwright.methods.gptq import Gptq
from bitwright.schemes.affine import Affine

SCHEME = Affine(bits=4, group_size=32, scale_dtype="float32")


def _context(strict=False):
    return Context(
        feedback=catalog.load("kernels", "numba-feedback"),
        tile_sums=catalog.load("kernels", "numba-tiles"),
        strict=strict,
    )


def _gram(lowest):
    """A symmetric matrix with this lowest eigenvalue and a mean diagonal near one."""
    basis, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    values = torch.ones(64, dtype=torch.float64)
    values[0] = lowest
    gram = Gram(64)
    gram.matrix = (basis * values @ basis.T).float()
    gram.count = 1000
    return gram


@pytest.fixture
def weight():
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(4))


# Damping d times the mean diagonal lifts the lowest eigenvalue: -0.3 needs d > 0.3, so 0.01 raised tenfold twice.
@pytest.mark.parametrize(("lowest", "damping"), [(0.5, 0.01), (-0.05, 0.1), (-0.3, 1.0), (-5.0, 10.0)])
def test_damping_is_raised_until_the_matrix_is_positive_definite(lowest, damping, weight):
    outcome = Gptq(damping=0.01).quantize(weight, {"gram": _gram(lowest)}, SCHEME, _context())
    assert outcome.damping == pytest.approx(damping)
    assert outcome.fallback is None


def test_layer_falls_back_after_three_raises(weight):
    outcome = Gptq(damping=0.01).quantize(weight, {"gram": _gram(-30.0)}, SCHEME, _context())
    assert "not positive definite at damping 10" in outcome.fallback
    assert outcome.damping is None
    # What it falls back to is no worse than rounding to nearest, in plain squared error up to the search's weights.
    nearest = SCHEME.decode(SCHEME.encode(weight, SCHEME.fit(weight)), SCHEME.fit(weight))
    assert (outcome.tensor.decode() - weight).square().mean() < 2 * (nearest - weight).square().mean()


def test_strict_fails_instead(weight):
    with pytest.raises(NumericError, match="not positive definite") as caught:
        Gptq(damping=0.01).quantize(weight, {"gram": _gram(-30.0)}, SCHEME, _context(strict=True))
    assert caught.value.exit_code == 5
    assert "--strict" in caught.value.mend


def test_fallback_is_listed_and_strict_exits_5(bitwright_cli, llama, text, tmp_path, monkeypatch):
    """One group's Gram matrix is made indefinite during a real run."""
    import bitwright.engine.blockwise as blockwise

    genuine, calls = blockwise.collect, []

    options = ["--layout", "native", "--group-size", "32", "--calibration", text, "--samples", "4", "--length", "32"]
    options += ["--method-option", "correct_drift=false"]

    def spoil(*args, **rest):
        found = genuine(*args, **rest)
        calls.append(1)
        if len(calls) == 2:
            matrix = found[0].gram.matrix
            scale = matrix.diagonal().mean()
            matrix.fill_(float(-1000 * scale)).diagonal().fill_(float(scale))
        return found

    monkeypatch.setattr(blockwise, "collect", spoil)
    code, _, err = bitwright_cli("quantize", llama, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "1 layers fell back (model.layers.0.self_attn.o_proj.weight: search: the Gram matrix is not" in err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Fallbacks" in card
    assert "`model.layers.0.self_attn.o_proj.weight`" in card
    calls.clear()
    code, _, err = bitwright_cli("quantize", llama, "-o", tmp_path / "strict", *options, "--strict")
    assert code == 5
    assert "model.layers.0.self_attn.o_proj.weight" in err
    assert not (tmp_path / "strict").exists()
