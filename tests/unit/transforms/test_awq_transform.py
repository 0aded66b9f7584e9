from dataclasses import replace

import pytest
import torch

from bitwright.core.stats import Gram, MeanAbs
from bitwright.core.transform import ConsumerView, EdgeView
from bitwright.errors import InputError
from bitwright.schemes.affine import Affine
from bitwright.schemes.codebook import Codebook
from bitwright.transforms.awq import Awq, scaled_line

COLUMNS, ROWS = 64, 24
SCHEME = Affine(bits=3, group_size=32)


def inputs(seed=0, tokens=512):
    """Activations of which four channels are thirty times as large as the others."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, COLUMNS, generator=rng)
    x[:, [3, 17, 40, 41]] *= 30
    return x


def view_of(x, w, *, name="w", channel=None, scheme=SCHEME, feedback=False):
    gram, mean = Gram(w.shape[1]), MeanAbs(w.shape[1])
    gram.update(x)
    mean.update(x)
    channel = torch.arange(w.shape[1]) if channel is None else channel
    stats = {"gram": gram, "mean_abs": mean}
    return ConsumerView(name=name, weight=w, channel=channel, stats=stats, scheme=scheme, feedback=feedback)


def edge_of(*views, channels=COLUMNS, **options):
    norm = torch.ones(channels)
    return EdgeView(name="edge", channels=channels, producer=norm, norm=True, consumers=views, **options)


def weight(seed=1, rows=ROWS, columns=COLUMNS):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(x, w, factors, scheme=SCHEME):
    """Of plainly rounded weights, in float64."""
    scaled = w * factors
    params, codes = scheme.quantize(scaled)
    wrong = (scheme.decode(codes, params) / factors - w).double()
    return float((x.double() @ wrong.T).square().sum())


def test_large_channels_are_scaled_up_and_the_output_error_falls():
    x, w = inputs(), weight()
    factors = Awq(clips=1).factors(edge_of(view_of(x, w)))
    big = torch.zeros(COLUMNS, dtype=torch.bool)
    big[[3, 17, 40, 41]] = True
    assert factors[big].min() > 2 * factors[~big].max()
    assert output_error(x, w, factors) < 0.6 * output_error(x, w, torch.ones(COLUMNS))


def test_the_best_of_the_grid_is_taken():
    """Against the loss of every candidate, computed from the activations themselves."""
    x, w = inputs(), weight()
    factors = Awq(clips=1, duo=False).factors(edge_of(view_of(x, w)))
    mean = x.abs().mean(0)
    candidates = [
        (mean ** (step / 20)) / ((mean ** (step / 20)).max() * (mean ** (step / 20)).min()) ** 0.5 for step in range(20)
    ]
    errors = [output_error(x, w, candidate) for candidate in candidates]
    assert output_error(x, w, factors) == pytest.approx(min(errors), rel=1e-4)
    assert torch.allclose(factors, candidates[errors.index(min(errors))], rtol=1e-4)


def test_an_edge_that_scaling_does_not_help_is_left_alone():
    """Inputs that are all alike, and weights that the scheme holds exactly."""
    steps = torch.randint(-3, 4, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0)).float()
    steps[:, ::32] = 3.5  # the range of every group, so that the scale is one
    x = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(2))
    x[:, ::32] = 0
    assert Awq().factors(edge_of(view_of(x, steps))) is None


def test_attention_is_judged_by_the_blocks_output():
    x, w = inputs(), weight()
    seen = []

    def probe(weights):
        seen.append(weights["w"])
        return float(len(seen) != 8)  # the eighth is perfect

    factors = Awq(duo=False, grid=10).factors(edge_of(view_of(x, w), probe=probe, attention=True))
    assert len(seen) == 10
    assert torch.allclose(factors, scaled_line(x.abs().mean(0), None, 0.7), rtol=1e-5)
    assert seen[0].shape == w.shape
    assert 0 < float((seen[0] - w).abs().max()) < float(w.abs().max())
    assert Awq(block_output=False).factors(edge_of(view_of(x, w), probe=lambda _: 1 / 0, attention=True)) is not None


def test_error_feedback_is_judged_by_what_it_leaves():
    """Two columns that always carry the same input: feedback lets one absorb the other's error, so both together count once."""
    x = torch.randn(512, COLUMNS, generator=torch.Generator().manual_seed(0))
    x[:, :32] = x[:, :1] * 20 + 0.01 * x[:, :32]
    w = weight()
    plain = Awq().factors(edge_of(view_of(x, w)))
    fed_back = Awq().factors(edge_of(view_of(x, w, feedback=True)))
    from bitwright.core.method import Context
    from bitwright.kernels.numba_feedback import feedback_block
    from bitwright.methods.gptq import Gptq

    def loss(factors):
        gram = Gram(COLUMNS)
        gram.update(x / factors)
        method, context = Gptq(correct_drift=False, clip="minmax"), Context(feedback=feedback_block)
        tensor = method.quantize(w * factors, {"gram": gram}, SCHEME, context).tensor
        return float((x @ (tensor.decode() / factors - w).T).square().sum())

    ones = torch.ones(COLUMNS)
    assert loss(ones if fed_back is None else fed_back) <= loss(ones if plain is None else plain)
    assert loss(ones if fed_back is None else fed_back) <= loss(ones)


