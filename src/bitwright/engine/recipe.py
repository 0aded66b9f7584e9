"""Recipes: one scheme, one method, one layout, and exceptions by layer. A YAML file or flags become a frozen ``Recipe``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bitwright import catalog
from bitwright.blocks.types import named
from bitwright.core.inputs import InputScheme
from bitwright.core.method import Method
from bitwright.core.options import build
from bitwright.errors import InputError
from bitwright.gguf.mixture import Override as TypeOverride
from bitwright.gguf.mixture import mixture
from bitwright.io.strict import load_yaml
from bitwright.model.roles import ROLES

__all__ = [
    "Budget", "Calibration", "Choice", "GgufChoice", "Override", "Recipe", "block_numbers", "load_recipe", "make_inputs", "make_method",
    "make_plugin", "make_recipe",
]  # fmt: skip


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


GroupSize = Annotated[int | Literal["channel", "tensor", "block"], BeforeValidator(_plain_group_size)]


class Choice(_Strict):
    """A plugin by name, with options. In YAML a bare name will do."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


def _choice(value: Any) -> Any:
    """``awq`` and ``{name: awq, alpha: 0.5}`` are short for ``{name: awq, options: {...}}``."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and "options" not in value and "name" in value:
        return {"name": value["name"], "options": {key: v for key, v in value.items() if key != "name"}}
    return value


AnyChoice = Annotated[Choice, BeforeValidator(_choice)]


class Override(_Strict):
    """An exception for some modules: those that every given condition holds for.

    pattern: matches the name (glob, or a regular expression after ``re:``). role: one of ``model.roles.ROLES``. layers: blocks, for
    example ``0-3,-1`` (negative numbers count from the end). keep: leave them in high precision. The first exception that holds
    counts. scheme replaces the recipe's scheme with all its options; the others change single values.
    """

    pattern: str = "*"
    role: str | None = None
    layers: str | None = None
    keep: bool = False
    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    scheme: str | None = None
    scheme_options: dict[str, Any] = Field(default_factory=dict)
    method: str | None = None
    method_options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.role is not None and self.role not in ROLES:
            raise ValueError(f"role '{self.role}' is unknown; use one of {', '.join(ROLES)}")
        if self.layers is not None:
            block_numbers(self.layers, 1)
        if self.method is not None:
            make_method(self.method, self.method_options)
        return self

    def title(self) -> str:
        """How messages call it."""
        given = [f"{key} {value}" for key, value in (("role", self.role), ("layers", self.layers)) if value is not None]
        return ", ".join([self.pattern, *given] if self.pattern != "*" or not given else given)


def block_numbers(text: str, count: int) -> frozenset[int]:
    """The blocks that ``layers`` names in a model of ``count`` blocks; ValueError where it is not such a list.

    >>> sorted(block_numbers("0-2,-1", 8))
    [0, 1, 2, 7]
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(-?\d+))?\s*", part)
        if match is None:
            raise ValueError(f"layers '{text}' is not a list such as 0-3,-1")
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        first, last = (number + count if number < 0 else number for number in (first, last))
        found.update(range(first, last + 1))
    return frozenset(found)


def _inputs(value: Any) -> Any:
    """``int8-tensor-static`` and the like, short for the fields of ``InputScheme``.

    >>> _inputs("fp8-tensor-static") == {"number": "float", "strategy": "tensor", "dynamic": False}
    True
    """
    if not isinstance(value, str):
        return value
    numbers: dict[str, dict[str, Any]] = {"int8": {}, "fp8": {"number": "float"}, "fp4": {"number": "float", "bits": 4}}
    first, *words = value.split("-")
    result: dict[str, Any] = dict(numbers.get(first, {}))
    known: dict[str, dict[str, Any]] = {
        "static": {"dynamic": False},
        "asym": {"symmetric": False},
        "token": {"strategy": "token"},
        "tensor": {"strategy": "tensor"},
    }
    if first not in numbers or any(word not in known for word in words):
        raise ValueError(f"'{value}' is not like int8-token, int8-tensor-static, int8-tensor-static-asym or fp8-token")
    for word in words:
        result |= known[word]
    return result


def _kv_cache(value: Any) -> Any:
    """``fp8`` and ``int8``: one static scale for the keys and one for the values of a layer."""
    return _inputs(f"{value}-tensor-static") if isinstance(value, str) and "-" not in value else _inputs(value)


InputsValue = Annotated[dict[str, Any], BeforeValidator(_inputs)]
KvCacheValue = Annotated[dict[str, Any], BeforeValidator(_kv_cache)]


class GgufChoice(_Strict):
    """What layout gguf needs to know, beside the method.

    type: a mixture such as Q4_K_M, or one type. imatrix: a file with importance weights, or ``auto``: collected from the calibration text.
    tensor_types: exceptions, ``PATTERN=TYPE`` (a regular expression that is searched in the tensor's name). pure: one type everywhere.
    pre: the name of the pre-tokenizer where it is not recognised. max_part_bytes: the file is split into parts of at most this size.
    """

    type: str = "Q4_K_M"
    imatrix: str | None = None
    tensor_types: tuple[str, ...] = ()
    embedding_type: str | None = None
    output_type: str | None = None
    pure: bool = False
    pre: str | None = None
    max_part_bytes: int | None = Field(default=None, ge=1_000_000)

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        mixture(self.type)
        for text in self.tensor_types:
            TypeOverride.parse(text)
        for name in (self.embedding_type, self.output_type):
            if name is not None:
                named(name)
        return self


