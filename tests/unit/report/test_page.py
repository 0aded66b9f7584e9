"""The page holds what the document holds, asks for nothing from outside, and cannot be broken by names."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from bitwright.errors import InputError
from bitwright.report.document import Candidate, Document, Size
from bitwright.report.verdict import verdict

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from tests import documents

from bitwright.report import page

VOID = {"meta", "link", "br", "img", "hr", "input"}
ROOT = Path(__file__).parents[3]


class Reader(HTMLParser):
    """Elements in order, the text of each, and whether all were closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[int] = []
        self.texts: dict[int, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == [], [self.tags[i] for i in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(len(self.tags) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.tags[self.open[-1]][0] == tag, (self.tags[self.open[-1]], tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.texts.setdefault(index, []).append(data)

    def all(self, tag: str) -> list[str]:
        """Texts of all elements with this tag."""
        return [
            " ".join("".join(self.texts.get(i, [])).split()) for i, (name, _) in enumerate(self.tags) if name == tag
        ]

    def tables(self) -> dict[str, list[list[str]]]:
        """Caption of each table -> its rows of texts."""
        found: dict[str, list[list[str]]] = {}
        rows: list[list[str]] = []
        for i, (tag, _) in enumerate(self.tags):
            text = " ".join("".join(self.texts.get(i, [])).split())
            if tag == "caption":
                rows = found.setdefault(text, [])
            elif tag == "tr":
                rows.append([])
            elif tag in ("th", "td"):
                rows[-1].append(text)
        return found


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return {name: page.render_page(getattr(documents, name)()) for name in ("twelve", "bare", "single", "hostile")}


def styles(text: str) -> str:
    return re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]


def test_the_verdict_stands_at_the_top(drawn):
    read = Reader(drawn["twelve"])
    found = verdict(documents.twelve())
    wanted = found.sentence.replace("->", "→").replace("9x", "9×").replace(" %", "\N{NO-BREAK SPACE}%")
    assert " ".join(wanted.split()) in read.all("p")
    assert f"{found.candidate.name} is {found.lead}" in read.all("p")
    assert read.all("h1") == ["Example-8B, quantized twelve ways"]


def test_quality_table_holds_the_numbers_of_the_document(drawn):
    document = documents.twelve()
    rows = Reader(drawn["twelve"]).tables()["Quality of every candidate against the original"]
    by_name = {row[0]: row[1:] for row in rows[2:]}
    assert len(by_name) == 13
    for one in document.candidates:
        cells = next(cells for name, cells in by_name.items() if name.startswith(one.name))
        found = one.quality
        shown = [float(cell.replace("−", "-")) for cell in cells]
        expected = [
            one.size.weight_file_bytes / 1e9, one.size.bits_per_weight, found.model.perplexity,
            found.model.perplexity - found.source.perplexity, 100 * (found.model.perplexity / found.source.perplexity - 1),
            found.kl.mean, found.kl.median, found.kl.p99, found.kl.p999, found.kl.max,
            100 * found.top1, 100 * found.top5, 100 * found.delta_p.rms, 100 * (found.flips.right_to_wrong + found.flips.wrong_to_right),
        ]  # fmt: skip
        for cell, value, text in zip(shown, expected, cells, strict=True):
            places = len(text.partition(".")[2])
            assert cell == pytest.approx(value, abs=0.5001 * 10.0**-places)
    source = next(cells for name, cells in by_name.items() if name.startswith("Example-8B"))
    assert source[:3] == ["15.78", "16.00", "6.243"]
    assert set(source[3:]) == {"–"}


def test_the_best_of_each_column_is_marked(drawn):
    table = re.search(r"<caption>Quality of every candidate.*?</table>", drawn["twelve"], re.DOTALL)[0]
    rows = [re.findall(r"<td class=\"([^\"]*)\"", row) for row in table.split("<tr")[4:]]
    names = [one.name for one in documents.twelve().candidates]
    smallest, closest = rows[names.index("gptq-int2-g32")], rows[names.index("rtn-int8-g128")]
    assert ["best" in cell for cell in smallest] == [True] * 2 + [False] * 12
    assert ["best" in cell for cell in closest] == [False] * 2 + [True] * 12
    assert "best" not in re.search(r"<caption>Quality.*?</table>", drawn["single"], re.DOTALL)[0]


def test_every_section_is_there_and_named_in_the_navigation(drawn):
    read = Reader(drawn["twelve"])
    sections = [attributes["id"] for tag, attributes in read.tags if tag == "section"]
    assert sections == [
        "quality", "size", "layers", "activations", "weights", "speed", "tasks", "limits", "engines", "recipes", "measured", "missing",
    ]  # fmt: skip
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    assert links == [f"#{name}" for name in sections]


def test_headings_descend_one_level_at_a_time(drawn):
    for text in drawn.values():
        levels = [int(tag[1]) for tag, _ in Reader(text).tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))


def test_tables_and_charts_speak_for_themselves(drawn):
    for text in drawn.values():
        read = Reader(text)
        assert read.all("table") == [] or all(read.tables())
        assert sum(tag == "table" for tag, _ in read.tags) == sum(tag == "caption" for tag, _ in read.tags)
        for tag, attributes in read.tags:
            if tag == "th":
                assert attributes["scope"] in ("col", "row", "colgroup")
            if tag == "svg":
                assert attributes["role"] == "img"
                assert len(attributes["aria-label"]) > 20


def test_missing_parts_are_said_to_be_missing(drawn):
    read = Reader(drawn["bare"])
    assert [attributes["id"] for tag, attributes in read.tags if tag == "section"] == ["recipes", "missing"]
    assert {"quality", "tasks", "speed and memory", "outliers of the activations"} <= set(read.all("li"))
    assert "<svg" not in drawn["bare"]
    read = Reader(drawn["single"])
    assert [attributes["id"] for tag, attributes in read.tags if tag == "section"] == [
        "quality",
        "recipes",
        "measured",
        "missing",
    ]
    assert "quality" not in read.all("li")
    assert "llama.cpp at batch 32: the machine has too little memory" in Reader(drawn["twelve"]).all("li")


def test_what_the_document_says_is_missing_is_not_said_twice():
    found = documents.single().model_copy(
        update={"not_measured": ("tasks: none were named (--tasks)", "errors of layers: not asked for")}
    )
    lines = Reader(page.render_page(found)).all("li")
    assert "tasks: none were named (--tasks)" in lines
    assert not {"tasks", "errors of single layers", "histograms of the weights"} & set(lines)
    assert "speed and memory" in lines


def test_a_document_without_a_candidate_is_drawn():
    empty = Document(bitwright="1", title="t", source=None, measurement=None, candidates=())
    assert "This document holds no candidate." in Reader(page.render_page(empty)).all("p")


def test_nothing_is_asked_from_outside(drawn):
    for text in drawn.values():
        for tag, attributes in Reader(text).tags:
            for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                value = attributes.get(name)
                assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,")
        assert "@import" not in text
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
        assert "http" not in styles(text)


def test_one_policy_lets_the_own_script_run_alone(drawn):
    for text in drawn.values():
        read = Reader(text)
        scripts = [i for i, (tag, _) in enumerate(read.tags) if tag == "script"]
        assert len(scripts) == 1
        digest = base64.b64encode(hashlib.sha256("".join(read.texts[scripts[0]]).encode()).digest()).decode()
        policy = next(a["content"] for tag, a in read.tags if tag == "meta" and "http-equiv" in a)
        assert "default-src 'none'" in policy
        assert f"script-src 'sha256-{digest}'" in policy


def test_identifiers_are_unique_and_every_reference_is_met(drawn):
    for text in drawn.values():
        read = Reader(text)
        names = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
        assert len(names) == len(set(names))
        wanted = set(re.findall(r"url\(#([^)]+)\)", text)) | {
            a["href"][1:] for _, a in read.tags if (a.get("href") or "").startswith("#")
        }
        assert wanted <= set(names)


def test_charts_follow_the_theme(drawn):
    for name in ("twelve", "hostile"):
        text = drawn[name]
        charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        assert len(charts) > 10
        for chart in charts:
            ElementTree.fromstring(chart)
            assert not re.search(r"(fill|stroke):\s*(#|rgb|black|white)", chart)
        used = set(re.findall(r"var\(--([a-z0-9]+)\)", text))
        light, dark = (
            set(re.findall(r"--([a-z0-9]+):", block))
            for block in re.findall(r":root \{([^}]*--paper[^}]*)\}", styles(text))
        )
        assert used <= light
        assert light == dark


def test_the_same_document_gives_the_same_page(drawn):
    document = documents.twelve()
    assert page.render_page(Document.from_json(json.loads(json.dumps(document.to_json())))) == drawn["twelve"]


def test_no_order_of_hashing_shows_in_the_page():
    code = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from bitwright.report.page import render_page
from tests.documents import deep
print(hashlib.sha256(render_page(deep()).encode()).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT)], env={**os.environ, "PYTHONHASHSEED": seed},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_names_from_strangers_are_only_text(drawn):
    text = drawn["hostile"]
    read = Reader(text)
    assert sum(tag == "script" for tag, _ in read.tags) == 1
    assert not any(tag == "img" for tag, _ in read.tags)
    assert sum(tag == "style" for tag, _ in read.tags) == 1
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert "49" not in {cell for rows in read.tables().values() for row in rows for cell in row}
    everything = " ".join("".join(part) for part in read.texts.values())
    for name in (
        "<script>alert(1)</script>",
        "$\\frac{a}{b}$ & $x$",
        "שלום עולם",
        "模型量化",
        "{{ 7 * 7 }}{% raw %}",
        "</style></svg></title>",
    ):
        assert name in everything
    # Recipes alone are whole, whatever is in them.
    assert "x" * 200 not in re.sub("<pre.*?</pre>", "", text, flags=re.DOTALL)
    assert "two\\x0alines" in everything


def test_recipes_are_yaml_that_reads_back(drawn):
    read = Reader(drawn["twelve"])
    blocks = ["".join(read.texts[i]) for i, (tag, _) in enumerate(read.tags) if tag == "pre"]
    recipe = next(block for block in blocks if block.startswith("method:"))
    assert yaml.safe_load(recipe) == dict(documents.twelve().candidates[0].recipe)


def changed(one: Candidate, **changes: Any) -> Candidate:
    return one.model_copy(update=changes)


@pytest.mark.parametrize(("value", "together"), [(math.nan, False), (math.nan, True), (math.inf, True), (0.0, True)])
def test_figures_that_are_no_numbers_do_not_stop_the_page(value, together):
    one = documents.candidate("a", 4.0, 0.003, blocks=2, speed=(), tasks=(), domains={}, loads_in={})
    found = one.quality
    kl = replace(found.kl, mean=value, error=value, median=value, p99=value, p999=value, max=value)
    model = replace(found.model, perplexity=value)
    odd = [
        changed(one, name="kl", quality=replace(found, kl=kl), layers=(), blocks=()),
        changed(one, name="model", quality=replace(found, model=model), layers=(), blocks=()),
        changed(one, name="source", quality=replace(found, source=model), layers=(), blocks=()),
        changed(one, name="layers", layers=tuple(replace(e, relative=value, snr_db=value or None) for e in one.layers)),
        changed(one, name="blocks", blocks=tuple(replace(e, own=value, total=value) for e in one.blocks)),
        changed(one, name="size", size=Size(weight_file_bytes=0, parameters=0, bits_per_weight=value)),
        changed(one, name="empty", histograms=(replace(one.histograms[0], edges=(), source=(), model=()),)),
    ]
    for strange in [odd] if together else [[strange] for strange in odd]:
        read = Reader(page.render_page(documents.document(*strange, blocks=1)))
        assert len(read.all("section")) > 3


def test_without_jinja2_the_mend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="jinja2") as caught:
        page.render_page(documents.bare())
    assert "bitwright[report]" in caught.value.mend


