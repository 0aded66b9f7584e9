"""Plugins, found by listing folders and imported only when asked for by name.

``methods/hqq.py`` that defines ``METHOD`` is a new method; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from bitwright.core.inputs import InputScheme
from bitwright.core.scheme import Scheme
from bitwright.errors import InputError

__all__ = ["KINDS", "check", "load", "load_scheme", "names", "preset"]

#: folder -> the attribute that a plugin file defines
KINDS = {
    "schemes": "SCHEME",
    "methods": "METHOD",
    "transforms": "TRANSFORM",
    "ranges": "RANGE",
    "layouts": "LAYOUT",
    "kernels": "KERNEL",
}
#: the folder of recipes by name, which are YAML files
PRESETS = "presets"
#: files in these folders that are helpers, not plugins
_HELPERS = {"reference"}


def names(kind: str) -> list[str]:
    """Every plugin of a kind, by file name, without importing any.

    >>> "rtn" in names("methods")
    True
    """
    if kind not in KINDS and kind != PRESETS:
        raise InputError(f"'{kind}' is not a kind of plugin", mend=f"use one of {', '.join(KINDS)}")
    folder = Path(__file__).parent / kind
    stems = (file.stem for file in folder.glob("*.yaml" if kind == PRESETS else "*.py"))
    return sorted(stem.replace("_", "-") for stem in stems if not stem.startswith("_") and stem not in _HELPERS)


def check(kind: str, name: str) -> str:
    """The name as the catalog spells it. Raises InputError that lists the known names."""
    known = names(kind)
    wanted = name.replace("_", "-")
    if wanted not in known:
        what = kind.removesuffix("s")
        raise InputError(f"{what} '{name}' is unknown", mend=f"use one of: {', '.join(known)}")
    return wanted


def load(kind: str, name: str) -> Any:
    """The plugin class or object called ``name``. Raises InputError that lists the known names."""
    wanted = check(kind, name)
    module = importlib.import_module(f"bitwright.{kind}.{wanted.replace('-', '_')}")
    return getattr(module, KINDS[kind])


def preset(name: str) -> Path:
    """The file of the recipe called ``name``. Raises InputError that lists the known names."""
    return Path(__file__).parent / PRESETS / f"{check(PRESETS, name)}.yaml"


def load_scheme(spec: dict[str, Any]) -> Scheme:
    """A scheme from the JSON object that ``Scheme.to_spec`` wrote."""
    options = dict(spec)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise InputError("a scheme needs a 'kind'", mend=f"use one of: {', '.join(names('schemes'))}")
    inputs = options.pop("inputs", None)
    try:
        if inputs is not None:
            options["inputs"] = inputs if isinstance(inputs, InputScheme) else InputScheme(**inputs)
        scheme = load("schemes", kind)(**options)
    except TypeError as error:
        raise InputError(f"scheme '{kind}' does not take these options: {error}", mend="see the docs") from error
    assert isinstance(scheme, Scheme)
    return scheme
