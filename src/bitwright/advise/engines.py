"""Which engine loads which file on which hardware: a table with a source for every line, in agreement with what layouts say.

``engines.yaml`` holds what depends on hardware, and engines that layouts have no word about. What depends on a scheme's details (group
sizes, zero points, a model's architecture) is asked of ``Layout.loads_in``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.core.layout import ENGINES, Layout
from bitwright.core.scheme import Scheme
from bitwright.errors import InputError
from bitwright.io.strict import load_yaml

__all__ = ["GPUS", "Engine", "Hardware", "Kind", "Reading", "engine", "engines", "gpu", "kind_of", "kinds", "refusal"]

_FILE = Path(__file__).with_name("engines.yaml")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a model runs on. capability: CUDA compute capability, None for a CPU."""

    name: str
    capability: float | None

    @property
    def is_cpu(self) -> bool:
        """No GPU."""
        return self.capability is None


CPU = Hardware(name="CPU", capability=None)

#: GPUs by name -> CUDA compute capability (https://developer.nvidia.com/cuda-gpus) and memory in GB
GPUS: Mapping[str, tuple[float, float | None]] = {
    "b200": (10.0, 180), "rtx5090": (12.0, 32), "rtx5080": (12.0, 16), "h200": (9.0, 141), "h100": (9.0, 80), "l40s": (8.9, 48),
    "l40": (8.9, 48), "l4": (8.9, 24), "rtx4090": (8.9, 24), "rtx4080": (8.9, 16), "rtx4070": (8.9, 12), "rtx4060": (8.9, 8),
    "a6000": (8.6, 48), "a10": (8.6, 24), "rtx3090": (8.6, 24), "rtx3080": (8.6, 10), "rtx3060": (8.6, 12), "a100": (8.0, 80),
    "t4": (7.5, 16), "rtx2080ti": (7.5, 11), "v100": (7.0, 32), "p100": (6.0, 16),
}  # fmt: skip


def gpu(name: str) -> tuple[Hardware, float | None]:
    """A GPU by its name, and its memory in GB. InputError lists the known ones.

    >>> gpu("RTX 4090")[0].capability
    8.9
    """
    wanted = name.lower().replace(" ", "").replace("-", "").removeprefix("nvidia")
    found = next((key for key in (wanted, f"rtx{wanted}") if key in GPUS), None)
    if found is None:
        raise InputError(
            f"GPU '{name}' is not in the list: {', '.join(GPUS)}", mend="use --compute-capability and --gpu-memory"
        )
    capability, memory = GPUS[found]
    return Hardware(name=found.upper(), capability=capability), memory


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file: a layout, and what is in it."""

    name: str
    layout: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is known of an engine and a kind of file. The fields are explained at the head of ``engines.yaml``.

    sources: addresses or pages of this documentation.
    """

    engine: str
    kind: str
    loads: bool
    capability: float | None = None
    native: float | None = None
    before: float | None = None
    gpu: bool = True
    cpu: bool | None = None
    packed: bool = True
    needs: str = ""
    note: str = ""
    checked: str = ""
    sources: tuple[str, ...] = ()

    def refused_on(self, hardware: Hardware) -> str | None:
        """None where it runs there, else why not."""
        if not self.loads:
            return self.note or "it does not read such files"
        if hardware.capability is None:
            if self.cpu:
                return None
            return "not on CPUs" if self.cpu is False else "nobody has said that it runs on CPUs"
        if not self.gpu:
            return f"not on GPUs ({self.note})"
        if self.capability is not None and hardware.capability < self.capability:
            return f"from compute capability {self.capability} on; {hardware.name} has {hardware.capability}"
        if self.before is not None and hardware.capability >= self.before:
            return f"not from compute capability {self.before} on ({self.note})"
        return None

    def is_native_on(self, hardware: Hardware) -> bool:
        """Products are computed in the file's own numbers."""
        return self.native is not None and hardware.capability is not None and hardware.capability >= self.native


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine and all it reads. Kinds that are not listed are not read."""

    name: str
    title: str
    version: str
    reads: Mapping[str, Reading]

    def reading(self, kind: str) -> Reading:
        """What is known of this kind."""
        return self.reads.get(kind) or Reading(
            engine=self.name, kind=kind, loads=False, note="it does not read such files"
        )


@functools.cache
def _table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = load_yaml(_FILE)
    return found


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """All kinds of files, by name."""
    return {name: Kind(name=name, **entry) for name, entry in _table()["kinds"].items()}


@functools.cache
def engines() -> Mapping[str, Engine]:
    """All engines, by name."""
    sources = _table()["sources"]
    found: dict[str, Engine] = {}
    for name, entry in _table()["engines"].items():
        reads = {}
        for kind, line in entry["reads"].items():
            values = {key: value for key, value in line.items() if key != "from"}
            reads[kind] = Reading(engine=name, kind=kind, sources=tuple(sources[key] for key in line["from"]), **values)
        found[name] = Engine(name=name, title=entry["title"], version=str(entry["version"]), reads=reads)
    return found


def engine(name: str) -> Engine:
    """One engine; ``llama.cpp`` may be written with its dot. InputError lists the known ones.

    >>> engine("llama.cpp").title
    'llama.cpp'
    """
    found = engines().get(name.lower().replace(".", ""))
    if found is None:
        raise InputError(f"engine '{name}' is unknown", mend=f"use one of: {', '.join(engines())}")
    return found


def kind_of(layout: Layout, scheme: Scheme) -> str:
    """The kind of file that a layout makes of a scheme, by its name in the table."""
    inputs = getattr(scheme, "inputs", None)
    bits = int(getattr(scheme, "bits", 0))
    match layout.name:
        case "gptq":
            return f"gptq-{bits}" if bits in (4, 8) else "gptq-2-3"
        case "awq":
            return "awq-4"
        case "bitsandbytes":
            return "bnb-8" if scheme.describe().startswith("absmax") or scheme.code_bits == 8 else "bnb-4"
        case "compressed-tensors":
            element = getattr(scheme, "element", None)
            if element in ("nvfp4", "mxfp4", "mxfp8"):
                return f"ct-{element}"
            if not bits:
                return "ct-fp8"
            eight = inputs is not None
            return {4: "ct-w4a8" if eight else "ct-int4", 8: "ct-w8a8" if eight else "ct-int8"}.get(bits, "ct-int2")
    return layout.name


def refusal(
    name: str, layout: Layout, scheme: Scheme, *, model_type: str = "llama", hardware: Hardware | None = None
) -> str | None:
    """None where the engine loads a model of this scheme in this layout (on this hardware), else why not, or on which condition."""
    found = engine(name)
    reading = found.reading(kind_of(layout, scheme))
    if found.name in ENGINES and reading.loads:
        # For GGUF files layouts have no word about engines; the table has.
        detail = layout.loads_in(scheme, model_type)[found.name]
        if detail is not None:
            return detail
    if not reading.loads:
        return reading.note or "it does not read such files"
    return None if hardware is None else reading.refused_on(hardware)