def test_columns_of_one_channel_share_a_factor():
    """Grouped queries: two columns a channel; a channel's input is their mean."""
    channel = torch.arange(32).repeat(2)
    x = inputs()
    factors = Awq(clips=1, duo=False).factors(edge_of(view_of(x, weight(), channel=channel), channels=32))
    assert factors.shape == (32,)
    assert set(factors.topk(3).indices.tolist()) <= {3, 17, 8, 9}  # 40 and 41 are the second column of 8 and 9


def test_consumers_that_stay_or_saw_nothing_do_not_count():
    x, w = inputs(), weight()
    alone = Awq().factors(edge_of(view_of(x, w)))
    unseen = view_of(x[:0], weight(5), name="unseen")
    kept = ConsumerView(name="kept", weight=weight(6), channel=torch.arange(COLUMNS), stats={}, scheme=None)
    assert torch.equal(Awq().factors(edge_of(view_of(x, w), unseen, kept)), alone)
    assert Awq().factors(edge_of(unseen, kept)) is None


def test_dead_channels_keep_the_factor_one():
    x = inputs()
    x[:, 5] = 0
    factors = Awq().factors(edge_of(view_of(x, weight())))
    assert factors[5] == 1
    assert bool((torch.isfinite(factors) & (factors > 0)).all())


def test_candidates_are_judged_as_they_can_be_stored():
    def storable(factors):
        return torch.exp2(factors.log2().round())

    factors = Awq().factors(edge_of(view_of(inputs(), weight()), storable=storable))
    assert torch.equal(factors, storable(factors))


def test_ranges_are_clipped_only_where_the_method_will_search_them():
    x, w = inputs(), weight()
    searched, plain = (replace(view_of(x, w), searched=value) for value in (True, False))
    assert torch.equal(Awq().factors(edge_of(plain)), Awq(clips=1).factors(edge_of(searched)))


@pytest.mark.parametrize(
    "scheme",
    [
        Affine(bits=4, granularity="tensor"),
        Affine(bits=4, granularity="channel"),
        Codebook(block_size=32),
        Codebook(block_size=128),  # blocks reach over the ends of rows
        Codebook(block_size=32, double_quant=True),
    ],
)
def test_schemes_of_other_tiles_are_served(scheme):
    factors = Awq().factors(edge_of(view_of(inputs(), weight(), scheme=scheme)))
    assert output_error(inputs(), weight(), factors, scheme) < output_error(
        inputs(), weight(), torch.ones(COLUMNS), scheme
    )


@pytest.mark.parametrize("options", [{"grid": 1}, {"clips": 0}, {"rows": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="awq needs"):
        Awq(**options)
