"""The built-in texts are what they claim to be: parsed by Python, JSON and SQLite, recomputed, looked up in the Unicode tables."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import unicodedata
import warnings
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitwright.evaluation.edge_cases import edge_case_texts

STORY = Path(__file__).parents[3] / "examples" / "storylm-8m"
DOMAINS = ("long", "languages", "code", "digits", "markup", "unicode", "repetition")


@pytest.fixture(scope="module", params=[0, 7])
def texts(request):
    return edge_case_texts(request.param)


def snippets(text, language):
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


def test_the_same_seed_gives_the_same_texts_and_another_one_does_not():
    assert edge_case_texts(3) == edge_case_texts(3)
    first, second = edge_case_texts(0), edge_case_texts(1)
    assert all(first[name] != second[name] for name in DOMAINS)


def test_every_domain_is_there_and_long_enough(texts):
    assert tuple(texts) == DOMAINS
    assert all(len(text) >= 2000 for text in texts.values())
    assert len(texts["long"]) >= 20_000


def test_the_texts_are_valid_unicode(texts):
    for text in texts.values():
        assert text.encode("utf-8").decode("utf-8") == text


def test_every_tokenizer_length_is_beyond_a_window(texts):
    from bitwright.engine.calibration import load_tokenizer

    tokenizer = load_tokenizer(STORY)
    counts = {name: len(tokenizer(text, verbose=False)["input_ids"]) for name, text in texts.items()}
    assert min(counts.values()) > 512, counts
    assert counts["long"] > 4000


def test_arithmetic_is_right(texts):
    lines = re.findall(r"^(\d+) (\+|-|\*|//|%) (\d+) = (-?\d+)$", texts["digits"], re.MULTILINE)
    assert len(lines) >= 24
    assert {operation for _, operation, _, _ in lines} == {"+", "-", "*", "//", "%"}
    for a, operation, b, result in lines:
        assert eval(f"{a} {operation} {b}") == int(result)
    assert texts["digits"].count(" = ") == len(lines)


def test_tables_dates_and_numbers_are_well_formed(texts):
    text = texts["digits"]
    rows = re.findall(r"^\| [a-z]+ \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) >= 6
    assert all(int(amount) * int(price) == int(total) for amount, price, total in rows)
    dates = re.findall(r"^\d{4}-.*Z$", text, re.MULTILINE)
    assert len([datetime.fromisoformat(date) for date in dates]) >= 2
    assert len([int(value, 16) for value in re.findall(r"0x[0-9A-F]{8} ([0-9a-f]{32})", text)]) >= 2


def test_python_compiles_and_computes(texts):
    found = snippets(texts["code"], "python")
    assert found
    for source in found:
        scope: dict = {"__name__": "snippet"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(source, "snippet", "exec", dont_inherit=True), scope)
        (total,) = (value for name, value in scope.items() if name.startswith("total_"))
        (kind,) = (v for v in scope.values() if isinstance(v, type) and v.__module__ == "snippet")
        assert total([kind("a", 1000), kind("b", 0), kind("c", 500)]) == 1500


def test_json_parses(texts):
    found = [json.loads(part) for part in snippets(texts["code"], "json")]
    assert found
    assert all(len(value["items"]) == 3 and value["parent"] is None for value in found)


def test_sql_is_understood_by_sqlite(texts):
    found = snippets(texts["code"], "sql")
    assert found
    for query in found:
        noun, other = re.search(r"FROM (\w+) AS a\nLEFT JOIN (\w+) AS b", query).groups()
        group, field = re.search(r"a\.(\w+),.*AVG\(b\.(\w+)\)", query).groups()
        with sqlite3.connect(":memory:") as database:
            database.execute(f"CREATE TABLE {noun} (id INTEGER, name TEXT, {group} INTEGER)")
            database.execute(f"CREATE TABLE {other} ({noun.removesuffix('s')}_id INTEGER, {field} REAL)")
            database.execute(query)
        database.close()


def test_braces_of_c_balance_and_shells_can_read_the_scripts(texts):
    found = snippets(texts["code"], "c")
    assert found
    for source in found:
        assert source.count("{") == source.count("}") > 0
        assert source.count("(") == source.count(")")
    for source in snippets(texts["code"], "sh"):
        assert source.startswith("#!/bin/sh\n")
        done = subprocess.run(["sh", "-n"], input=source, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_html_tags_close_in_order(texts):
    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.closed = [], 0

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag
            self.closed += 1

    checker = Checker()
    for section in re.findall(r"<section.*?</section>", texts["markup"], re.DOTALL):
        checker.feed(section)
    assert checker.closed > 20
    assert not checker.open
    assert texts["markup"].count("\\begin{equation}") == texts["markup"].count("\\end{equation}") > 1
    for equation in re.findall(r"\\begin.*?\\end\{equation\}", texts["markup"], re.DOTALL):
        assert equation.count("{") == equation.count("}")


def test_languages_come_in_many_scripts(texts):
    scripts = {unicodedata.name(c).split()[0] for c in texts["languages"] if c.isalpha()}
    wanted = {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "THAI", "HIRAGANA", "HANGUL"}
    assert wanted | {"CJK"} <= scripts


def test_unusual_characters_are_there(texts):
    text = texts["unicode"]
    categories = {unicodedata.category(c) for c in text}
    assert {"Mn", "Cf", "So", "Sm", "Lo", "Ll"} <= categories
    assert any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)
    assert any(ord(c) > 0xFFFF for c in text)
    assert "\u200d" in text
    assert unicodedata.normalize("NFC", text) != text


def test_repetition_repeats(texts):
    """It compresses far better than the others."""
    import zlib

    ratio = {name: len(zlib.compress(text.encode(), 9)) / len(text.encode()) for name, text in texts.items()}
    assert ratio["repetition"] < 0.12
    assert ratio["repetition"] < 0.7 * min(value for name, value in ratio.items() if name not in ("repetition", "long"))
