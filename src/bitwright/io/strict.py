"""Strict parsers for files that somebody else wrote."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from bitwright.errors import InputError
from bitwright.io.files import read_small_file
from bitwright.io.text import printable, quoted

__all__ = ["MAX_JSON_BYTES", "load_json", "load_yaml", "parse_json", "parse_yaml", "printable", "quoted"]

#: tokenizer.json of the largest vocabularies is about 35 MB
MAX_JSON_BYTES = 100 * 2**20
MAX_YAML_BYTES = 2**20
#: the same number as in PyYAML's own habit of nesting: recipes need three
MAX_YAML_DEPTH = 32

# Possessive, and the closing quote is optional: linear time on any input, also on unterminated strings.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def load_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_depth: int = 64, allow_infinity: bool = False) -> Any:
    """The parsed JSON file ``path``; see ``parse_json``. Raises InputError also where it cannot be read."""
    data = read_small_file(path, max_bytes=max_bytes)
    return parse_json(data, str(path), max_bytes=max_bytes, max_depth=max_depth, allow_infinity=allow_infinity)


def parse_json(
    data: bytes,
    where: str,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = 64,
    allow_infinity: bool = False,
) -> Any:
    """Parse ``data`` as one UTF-8 JSON value; ``where`` names it in messages.

    Refused with InputError: more than ``max_bytes`` bytes, nesting beyond ``max_depth`` (checked before the recursive
    parser runs), duplicate keys, NaN, numbers that overflow, lone surrogates, and whatever is not JSON.
    allow_infinity: accept ``Infinity``, which published configs use for open limits (``time_step_limit``).
    """
    where = printable(where)
    if len(data) > max_bytes:
        raise InputError(f"{where}: {len(data)} bytes of JSON, at most {max_bytes} are read", mend="check the file")
    depth = _json_depth(data)
    if depth > max_depth:
        raise InputError(f"{where}: JSON nested {depth} deep, at most {max_depth} is read", mend="check the file")

    def reject(constant: str) -> float:
        if allow_infinity and constant != "NaN":
            return float(constant)
        raise InputError(f"{where}: the number {constant} is not JSON", mend="replace it in the file")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else reject("Infinity")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise InputError(f"{where}: duplicate key {quoted(_first_duplicate(pairs))}", mend="keep one of them")
        return result

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=reject, parse_float=number)
        if "\\u" in text:  # only an escape can make a lone surrogate: the decoder refused raw ones
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise InputError(f"{where}: not valid UTF-8 ({error.reason})", mend=_MEND) from None  # type: ignore[attr-defined]
    except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
        raise InputError(f"{where}: not valid JSON ({printable(str(error))})", mend=_MEND) from None
    return value


_MEND = "check that the file was copied or downloaded whole"


def _json_depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings, without recursion."""
    brackets = _STRING.sub(b"", data).translate(None, delete=_NOT_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _first_duplicate(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return ""


class _Loader(yaml.SafeLoader):
    """SafeLoader without dates, merge keys, duplicate keys and numbers that are not finite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        result = super().construct_mapping(node, deep=deep)
        if len(result) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "duplicate key", node.start_mark)
        return result

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge key '<<'", key.start_mark)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(None, None, "a number that is not finite", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(path: Path, *, max_bytes: int = MAX_YAML_BYTES, max_depth: int = MAX_YAML_DEPTH) -> Any:
    """The parsed YAML file ``path``; see ``parse_yaml``. Raises InputError also where it cannot be read."""
    return parse_yaml(read_small_file(path, max_bytes=max_bytes), str(path), max_bytes=max_bytes, max_depth=max_depth)


def parse_yaml(data: bytes, where: str, *, max_bytes: int = MAX_YAML_BYTES, max_depth: int = MAX_YAML_DEPTH) -> Any:
    """Parse ``data`` as one UTF-8 YAML document of plain values; an empty one is None.

    Refused with InputError: more than ``max_bytes`` bytes, nesting beyond ``max_depth``, anchors and aliases, tags,
    merge keys, duplicate keys, infinities and NaN, several documents.
    """
    where = printable(where)
    if len(data) > max_bytes:
        raise InputError(f"{where}: {len(data)} bytes of YAML, at most {max_bytes} are read", mend="check the file")
    try:
        text = data.decode("utf-8")
        # Events come from a state machine, so that deep nesting is met here and not in the recursive composer.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise InputError(f"{where}, line {line}: anchors and aliases are refused", mend="write the value out")
            if getattr(event, "tag", None):
                raise InputError(f"{where}, line {line}: YAML tags are refused", mend="remove the tag")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > max_depth:
                raise InputError(f"{where}, line {line}: YAML nested more than {max_depth} deep", mend="flatten it")
        return yaml.load(text, Loader=_Loader)
    except UnicodeError:
        raise InputError(f"{where}: not valid UTF-8", mend="save the file as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = printable(" ".join(str(error).split())[:500])
        raise InputError(f"{where}: not valid YAML ({reason})", mend="mend the line that is named") from None
