import json
import os
import time

import pytest

from bitwright.errors import InputError
from bitwright.io.strict import load_json, load_yaml, parse_json, parse_yaml
from bitwright.io.text import printable, quoted


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "duplicate key 'a'"),
        (b"[" * 65 + b"]" * 65, "nested 65 deep"),
        (b"[" * 3_000_000, "nested 3000000 deep"),
        (b'{"a":' * 500_000, "nested"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "Infinity"),
        (b"1" * 5000, "not valid JSON"),
        (b'"\\ud800"', "UTF-8"),
        (b'{"\\udfff": 1}', "UTF-8"),
        (b'"\xff"', "UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b"", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"a": "\x01"}', "not valid JSON"),
    ],
    ids=range(18),
)
def test_json_that_is_not_sound_is_refused_and_the_file_named(data, reason):
    with pytest.raises(InputError, match=r"folder/config\.json") as caught:
        parse_json(data, "folder/config.json")
    assert reason in str(caught.value)


def test_json_equals_the_standard_parser_on_sound_input():
    document = {"a": [1, 2.5, -3, None, True, 'x"[{\\', {"é\U0001f600": []}], "deep": [[[[[[]]]]]]}
    for text in (json.dumps(document), json.dumps(document, ensure_ascii=False, indent=1)):
        assert parse_json(text.encode(), "x") == document


def test_brackets_inside_strings_are_not_depth():
    assert parse_json(json.dumps(["[" * 1000 + '"{\\']).encode(), "x") == ["[" * 1000 + '"{\\']


def test_infinity_is_accepted_only_where_asked_for():
    assert parse_json(b"[0.0, Infinity]", "x", allow_infinity=True) == [0.0, float("inf")]
    with pytest.raises(InputError, match="NaN"):
        parse_json(b"[NaN]", "x", allow_infinity=True)


@pytest.mark.parametrize("data", [b'"' + b'\\"' * 1_000_000, b'"\\' * 1_000_000, b'"' * 2_000_001])
def test_unterminated_strings_take_linear_time(data):
    start = time.monotonic()
    with pytest.raises(InputError):
        parse_json(data, "x")
    assert time.monotonic() - start < 3


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        load_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="not a regular file"):
        load_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        load_json(tmp_path / "pipe")
    (tmp_path / "big.json").write_bytes(b" " * 101)
    with pytest.raises(InputError, match=r"big\.json: 101 bytes, at most 100"):
        load_json(tmp_path / "big.json", max_bytes=100)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x [1]\nb: *x", "line 1: anchors"),
        ("a: *x", "anchors"),
        ("a: 1\na: 2", "duplicate key"),
        ("b:\n  a: 1\n  a: 2", "duplicate key"),
        ("<<: {a: 1}\nb: 2", "merge key"),
        ("!!python/object/apply:os.system [id]", "tags"),
        ("a: !!binary aGk=", "tags"),
        ("[" * 100_000, "nested more than 32"),
        ("a: .nan", "not finite"),
        ("a: -.inf", "not finite"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: \x1b[31m", "not valid YAML"),
    ],
    ids=range(14),
)
def test_yaml_that_is_not_plain_is_refused_and_the_file_named(tmp_path, text, reason):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"recipe\.yaml") as caught:
        load_yaml(path)
    assert reason in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_yaml_plain_values_are_read():
    text = (
        b"scheme: {kind: affine, bits: 4}\nkeep: [lm_head, '*.gate']\nseed: 0\nratio: 0.5\nnote: 2024-01-99\nnone: ~\n"
    )
    assert parse_yaml(text, "x") == {
        "scheme": {"kind": "affine", "bits": 4},
        "keep": ["lm_head", "*.gate"],
        "seed": 0,
        "ratio": 0.5,
        "note": "2024-01-99",
        "none": None,
    }
    assert parse_yaml(b"", "x") is None


def test_printable_escapes_what_a_terminal_would_obey():
    hostile = "a\x1b]0;title\x07\x9b31m\r\n\u202eevil\u200b\U000e0041é漢😀"
    shown = printable(hostile)
    assert shown.isprintable()
    assert shown.endswith("é漢😀")
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert len(quoted("x" * 10_000)) < 300