def test_without_matplotlib_too(monkeypatch):
    found = page.importlib.util.find_spec
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(InputError, match="matplotlib"):
        page.render_page(documents.bare())


# --- bitwright report ---------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    from bitwright.cli.report import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(documents.single().to_json()), encoding="utf-8")
    return file


def test_the_command_draws_what_was_saved(saved, drawn):
    done = command(saved)
    assert done.exit_code == 0, done.output
    assert saved.with_suffix(".html").read_text(encoding="utf-8") == drawn["single"]
    assert "hard to tell from the original" in done.output
    assert sorted(file.name for file in saved.parent.iterdir()) == ["results.html", "results.json"]


def test_an_existing_page_is_only_replaced_when_asked(saved, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("mine")
    done = command(saved, "-o", out)
    assert isinstance(done.exception, InputError)
    assert "--overwrite" in done.exception.mend
    assert out.read_text() == "mine"
    assert command(saved, "-o", out, "--overwrite").exit_code == 0
    assert out.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "names no schema"), ("[]", "names no schema"), ('{"schema": "bitwright-analyze-1"}', "'bitwright-analyze-1'"),
        ('{"schema": "bitwright-report-1"}', "bitwright"), ("no json", "results.json"), ("[" * 500 + "]" * 500, "deep"),
        ('{"schema": {"a": 1}}', "schema"),
    ],
)  # fmt: skip
def test_what_is_no_document_is_refused(saved, content, says):
    saved.write_text(content)
    done = command(saved)
    assert isinstance(done.exception, InputError), done.exception
    assert says in done.exception.message
    assert done.exception.mend
    assert not saved.with_suffix(".html").exists()


def test_a_wrong_value_is_named_by_its_place(saved):
    value = documents.single().to_json()
    value["candidates"][0]["size"]["weight_file_bytes"] = "\u001b[31mmuch"
    saved.write_text(json.dumps(value))
    done = command(saved)
    assert "candidates.0.size.weight_file_bytes" in done.exception.message


def test_outputs_that_cannot_be_are_refused_before_reading(saved, tmp_path):
    for out in (tmp_path / "page.txt", tmp_path / "nowhere" / "page.html"):
        assert isinstance(command(saved, "-o", out).exception, InputError)
    assert isinstance(command(tmp_path / "absent.json").exception, InputError)
