import pytest
import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.options import build
from bitwright.core.stats import Gram, MinMax
from bitwright.core.transform import ConsumerView, EdgeView
from bitwright.errors import InputError
from bitwright.schemes.affine import Affine
from bitwright.transforms.smoothquant import SmoothQuant, clipping_variance, input_variance

COLUMNS, ROWS = 48, 32
STATIC = InputScheme(strategy="tensor", dynamic=False)
SCHEME = Affine(bits=8, granularity="channel", scale_dtype="float32", inputs=STATIC)


def inputs(seed=0, tokens=2048):
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed))
    x[:, [2, 30]] *= 40
    return x


def weight(seed=1):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def view_of(x, w, scheme=SCHEME):
    gram, seen = Gram(COLUMNS), MinMax(COLUMNS)
    gram.update(x)
    seen.update(x)
    stats = {"gram": gram, "min_max": seen}
    return ConsumerView(name="w", weight=w, channel=torch.arange(COLUMNS), stats=stats, scheme=scheme)


def edge_of(*views, norm=True, **options):
    return EdgeView(name="edge", channels=COLUMNS, producer=torch.ones(COLUMNS), norm=norm, consumers=views, **options)


def actual_error(x, seen, w, factors, scheme=SCHEME):
    """Squared output error per token with weights and inputs rounded; the static range comes from ``seen``."""
    params, codes = scheme.quantize(w * factors)
    rounded = scheme.decode(codes, params).double()
    low, high = float((seen / factors).min()), float((seen / factors).max())
    z = scheme.inputs.apply(x / factors, scheme.inputs.fit(low, high)).double()
    return float((z @ rounded.T - x.double() @ w.double().T).square().sum()) / len(x)


def test_factors_are_equation_four():
    x, w, other = inputs(), weight(), weight(2)
    found = SmoothQuant(alpha=0.8).factors(edge_of(view_of(x, w), view_of(x, other)))
    for j in range(COLUMNS):
        largest = max(abs(float(v)) for v in x[:, j])
        heaviest = max(float(w[:, j].abs().max()), float(other[:, j].abs().max()))
        assert float(found[j]) == pytest.approx(largest**0.8 / heaviest**0.2, rel=1e-5)


def test_only_norms_are_smoothed_unless_asked():
    view = view_of(inputs(), weight())
    assert SmoothQuant().factors(edge_of(view, norm=False)) is None
    assert SmoothQuant(linears=True).factors(edge_of(view, norm=False)) is not None


def test_dead_channels_and_zero_columns_keep_the_factor_one():
    x, w = inputs(), weight()
    x[:, 4] = 0
    w[:, 9] = 0
    found = SmoothQuant().factors(edge_of(view_of(x, w)))
    assert found[[4, 9]].tolist() == [1, 1]
    assert bool((torch.isfinite(found) & (found > 0)).all())


def test_nothing_is_done_without_quantized_consumers():
    x, w = inputs(), weight()
    kept = ConsumerView(name="kept", weight=w, channel=torch.arange(COLUMNS), stats={}, scheme=None)
    assert SmoothQuant().factors(edge_of(kept, view_of(x[:0], w))) is None


def test_the_search_finds_factors_that_are_best_on_unseen_tokens():
    """Against the true error on other tokens, for every alpha of the grid."""
    seen, unseen, w = inputs(), inputs(seed=7), weight()
    edge = edge_of(view_of(seen, w))
    errors = {a: actual_error(unseen, seen, w, SmoothQuant(alpha=a / 20).factors(edge)) for a in range(21)}
    found = actual_error(unseen, seen, w, SmoothQuant(alpha="search").factors(edge))
    assert found <= 1.1 * min(errors.values())
    assert found < 0.1 * actual_error(unseen, seen, w, torch.ones(COLUMNS))


def test_the_search_never_ends_worse_than_no_smoothing():
    x = torch.randn(2048, COLUMNS, generator=torch.Generator().manual_seed(0))
    w = weight()
    found = SmoothQuant(alpha="search").factors(edge_of(view_of(x, w)))
    assert found is None or actual_error(x, x, w, found) <= 1.01 * actual_error(x, x, w, torch.ones(COLUMNS))


def test_the_search_leaves_an_edge_alone_that_smoothing_only_harms():
    """Inputs that are alike up to their limit, weights that differ much and lie on the grid: any factor costs something."""
    x = torch.rand(2048, COLUMNS, generator=torch.Generator().manual_seed(0)).round().mul(2).sub(1)
    w = torch.randint(-127, 128, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1)).float()
    w[:, 0], w[:, 1:20] = 127.5, (w[:, 1:20] / 64).round()
    assert SmoothQuant(alpha="search").factors(edge_of(view_of(x, w))) is None


@pytest.mark.parametrize(
    "scheme",
    [
        STATIC,
        InputScheme(strategy="tensor", dynamic=False, symmetric=False),
        InputScheme(strategy="tensor", dynamic=True),
        InputScheme(strategy="tensor", dynamic=False, number="float"),
        InputScheme(strategy="group", group_size=16),
        InputScheme(strategy="group", group_size=16, number="float", bits=4),
    ],
    ids=lambda s: s.describe(),
)
def test_rounding_variance_is_that_of_the_rounding_itself(scheme):
    """Column by column against rounding many values, with columns that differ two hundred times in size."""
    x = torch.randn(20000, COLUMNS, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0.3, COLUMNS)
    low, high = x.amin(0), x.amax(0)
    expected = (scheme.apply(x, scheme.fit(float(x.min()), float(x.max()))) - x).double().square().mean(0)
    # Infinitely many tokens: nothing lies beyond their range.
    found = input_variance(scheme, low, high, x.square().mean(0), 10**30)
    # Scales of groups follow each token, of which the estimate takes the largest: above the truth, by how much is the data's affair.
    assert bool((found <= (20 if scheme.strategy == "group" else 1.5) * expected).all())
    assert bool((found >= 0.7 * expected).all())


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_clipping_variance_is_that_of_unseen_tokens(kind):
    """Many columns, 500 tokens seen, 50,000 unseen; limits at and beyond the largest seen value."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50500, 200, generator=rng)
    if kind == "laplace":
        x = x.sign() * -torch.rand(x.shape, generator=rng).clamp_min(1e-12).log()
    seen, unseen = x[:500], x[500:]
    largest, mean_square = seen.abs().amax(0), seen.square().mean(0)
    for factor in (1.0, 1.2):
        expected = (unseen.abs() - factor * largest).clamp_min(0).square().mean()
        found = clipping_variance(factor * largest, largest, mean_square, 500).mean()
        assert expected / 4 < found < 4 * expected


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": 1.5}, {"alpha": "best"}, {"grid": 0}, {"rows": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        SmoothQuant(**options)


def test_alpha_is_a_number_or_search():
    assert build(SmoothQuant, {"alpha": "search"}, "transform").alpha == "search"
    assert build(SmoothQuant, {"alpha": 1}, "transform").alpha == 1
    with pytest.raises(InputError, match="alpha"):
        build(SmoothQuant, {"alpha": [0.5]}, "transform")
