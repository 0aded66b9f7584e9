"""The document: everything that was measured of one source model and its quantized versions, in a versioned schema.

``bitwright eval --json`` and ``bitwright compare`` write it; the page and the tables are drawn from it and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bitwright.evaluation.record import BlockError, LayerError, Quality, Speed, TaskScore, WeightHistogram

__all__ = ["SCHEMA", "Activation", "Candidate", "Document", "GateLine", "GateResult", "Measurement", "Origin", "Size"]

#: Changes when the meaning of a key does.
SCHEMA: Literal["bitwright-report-1"] = "bitwright-report-1"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Size(_Model):
    """weight_file_bytes: all weight files. bits_per_weight: over all parameters; quantized_*: of quantized layers alone."""

    weight_file_bytes: int
    parameters: int | None = None
    bits_per_weight: float | None = None
    quantized_bits_per_weight: float | None = None


class Origin(_Model):
    """Where weights come from. files: file name -> fingerprint."""

    name: str
    model_type: str | None = None
    files: Mapping[str, str] = Field(default_factory=dict)
    size: Size | None = None


class Measurement(_Model):
    """How quality was measured. convention: ``non-overlapping``, ``sliding`` or ``llama.cpp``; texts: name -> tokens that it has."""

    convention: str
    length: int
    stride: int | None
    windows: int
    dtype: str
    texts: Mapping[str, int]
    special_tokens: bool = False


class Activation(_Model):
    """One input of linears of the source model, as ``bitwright analyze`` sees it."""

    block: int
    label: str
    largest: float
    lost_bits_tensor: float
    lost_bits_token: float
    advice: str


class GateLine(_Model):
    """One limit. sentence: what it came to, in words."""

    name: str
    relation: Literal["<", "<=", ">", ">="]
    limit: float
    value: float
    passed: bool
    sentence: str


class GateResult(_Model):
    """All limits of one candidate; passed where every line is."""

    passed: bool
    lines: tuple[GateLine, ...]


class Candidate(_Model):
    """One quantized version. recipe, hashes, fallbacks, notes: from its ``bitwright.json``, empty where another tool made it.

    domains: name of a text -> quality on it, where several were given. loads_in: engine -> None, or why not. seconds: what quantizing
    took, where ``compare`` did it.
    """

    name: str
    layout: str
    method: str | None = None
    scheme: str | None = None
    size: Size
    quality: Quality | None = None
    domains: Mapping[str, Quality] = Field(default_factory=dict)
    blocks: tuple[BlockError, ...] = ()
    layers: tuple[LayerError, ...] = ()
    histograms: tuple[WeightHistogram, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    speed: tuple[Speed, ...] = ()
    gate: GateResult | None = None
    loads_in: Mapping[str, str | None] = Field(default_factory=dict)
    recipe: Mapping[str, Any] = Field(default_factory=dict)
    files: Mapping[str, str] = Field(default_factory=dict)
    hashes: Mapping[str, str] = Field(default_factory=dict)
    fallbacks: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float | None = None


class Document(_Model):
    """The whole report. source: None where no original was given. not_measured: what a reader might look for, and why it is missing.

    environment: versions of the libraries and the processor.
    """

    schema_: Literal["bitwright-report-1"] = Field(default=SCHEMA, alias="schema")
    bitwright: str
    title: str
    source: Origin | None
    source_speed: tuple[Speed, ...] = ()
    measurement: Measurement | None
    candidates: tuple[Candidate, ...]
    activations: tuple[Activation, ...] = ()
    environment: Mapping[str, str] = Field(default_factory=dict)
    not_measured: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the file holds them."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, value: Any) -> Document:
        """The document from what ``to_json`` gave; pydantic's ValidationError where it is none."""
        return cls.model_validate(value)
