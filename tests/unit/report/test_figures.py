"""Parts of the charts: where names go, what is on the frontier, which colours there are."""

from __future__ import annotations

import itertools
import random
import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from tests.documents import candidate, document, layers, twelve

from bitwright.evaluation.record import BlockError, WeightHistogram
from bitwright.report import figures_layers, figures_quality
from bitwright.report.figures import NARROW, WIDE, Sheet, log_ticks, short, text_width
from bitwright.report.figures_labels import Label, Spot, place, spread, stack
from bitwright.report.palette import DARK, HEAT_LEVELS, LIGHT, SERIES
from bitwright.report.verdict import verdict


def box(label: Label, spot: Spot) -> tuple[float, float, float, float]:
    return spot.left, spot.top, spot.left + label.width, spot.top + label.height


def apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def crowd(count: int, size: float, seed: int) -> list[Label]:
    chance = random.Random(seed)
    return [
        Label(400 + chance.gauss(0, size), 200 + chance.gauss(0, size), 60 + 60 * chance.random(), 15)
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_labels_near_their_points_lie_on_nothing(seed):
    labels = crowd(12, 60, seed)
    bounds = (60.0, 20.0, 900.0, 420.0)
    spots = place(labels, bounds)
    assert spots is not None
    boxes = [box(label, spot) for label, spot in zip(labels, spots, strict=True)]
    assert all(apart(a, b) for a, b in itertools.combinations(boxes, 2))
    for left, top, right, bottom in boxes:
        assert bounds[0] <= left
        assert right <= bounds[2]
        assert bounds[1] <= top
        assert bottom <= bounds[3]
        assert all(apart((left, top, right, bottom), (one.x - 4, one.y - 4, one.x + 4, one.y + 4)) for one in labels)


def test_labels_keep_off_what_is_blocked():
    blocked = (300.0, 100.0, 395.0, 300.0)
    labels = crowd(5, 3, 0)
    spots = place(labels, (0.0, 0.0, 900.0, 400.0), blocked=[blocked])
    assert all(apart(box(label, spot), blocked) for label, spot in zip(labels, spots, strict=True))


def test_where_there_is_no_room_the_search_says_so_and_the_column_still_works():
    labels = crowd(40, 2, 1)
    assert place(labels, (380.0, 180.0, 420.0, 220.0)) is None
    spots = stack(labels, 500, 0, 900)
    boxes = [box(label, spot) for label, spot in zip(labels, spots, strict=True)]
    assert all(apart(a, b) for a, b in itertools.combinations(boxes, 2))
    order = sorted(range(40), key=lambda i: labels[i].y)
    assert [boxes[i][1] for i in order] == sorted(b[1] for b in boxes)


def test_spread_moves_as_little_as_possible():
    scipy = pytest.importorskip("scipy.optimize")
    chance = random.Random(5)
    for _ in range(10):
        wanted = sorted(chance.uniform(100, 200) for _ in range(7))
        heights = [chance.uniform(8, 20) for _ in range(7)]
        found = spread(wanted, heights, -1000, 1000)
        rules = [{"type": "ineq", "fun": lambda t, i=i, h=h: t[i + 1] - t[i] - h} for i, h in enumerate(heights[:-1])]
        start = [wanted[0] + sum(heights[:i]) for i in range(7)]
        best = scipy.minimize(
            lambda t, w=wanted: sum((a - b) ** 2 for a, b in zip(t, w, strict=True)),
            start,
            constraints=rules,
            method="SLSQP",
        )
        assert found == pytest.approx(list(best.x), abs=1e-2)


def test_spread_stays_within_its_limits():
    assert spread([5, 90], [10, 10], 20, 60) == [20, 50]
    assert spread([50, 50, 50], [10, 10, 10], 0, 55) == [25, 35, 45]


def test_frontier_against_all_pairs():
    chance = random.Random(0)
    points = [(chance.randrange(6), chance.randrange(6)) for _ in range(40)]

    def beaten(one: tuple[int, int]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)

    found = figures_quality.frontier(points)
    assert {points[i] for i in found} == {one for one in points if not beaten(one)}
    assert len({points[i] for i in found}) == len(found)


@pytest.mark.parametrize(("low", "high"), [(1e-9, 1e3), (0.002, 0.3), (0.01, 0.011), (5, 6), (1e-30, 1e-29)])
def test_ticks_are_few_and_within(low, high):
    ticks = log_ticks(low, high)
    assert len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def luminance(colour: str) -> float:
    def linear(part: str) -> float:
        value = int(part, 16) / 255
        return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(colour[i : i + 2]) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ratio(a: str, b: str) -> float:
    high, low = max(luminance(a), luminance(b)), min(luminance(a), luminance(b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_can_be_read_on_both_grounds(theme):
    for ground in ("paper", "soft"):
        for name in ("ink", "muted", "accent", "good", "warn", "bad"):
            assert ratio(theme[name], theme[ground]) >= 4.5, (name, ground)
    for name in SERIES:
        assert ratio(theme[name], theme["paper"]) >= 4.5, name
    assert ratio(theme["axis"], theme["paper"]) >= 3
    for level in range(HEAT_LEVELS):
        assert ratio(theme[f"t{level}"], theme[f"h{level}"]) >= 4.5, level
    assert LIGHT.keys() == DARK.keys()


def test_heat_goes_from_the_ground_away_from_it():
    for theme in (LIGHT, DARK):
        steps = [ratio(theme[f"h{level}"], theme["paper"]) for level in range(HEAT_LEVELS)]
        assert steps == sorted(steps)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_sheet_is_svg_for_html_with_colours_by_name(width):
    with Sheet("key", width, 100) as sheet:
        axes = sheet.axes(20, 10, width - 40, 60)
        axes.plot([0, 1], [0, 1], "o-", color="#0a0b01")
        sheet.text(5, 5, "a & b")
        drawn = sheet.svg('names "<&"')
    root = ElementTree.fromstring(drawn)
    assert root.tag == "svg"
    assert root.get("aria-label") == 'names "<&"'
    assert root.get("viewBox") == f"0 0 {width} 100"
    assert "width" not in root.attrib
    assert not re.search(r"#[0-9a-f]{6}", drawn)
    assert "style>" not in drawn
    assert "font-family" not in drawn
    assert "var(--ink)" in drawn
    for element in root.iter():
        for value in element.attrib.values():
            for name in re.findall(r"url\(#([^)]+)\)", value):
                assert name.startswith("key-")
                assert root.find(f".//*[@id='{name}']") is not None


def test_long_names_keep_both_ends():
    assert short("a" * 50 + "-end", 20).endswith("-end")
    assert len(short("a" * 50 + "-end", 20)) == 20
    assert short("fits", 4) == "fits"


def test_squares_are_as_wide_as_they_are_high():
    assert text_width("模型", 12) >= 24
    assert text_width("wider", bold=True) > text_width("wider")


def test_every_candidate_is_named_in_both_widths():
    found = twelve()
    for chart in (
        figures_quality.pareto_chart(found, found.candidates[0]),
        figures_quality.perplexity_chart(found, found.candidates[0]),
    ):
        for drawn in (chart.wide, chart.narrow):
            root = ElementTree.fromstring(drawn)
            shown = {"".join(part.itertext()) for part in root.iter("text")}
            for one in found.candidates:
                assert short(one.name, 18) in shown or one.name in shown


@pytest.mark.parametrize("count", [2, 30, 60])
def test_any_number_of_candidates_can_be_named(count):
    found = document(*(candidate(f"recipe-{i}", 4.13, 0.003 * 1.0001**i, seed=1) for i in range(count)))
    chart = figures_quality.pareto_chart(found, found.candidates[0])
    for drawn in (chart.wide, chart.narrow):
        assert len(re.findall(r'class="label"', drawn)) == count


def test_a_divergence_of_zero_has_a_place_on_the_logarithmic_axis():
    exact = candidate("exact", 16, 0.003)
    exact = exact.model_copy(
        update={
            "quality": type(exact.quality)(
                **{**vars(exact.quality), "kl": type(exact.quality.kl)(0, 0, 0, 0, 0, 0, 0, 9)}
            )
        }
    )
    both = document(exact, candidate("other", 4, 0.003))
    assert "exact" in figures_quality.pareto_chart(both, exact).wide
    assert "exact" in figures_quality.pareto_chart(document(exact, exact), exact).wide


def test_numbered_parts_share_a_row_with_their_worst():
    found = [
        type(one)(**{**vars(one), "role": f"mlp.experts.{i}.{one.role}", "snr_db": 30.0 - i})
        for i in range(4)
        for one in layers(0.01, 2, 1)
    ]
    shown = figures_layers.layer_map(found)
    assert len(shown.rows) == 7
    assert all("experts.*." in row for row in shown.rows)
    assert set(shown.values.values()) == {27.0}
    assert shown.columns == (0, 1)


def test_scale_runs_from_harmless_to_bad():
    falling = figures_layers.Scale(40.0, 10.0)
    assert falling.level(40) == 0
    assert falling.level(10) == falling.level(-5) == HEAT_LEVELS - 1
    assert falling.level(float("inf")) == 0
    rising = figures_layers.Scale(1.0, 100.0, log=True)
    assert rising.level(1) == rising.level(0) == 0
    assert rising.level(100) == rising.level(float("inf")) == HEAT_LEVELS - 1
    assert rising.level(10) == HEAT_LEVELS // 2


def test_close_values_are_not_stretched_over_all_colours():
    one = figures_layers.HeatMap(("a",), (0, 1), {("a", 0): 20.0, ("a", 1): 20.5})
    scale = figures_layers.scale_of([one], falling=True)
    assert scale.low - scale.high >= 6
    assert abs(scale.level(20.0) - scale.level(20.5)) <= 1


def test_charts_that_would_show_nothing_are_not_drawn():
    assert figures_layers.block_chart([BlockError(0, 0.1, 0.1)], {}, "one block") is None
    assert figures_layers.block_chart([BlockError(i, 0, 0) for i in range(5)], {}, "exact") is None
    assert figures_layers.histogram_chart([WeightHistogram("empty", (0.0, 1.0), (0.0,), (0.0,))]) is None
    assert figures_layers.layer_map([one for one in layers(0.1, 2, 1) if one.block is None]) is None
    one = document(candidate("alone", 4, 0.003))
    assert figures_quality.pareto_chart(one, one.candidates[0]) is None
    assert figures_quality.perplexity_chart(one, one.candidates[0]) is None


def test_the_original_is_a_line_that_names_its_perplexity():
    found = twelve()
    chart = figures_quality.perplexity_chart(found, verdict(found).candidate)
    assert "original 6.243" in chart.wide
    assert "original 6.243" in chart.narrow
