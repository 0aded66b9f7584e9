"""The user's cache: entries are whole or absent, the oldest go first, and its folder may be anywhere or broken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitwright.errors import InputError
from bitwright.io.cache import cache_folder, cached_folder


def writing(text: str, calls: list[str] | None = None, size: int = 10):
    def build(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "value").write_text(text * size)

    return build


def test_the_folder_is_the_user_s_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("BITWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bitwright"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "bitwright"


def test_an_entry_is_built_once(tmp_path):
    calls: list[str] = []
    first = cached_folder("kind", "key", writing("a", calls), root=tmp_path)
    again = cached_folder("kind", "key", writing("b", calls), root=tmp_path)
    other = cached_folder("kind", "other", writing("c", calls), root=tmp_path)
    assert first == again != other
    assert calls == ["a", "c"]
    assert (again / "value").read_text() == "a" * 10


def test_what_fails_half_way_leaves_nothing(tmp_path):
    def failing(folder: Path) -> None:
        (folder / "value").write_text("half")
        raise InputError("no")

    with pytest.raises(InputError):
        cached_folder("kind", "key", failing, root=tmp_path)
    assert list((tmp_path / "kind").iterdir()) == []
    assert (cached_folder("kind", "key", writing("a"), root=tmp_path) / "value").is_file()


def test_an_entry_that_is_not_whole_is_built_anew(tmp_path):
    entry = cached_folder("kind", "key", writing("a"), root=tmp_path)
    (entry / "done").unlink()
    calls: list[str] = []
    cached_folder("kind", "key", writing("b", calls), root=tmp_path)
    assert calls == ["b"]


def test_the_entries_used_longest_ago_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_CACHE_BYTES", "250")
    for number, key in enumerate(("old", "middle")):
        entry = cached_folder("kind", key, writing(key[0], size=100), root=tmp_path)
        os.utime(entry / "done", ns=(number, number))
    cached_folder("kind", "old", writing("x"), root=tmp_path)  # used again: now the newest
    cached_folder("kind", "new", writing("n", size=100), root=tmp_path)
    assert sorted(entry.name for entry in (tmp_path / "kind").iterdir()) == ["new", "old"]
    # One that is larger than everything allowed is still there for the run that needs it.
    entry = cached_folder("kind", "large", writing("l", size=1000), root=tmp_path)
    assert [found.name for found in (tmp_path / "kind").iterdir()] == ["large"]
    assert (entry / "value").is_file()


def test_a_limit_that_is_no_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_CACHE_BYTES", "lots")
    with pytest.raises(InputError, match="BITWRIGHT_CACHE_BYTES 'lots'"):
        cached_folder("kind", "key", writing("a"), root=tmp_path)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        cached_folder("kind", "key", writing("a"), root=tmp_path / "file")