class Budget(_Strict):
    """Bits under a budget: the scheme (or GGUF type) of every layer is chosen so that the predicted loss is smallest.

    bits_per_weight: over the layers that are quantized, scales and zero points included; or bytes: of all weight files together.
    candidates: what is on offer, for example ``3g64``, ``4g128``, ``nf4``, ``int8``, ``keep``, or GGUF types (default: by layout).
    sensitivity: how losses are predicted, see ``engine.sensitivity``; on samples x length tokens of the calibration text.
    """

    bits_per_weight: float | None = Field(default=None, gt=0, le=32)
    bytes: int | None = Field(default=None, ge=1)
    candidates: tuple[str, ...] = ()
    sensitivity: Literal["full", "blocks", "gram"] = "full"
    samples: int = Field(default=8, ge=1)
    length: int = Field(default=512, ge=8)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.bits_per_weight is None) == (self.bytes is None):
            raise ValueError("a budget is either bits_per_weight or bytes")
        return self


class Recipe(_Strict):
    """Everything that decides the bytes of the output. Unknown keys are refused.

    bits, group_size and symmetric are those of the scheme (None: its own defaults). inputs: how layer inputs are quantized, fields of
    ``core.inputs.InputScheme``; input_range: how their static ranges are found. transforms come first, in this order.
    """

    method: str = "gptq"
    method_options: dict[str, Any] = Field(default_factory=dict)
    scheme: str = "affine"
    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    scheme_options: dict[str, Any] = Field(default_factory=dict)
    inputs: InputsValue | None = None
    input_range: AnyChoice = Choice(name="minmax")
    kv_cache: KvCacheValue | None = None
    transforms: tuple[AnyChoice, ...] = ()
    layout: str = "compressed-tensors"
    layout_options: dict[str, Any] = Field(default_factory=dict)
    gguf: GgufChoice | None = None
    overrides: tuple[Override, ...] = ()
    budget: Budget | None = None
    head: bool = False
    embeddings: bool = False
    calibration: Calibration = Calibration()
    sequential: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    min_expert_tokens: int = Field(default=256, ge=0)
    strict: bool = False
    seed: int = Field(default=0, ge=0)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000_000)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """A ``gguf`` section means layout gguf, which rounds to nearest, as llama.cpp does, unless another method is named."""
        if not isinstance(values, Mapping):
            return values
        found = dict(values)
        if found.get("gguf") is not None:
            found.setdefault("layout", "gguf")
        if found.get("layout") == "gguf":
            found.setdefault("method", "rtn")
        return found

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        make_method(self.method, self.method_options)
        for name in (self.scheme, *(o.scheme for o in self.overrides if o.scheme)):
            catalog.check("schemes", name)
        catalog.check("layouts", self.layout)
        if self.gguf is not None and self.layout != "gguf":
            raise ValueError("the gguf section belongs to layout gguf")
        for transform in self.transforms:
            make_plugin("transforms", transform)
        if self.inputs is not None:
            make_inputs(self.inputs)
            make_plugin("ranges", self.input_range)
        if self.kv_cache is not None:
            make_inputs(self.kv_cache)
        return self

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of the recipe and of its exceptions."""
        found = [make_method(self.method, self.method_options)]
        return (*found, *(make_method(o.method, o.method_options) for o in self.overrides if o.method))

    @property
    def needs_calibration(self) -> bool:
        """True where calibration text may be needed: for a method, a transform, or static ranges."""
        static = [s for s in (self.inputs, self.kv_cache) if s is not None and not make_inputs(s).dynamic]
        blockwise = any(make_plugin("transforms", t).needs for t in self.transforms)
        return bool(static) or blockwise or any(method.needs for method in self.methods)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method called ``name`` with these options; InputError lists the options where one is unknown."""
    if name in catalog.names("transforms") and name not in catalog.names("methods"):
        raise InputError(
            f"{name} is a transform, which comes before a method",
            mend=f"use --transform {name} with --method search or gptq",
        )
    method = build(catalog.load("methods", name), options, f"method '{name}'")
    assert isinstance(method, Method)
    return method


def make_plugin(kind: str, choice: Choice) -> Any:
    """The plugin that a choice names, with its options."""
    return build(catalog.load(kind, choice.name), choice.options, f"{kind.removesuffix('s')} '{choice.name}'")


def make_inputs(values: Mapping[str, Any]) -> InputScheme:
    """How inputs are quantized, from the recipe's plain values."""
    found = build(InputScheme, values, "inputs")
    assert isinstance(found, InputScheme)
    return found


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values. Raises InputError that names every field that is wrong."""
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in item['loc']) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise InputError("the recipe is not valid: " + "; ".join(lines), mend="see docs/recipes.md") from error


def load_recipe(recipe: Path | str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file or a preset's name, with ``changes`` (from flags) on top."""
    named = "/" not in str(recipe) and not str(recipe).endswith((".yaml", ".yml"))
    path = catalog.preset(str(recipe)) if named and not Path(recipe).is_file() else Path(recipe)
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of options", mend="see docs/recipes.md")
    merged = {**values, **(changes or {})}
    if isinstance(values.get("calibration"), dict) and isinstance((changes or {}).get("calibration"), dict):
        merged["calibration"] = {**values["calibration"], **(changes or {})["calibration"]}
    return make_recipe(merged)
