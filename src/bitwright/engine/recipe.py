"""Recipes: one scheme, one method, one layout, and exceptions by layer. A YAML file or flags become a frozen ``Recipe``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bitwright import catalog
from bitwright.core.method import Method
from bitwright.errors import InputError
from bitwright.io.strict import load_yaml

__all__ = ["Calibration", "Override", "Recipe", "load_recipe", "make_recipe"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Strict):
    """Which text the statistics come from.

    text: a text file, a JSONL file (``field`` names the text), a local or hub dataset (``dataset:NAME[:SPLIT]``), or None: then the
    model samples its own text. samples x length tokens are used. packing: "pack" joins texts and cuts windows of exactly
    ``length`` tokens; "rows" takes one text a sample, cut at ``length``. shuffle: a seeded choice among all windows or rows; without
    it the first ones are taken.
    """

    text: str | None = None
    field: str = "text"
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=8)
    packing: Literal["pack", "rows"] = "pack"
    shuffle: bool = True
    chat_template: bool = False
    special_tokens: bool = False


def _plain_group_size(value: Any) -> Any:
    """-1 means one group over all columns, as elsewhere in the field; digits may come as text."""
    if value in (-1, "-1"):
        return "channel"
    return int(value) if isinstance(value, str) and value.isdigit() else value


GroupSize = Annotated[int | Literal["channel", "tensor"], BeforeValidator(_plain_group_size)]


class Override(_Strict):
    """An exception: for modules whose name matches ``pattern`` (glob, or a regular expression after ``re:``)."""

    pattern: str
    keep: bool = False
    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    method: str | None = None


class Recipe(_Strict):
    """Everything that decides the bytes of the output. Unknown keys are refused."""

    method: str = "gptq"
    method_options: dict[str, Any] = Field(default_factory=dict)
    scheme: str = "affine"
    bits: int = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    scheme_options: dict[str, Any] = Field(default_factory=dict)
    layout: str = "compressed-tensors"
    layout_options: dict[str, Any] = Field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    head: bool = False
    embeddings: bool = False
    calibration: Calibration = Calibration()
    sequential: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    min_expert_tokens: int = Field(default=256, ge=0)
    strict: bool = False
    seed: int = Field(default=0, ge=0)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000_000)

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        make_method(self.method, self.method_options)
        for kind, name in (("schemes", self.scheme), ("layouts", self.layout)):
            if name.replace("_", "-") not in catalog.names(kind):
                catalog.load(kind, name)
        return self

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method called ``name`` with these options; InputError lists the options where one is unknown."""
    from dataclasses import fields

    plugin = catalog.load("methods", name)
    known = {f.name: f for f in fields(plugin)}
    for key, value in options.items():
        if key not in known:
            raise InputError(
                f"method '{name}' has no option '{key}'", mend=f"its options are: {', '.join(sorted(known)) or 'none'}"
            )
        default = known[key].default
        # A whole number serves as a float, nothing else stands in for another type.
        right = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if not right:
            raise InputError(f"option '{key}' of method '{name}' is like {default!r}, not {value!r}")
    method = plugin(**options)
    assert isinstance(method, Method)
    return method


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values. Raises InputError that names every field that is wrong."""
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in item['loc']) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise InputError("the recipe is not valid: " + "; ".join(lines), mend="see docs/recipes.md") from error


def load_recipe(path: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file, with ``changes`` (from flags) on top."""
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of options", mend="see docs/recipes.md")
    merged = {**values, **(changes or {})}
    if isinstance(values.get("calibration"), dict) and isinstance((changes or {}).get("calibration"), dict):
        merged["calibration"] = {**values["calibration"], **(changes or {})["calibration"]}
    return make_recipe(merged)
