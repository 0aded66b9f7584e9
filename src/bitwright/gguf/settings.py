"""Keys of a GGUF file and the entries of ``config.json`` that they come from, in both directions.

A ``Setting`` writes some keys of an architecture (named here without its prefix) and reads them back. Types are exact, because llama.cpp
refuses any other: u32 for counts, f32 for everything real, bool for flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError, PlanError
from bitwright.io.gguf_values import GgufValue, boolean, f32, u32
from bitwright.io.text import quoted

__all__ = [
    "REQUIRED",
    "Derived",
    "Fixed",
    "HeadDim",
    "Key",
    "Model",
    "Only",
    "Plain",
    "Present",
    "Setting",
    "Stored",
    "Unused",
    "join",
    "shortest",
]

#: stands for "there is no default"
REQUIRED: Any = object()
_U32 = 2**32 - 1
#: no model has more blocks, heads or experts, or is wider; beyond it a config is damaged, and lists made from it would fill the memory
_MANY, _WIDE = 2**14, 2**20
#: other spellings that transformers itself writes
_SYNONYMS = {"num_experts": "num_local_experts"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint's config as settings and row orders see it: one dictionary, common names, checked types.

    where: for messages. config: ``config.json``, a nested ``text_config`` laid over it. aliases: common name -> this config's own.
    folder: of the checkpoint, where there is one.
    """

    where: str
    config: Mapping[str, Any]
    aliases: Mapping[str, str]
    folder: Path | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """An entry under its common name or this config's own; ``null`` counts as absent. A dot goes one level down."""
        for spelling in (self.aliases.get(name, name), name, _SYNONYMS.get(name, name)):
            value: Any = self.config
            for part in spelling.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        if default is REQUIRED:
            raise InputError(f"{self.where}: no {quoted(name)}", mend="the config is incomplete; download it again")
        return default

    def integer(self, name: str, default: Any = REQUIRED) -> int:
        """An entry that must be a whole number of 0 or more."""
        value = self.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _U32:
            raise InputError(f"{self.where}: {quoted(name)} is {quoted(repr(value))}", mend="it must be a whole number")
        return value

    def count(self, name: str, default: Any = REQUIRED, *, most: int = _U32) -> int:
        """An entry that must be a whole number of 1 to ``most``."""
        value = self.integer(name, default)
        if not 1 <= value <= most:
            raise InputError(f"{self.where}: {quoted(name)} is {value}", mend=f"it must be 1 to {most}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """An entry that must be a finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{self.where}: {quoted(name)} is {quoted(repr(value))}", mend="it must be a number")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """An entry that must be true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {quoted(name)} is {quoted(repr(value))}", mend="it must be true or false")
        return value

    @property
    def blocks(self) -> int:
        """Number of decoder or encoder blocks."""
        return self.count("num_hidden_layers", most=_MANY)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.count("hidden_size", most=_WIDE)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.count("num_attention_heads", most=_MANY)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        own = self.count("num_key_value_heads", self.heads)
        if self.heads % own:
            raise InputError(f"{self.where}: {self.heads} heads do not share {own} keys", mend="check the config")
        return own

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.count("head_dim", max(1, self.hidden // self.heads), most=_WIDE)

    @property
    def experts(self) -> int:
        """Experts of a block, 0 for a dense model."""
        found = self.integer("num_experts", 0)
        if found > _MANY:
            raise InputError(f"{self.where}: {found} experts", mend="check the config")
        return found


class Stored(Protocol):
    """A GGUF file as settings see it, keys without the architecture's prefix."""

    @property
    def where(self) -> str:
        """The file, for messages."""

    @property
    def model(self) -> Model:
        """The config as far as it has been rebuilt."""

    def get(self, name: str, default: Any = None) -> Any:
        """A scalar key's value, or the elements of an array key."""

    def number(self, name: str, default: float) -> float:
        """A key that must be a finite float."""

    def integer(self, name: str, default: int) -> int:
        """A key that must be a whole number."""

    def has(self, tensor: str) -> bool:
        """Whether the file holds this tensor."""

    def read(self, tensor: str) -> NDArray[np.float32]:
        """A small tensor, decoded and flat."""


class Setting(Protocol):
    """Some keys, from the config and back."""

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """The keys, without prefix. InputError where the config does not fit."""

    def generate(self, model: Model) -> Mapping[str, NDArray[np.float32]]:
        """Tensors that no tensor of the checkpoint stands behind."""

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """Entries of the config, under their common names."""

    def notes(self, model: Model) -> Sequence[str]:
        """What llama.cpp will compute otherwise, in sentences."""


def shortest(value: float) -> float:
    """The shortest decimal that means the same float32: what a config said before it went through one.

    >>> shortest(float(np.float32(1e-5)))
    1e-05
    """
    return float(str(np.float32(value)))


class Plain:
    """A setting that generates no tensor and has nothing to remark."""

    def notes(self, model: Model) -> Sequence[str]:
        """None."""
        del model
        return ()

    def generate(self, model: Model) -> Mapping[str, NDArray[np.float32]]:
        """None."""
        del model
        return {}


@dataclass(frozen=True)
class Key(Plain):
    """One key from one entry. kind: u32, f32 or bool. default: where the config is silent; None: then the key is not written.

    absent: what the entry is where a GGUF file has no such key; None: it is left out.
    """

    name: str
    config: str
    kind: str = "u32"
    default: Any = REQUIRED
    absent: Any = None

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """The key, or nothing."""
        if model.get(self.config, self.default) is None:
            return {}
        if self.kind == "bool":
            return {self.name: boolean(model.flag(self.config, self.default))}
        if self.kind == "f32":
            return {self.name: f32(model.number(self.config, self.default))}
        return {self.name: u32(model.integer(self.config, self.default))}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """The entry, float32 as the shortest decimal that means it."""
        value = stored.get(self.name, self.absent)
        if value is None:
            return {}
        if self.kind == "f32":
            return {self.config: shortest(stored.number(self.name, 0.0))}
        if self.kind == "u32":
            return {self.config: stored.integer(self.name, 0)}
        if not isinstance(value, bool):
            raise InputError(f"{stored.where}: key {quoted(self.name)} is no flag", mend="the file is damaged")
        return {self.config: value}


@dataclass(frozen=True)
class Fixed(Plain):
    """A key that is the same for every model of the architecture."""

    name: str
    value: GgufValue

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """The key."""
        del model
        return {self.name: self.value}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """Nothing: it says nothing that the class does not."""
        del stored
        return {}


@dataclass(frozen=True)
class Derived(Plain):
    """A key whose value follows from several entries. config: the entry that takes its value on the way back, if any."""

    name: str
    value: Callable[[Model], GgufValue]
    config: str | None = None

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """The key."""
        return {self.name: self.value(model)}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """The entry."""
        if self.config is None or stored.get(self.name) is None:
            return {}
        return {self.config: stored.integer(self.name, 0)}


@dataclass(frozen=True)
class HeadDim(Plain):
    """The size of a head, of keys and values alike. default: where the config is silent; None: then nothing is written."""

    default: int | None = None

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """Both keys, or none."""
        if model.get("head_dim", self.default) is None:
            return {}
        size = u32(model.count("head_dim", self.default))
        return {"attention.key_length": size, "attention.value_length": size}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """``head_dim``; InputError where keys and values differ, as in no architecture here."""
        sizes = {stored.integer(f"attention.{part}_length", 0) for part in ("key", "value")}
        if len(sizes) > 1:
            raise InputError(
                f"{stored.where}: heads of keys and values differ in size", mend="such a model has no place here"
            )
        size = sizes.pop()
        return {"head_dim": size} if size else {}


@dataclass(frozen=True)
class Present(Plain):
    """A flag of the config that GGUF expresses by a tensor being there, for example biases."""

    config: str
    tensor: str

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """Nothing."""
        del model
        return {}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """The flag."""
        return {self.config: stored.has(self.tensor)}


@dataclass(frozen=True)
class Only(Plain):
    """An entry that llama.cpp takes for granted: any other value cannot be expressed and is refused.

    default: what the class takes where the config is silent. written: what is written on the way back; None: nothing.
    """

    config: str
    allowed: tuple[Any, ...]
    default: Any = None
    written: Any = None

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """Nothing; PlanError where the config says otherwise."""
        value = model.get(self.config, self.default)
        if value is not None and value not in self.allowed:
            raise PlanError(
                f"{model.where}: {quoted(self.config)} is {quoted(repr(value))}, but llama.cpp computes this architecture only with "
                f"{' or '.join(repr(one) for one in self.allowed)}",
                mend="use another layout for this model",
            )
        return {}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """The entry, where it is to be written."""
        del stored
        return {} if self.written is None else {self.config: self.written}


@dataclass(frozen=True)
class Unused(Plain):
    """An entry that llama.cpp does not heed. remark: what that means, with the value in place of ``{}``; only: the entry must hold too."""

    config: str
    remark: str
    only: str | None = None

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """Nothing."""
        del model
        return {}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """Nothing."""
        del stored
        return {}

    def notes(self, model: Model) -> Sequence[str]:
        """The remark, where the entry is set."""
        value = model.get(self.config)
        heeded = self.only is None or model.get(self.only)
        return (self.remark.format(value),) if value and heeded else ()


def join(settings: Iterable[Setting], model: Model) -> dict[str, GgufValue]:
    """All keys of some settings, later ones over earlier ones."""
    result: dict[str, GgufValue] = {}
    for setting in settings:
        result |= setting.export(model)
    return result
