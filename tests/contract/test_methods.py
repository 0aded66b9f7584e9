"""What every catalogued method must do. A new file in ``methods`` is picked up here by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitwright import catalog
from bitwright.core.method import Context
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.stats import CrossGram, Gram
from bitwright.errors import PlanError
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.kernels.numba_tiles import tile_sums

ROWS, COLUMNS = 32, 512
#: Options worth trying; a scheme that is not listed is tried with its defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "affine": [
        {"group_size": 32},
        {"bits": 3, "group_size": 64, "symmetric": False},
        {"bits": 2, "granularity": "channel", "scale_dtype": "float32"},
        {"bits": 8, "granularity": "channel", "symmetric_range": "narrow"},
        {"bits": 4, "granularity": "tensor", "scale_dtype": "bfloat16"},
    ],
    "float8": [
        {"granularity": "tensor"},
        {"element": "e5m2", "scale_dtype": "bfloat16"},
        {"granularity": "block"},
        {"granularity": "block", "block": (20, 64)},
    ],
    "codebook": [
        {"book": "nf4"},
        {"book": "fp4", "block_size": 128, "double_quant": True},
        {"book": "nf4", "block_size": 4096},
        {"book": "kmeans", "bits": 3},
        {"book": "custom", "bits": 2, "table": [-1.0, -0.25, 0.3]},
    ],
    "bilevel": [{"outliers": 0.0}, {"outliers": 0.5, "group_size": 32}, {"outliers": 0.0, "bits": 2, "zero_bits": 0}],
    "ternary": [{}, {"granularity": "tensor"}],
    "binary": [{}, {"granularity": "channel"}],
    "microscaling": [{"element": "mxfp4"}, {"element": "mxfp8"}, {"element": "nvfp4"}],
    "ggml": [{"type": kind} for kind in ("Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS")],
}


def _fits(scheme: Scheme) -> bool:
    """False for schemes that exist to read files with."""
    try:
        scheme.quantize(torch.ones(ROWS, COLUMNS))
    except PlanError as error:
        if "for reading" not in error.message:
            raise
        return False
    return True


def schemes() -> list[Scheme]:
    found = [catalog.load("schemes", name)(**o) for name in catalog.names("schemes") for o in OPTIONS.get(name, [{}])]
    return [scheme for scheme in found if _fits(scheme)]


def activations(seed: int = 0) -> torch.Tensor:
    """Correlated, of unequal size, with one column that is always zero."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 16, generator=rng) @ torch.randn(16, COLUMNS, generator=rng)
    x = (x + torch.randn(1024, COLUMNS, generator=rng)) * (torch.rand(COLUMNS, generator=rng) + 0.2)
    x[:, 100] = 0
    return x


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.fixture(scope="module")
def stats() -> dict[str, Any]:
    """Everything that a method may ask for."""
    x = activations()
    gram, drift, residual = Gram(COLUMNS), CrossGram(COLUMNS), CrossGram(COLUMNS, rows=ROWS)
    heldout = Gram(COLUMNS)
    gram.update(x)
    heldout.update(activations(seed=0)[::8])
    drift.update_pair(x * 1.01, x)
    residual.update_against(torch.ones(len(x), ROWS), torch.zeros(len(x), ROWS), x)
    return {"gram": gram, "drift": drift, "residual_drift": residual, "gram_heldout": heldout}


def context_of(scheme: Scheme, w: torch.Tensor) -> Context:
    return Context(feedback=feedback_block, tile_sums=tile_sums, prepared=scheme.prepare([w]))


def loss(w: torch.Tensor, tensor: QuantizedTensor, gram: Gram) -> float:
    """tr(E H Eᵀ) in float64: the squared error of the layer's outputs."""
    e = (w - tensor.decode()).double()
    return float((e @ gram.matrix.double() * e).sum())


def serving(name: str, scheme: Scheme) -> Any:
    """The method with its defaults; skips where it says that it does not serve the scheme."""
    method = catalog.load("methods", name)()
    reason = method.accepts(scheme)
    if reason is not None:
        pytest.skip(reason)
    return method


methods = pytest.mark.parametrize("name", catalog.names("methods"))
all_schemes = pytest.mark.parametrize("scheme", schemes(), ids=lambda s: f"{s.kind}-{s.describe()}")


@methods
@all_schemes
def test_inputs_are_untouched_and_results_repeat_bit_for_bit(name, scheme, stats):
    w, method = weight(), serving(name, scheme)
    before = [w.clone(), *(s.matrix.clone() for s in stats.values())]
    first = method.quantize(w, stats, scheme, context_of(scheme, w))
    second = method.quantize(w, stats, scheme, context_of(scheme, w))
    assert first.tensor.equals(second.tensor)
    assert first.loss == second.loss
    assert all(torch.equal(a, b) for a, b in zip(before, [w, *(s.matrix for s in stats.values())], strict=True))


@methods
@all_schemes
def test_output_obeys_the_scheme(name, scheme, stats):
    w, method = weight(), serving(name, scheme)
    tensor = method.quantize(w, stats, scheme, context_of(scheme, w)).tensor
    assert tensor.scheme == scheme
    assert tensor.shape == (ROWS, COLUMNS)
    # The constructor compares shapes and dtypes with param_spec.
    QuantizedTensor(tensor.scheme, tensor.shape, tensor.codes, tensor.params, tensor.outliers)
    assert tensor.codes.dtype == torch.uint8
    assert int(tensor.codes.max()) < scheme.levels
    assert tensor.codes.is_contiguous()
    assert torch.isfinite(tensor.decode()).all()


@methods
@all_schemes
def test_loses_no_more_than_rounding_when_inputs_correlate(name, scheme, stats):
    w, gram = weight(), stats["gram"]
    context = context_of(scheme, w)
    tensor = serving(name, scheme).quantize(w, {"gram": gram}, scheme, context).tensor
    rounded = catalog.load("methods", "rtn")().quantize(w, {}, scheme, context).tensor
    # A hundredth: methods that look at E[x²] alone do not see the correlations that this loss counts.
    assert loss(w, tensor, gram) <= 1.01 * loss(w, rounded, gram)


@methods
@all_schemes
def test_works_without_any_calibration(name, scheme):
    w, method = weight(), serving(name, scheme)
    outcome = method.quantize(w, {}, scheme, context_of(scheme, w))
    assert torch.isfinite(outcome.tensor.decode()).all()
    assert outcome.loss is None
    if method.needs and name == "gptq":
        assert outcome.fallback is not None


@methods
@all_schemes
def test_a_weight_of_zeros_decodes_to_zeros(name, scheme, stats):
    w, method = torch.zeros(ROWS, COLUMNS), serving(name, scheme)
    decoded = method.quantize(w, {"gram": stats["gram"]}, scheme, context_of(scheme, w)).tensor.decode()
    assert decoded.abs().max() < 1e-6


@methods
def test_options_are_frozen_and_have_defaults(name):
    method = catalog.load("methods", name)()
    assert method.name == name
    assert method == catalog.load("methods", name)()
    with pytest.raises((AttributeError, TypeError)):
        method.name = "other"
    assert method.needs <= {"gram", "drift", "gram_heldout"}
