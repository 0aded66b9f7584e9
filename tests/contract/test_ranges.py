"""What every catalogued range finder must do. A new file in ``ranges`` is picked up here by itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from bitwright import catalog
from bitwright.core.inputs import InputScheme
from bitwright.core.ranges import Range
from bitwright.core.stats import SIMPLE, Statistic
from bitwright.errors import InputError, NumericError

COLUMNS = 32
#: Options worth trying; a range finder that is not listed is tried with its defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "percentile": [{}, {"percentile": 99.0}],
    "moving-average": [{}, {"factor": 0.5}],
    "mse": [{}, {"steps": 20, "smallest": 0.1}],
}
#: Range finders whose result depends on how tokens are cut into batches, by definition.
BY_BATCH = {"moving-average"}
#: Range finders that clip heavy tails.
CLIPPING = {"percentile", "entropy", "mse"}

INPUTS = {
    "int8": InputScheme(strategy="tensor", dynamic=False),
    "int8 asym": InputScheme(strategy="tensor", dynamic=False, symmetric=False),
    "fp8": InputScheme(number="float", strategy="tensor", dynamic=False),
    "nvfp4": InputScheme(bits=4, number="float", strategy="tensor_group", group_size=16, dynamic=False),
}


def normal(seed: int = 0) -> torch.Tensor:
    return torch.randn(512, COLUMNS, generator=torch.Generator().manual_seed(seed))


def heavy() -> torch.Tensor:
    """Cauchy-like tails: a handful of values are hundreds of times the typical one."""
    return normal() / normal(1).abs().clamp_min(1e-2)


DATA = {
    "normal": normal(),
    "heavy": heavy(),
    "bfloat16": heavy().bfloat16(),
    "positive": normal().abs() + 3,
    "negative": -normal().abs() - 3,
    "relu": normal().relu(),
    "zero": torch.zeros(8, COLUMNS),
    "constant": torch.full((8, COLUMNS), 2.5),
    "few": torch.tensor([[0.0] * (COLUMNS - 1) + [1e-30]]),
    "large": normal() * 1e30,
}


def finders() -> list[Range]:
    return [catalog.load("ranges", name)(**o) for name in catalog.names("ranges") for o in OPTIONS.get(name, [{}])]


@pytest.fixture(params=finders(), ids=repr)
def finder(request) -> Range:
    return request.param


def statistics(finder: Range, *batches: torch.Tensor) -> dict[str, Statistic]:
    found = {name: SIMPLE[name](batches[0].shape[1]) for name in finder.needs}
    for batch in batches:
        for stat in found.values():
            stat.update(batch)
    return found


def test_a_range_finder_is_a_frozen_dataclass_with_the_name_of_its_file():
    for name in catalog.names("ranges"):
        kind = catalog.load("ranges", name)
        assert kind.name == name
        assert issubclass(kind, Range)
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().name = "other"


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("data", DATA)
def test_ranges_are_finite_contain_zero_and_do_not_exceed_what_was_seen(finder, data, inputs):
    x = DATA[data]
    low, high = finder.find(statistics(finder, *x.split(100)), INPUTS[inputs])
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert min(0.0, float(x.min())) <= low <= 0 <= high <= max(0.0, float(x.max()))
    params = INPUTS[inputs].fit(low, high)
    assert bool(torch.isfinite(INPUTS[inputs].apply(x.float(), params)).all())
    assert (low, high) != (0, 0) or not bool(x.any())


@pytest.mark.parametrize("inputs", INPUTS)
def test_batching_changes_nothing(finder, inputs):
    x = heavy()
    found = {finder.find(statistics(finder, *x.split(n)), INPUTS[inputs]) for n in (512, 512, 37, 1)}
    assert (len(found) == 1) == (finder.name not in BY_BATCH)


@pytest.mark.parametrize("inputs", INPUTS)
def test_statistics_merged_in_order_give_the_same_range(finder, inputs):
    first, second = heavy().split(256)
    parts, more = statistics(finder, *first.split(64)), statistics(finder, *second.split(64))
    for name, stat in parts.items():
        stat.merge(more[name])
    whole = statistics(finder, *heavy().split(64))
    assert finder.find(parts, INPUTS[inputs]) == finder.find(whole, INPUTS[inputs])


def test_two_outliers_among_many_values_are_clipped(finder):
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(2))
    x[7, 3], x[900, 40] = 30.0, -30.0
    for inputs in ("int8", "int8 asym"):
        low, high = finder.find(statistics(finder, *x.split(512)), INPUTS[inputs])
        if finder.name in CLIPPING:
            assert high < 21
            assert low > -21
        elif finder.name == "minmax":
            assert (low, high) == (-30.0, 30.0)


def test_ranges_scale_with_the_inputs(finder):
    x = heavy()
    for inputs in INPUTS.values():
        low, high = finder.find(statistics(finder, x), inputs)
        assert finder.find(statistics(finder, x * 1024), inputs) == pytest.approx((1024 * low, 1024 * high))


def test_no_token_is_an_error(finder):
    empty = statistics(finder, torch.zeros(0, COLUMNS))
    for stats in (empty, {}):
        with pytest.raises(InputError, match="no calibration token"):
            finder.find(stats, INPUTS["int8"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_an_error(finder, bad):
    x = normal()
    x[3, 4] = bad
    with pytest.raises(NumericError, match="not finite"):
        finder.find(statistics(finder, x), INPUTS["int8"])
