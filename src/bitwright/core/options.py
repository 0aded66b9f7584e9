"""Options of plugins: dataclass fields, checked by name and type before the plugin is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from bitwright.errors import InputError

__all__ = ["build"]


def build(plugin: Any, options: Mapping[str, Any], what: str) -> Any:
    """``plugin(**options)``; InputError lists the options where one is unknown, and shows a default where a type is wrong.

    what: how the plugin is called in messages, for example ``method 'gptq'``.
    """
    known = {field.name: field for field in fields(plugin) if field.init}
    for key, value in options.items():
        if key not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise InputError(f"{what} has no option '{key}'", mend=f"its options are: {listed}")
        default = known[key].default
        if default is MISSING or default is None or value is None:
            continue
        # A whole number serves as a float, nothing else stands in for another type; ``float | str`` names what else there is.
        named = type(value).__name__ in str(known[key].type).split(" | ")
        right = named or type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if not right and not (isinstance(default, tuple) and isinstance(value, list | tuple)):
            raise InputError(f"option '{key}' of {what} is like {default!r}, not {value!r}")
    return plugin(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
