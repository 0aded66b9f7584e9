"""The Layout contract: which bytes go to disk.

A layout knows names, shapes and dtypes of the stored tensors of a quantized linear, and the ``quantization_config``
that tells a loader about them. It does no I/O: the engine hands tensors to a ``Sink`` and takes them from a ``Source``.
``NAME`` is the module name, without ``.weight``; shapes are ``(rows, columns) = (out, in)``, also for modules that
store the transpose (Conv1D).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError

__all__ = ["ENGINES", "Layout", "Read", "check_stored", "majority", "transposed"]

#: Engines about which every layout has a word.
ENGINES = ("vllm", "transformers", "gptqmodel", "bitwright")

#: Reads one small stored tensor by name, ``Source.read`` for example.
Read = Callable[[str], torch.Tensor]


class Layout(ABC):
    """Base of every layout; a layout is a frozen dataclass of its options. See ``docs/layouts.md``."""

    #: the name in the catalog
    name: ClassVar[str]
    #: ``quantization_config["quant_method"]`` of its files
    quant_method: ClassVar[str]
    #: True where it can hold quantized embeddings
    stores_embeddings: ClassVar[bool] = False
    #: True where a module's first stored tensor holds its codes and no parameter
    codes_apart: ClassVar[bool] = True
    #: True where engines that load it fuse q/k/v and gate/up, so that these must be quantized alike
    fuses: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The layout with the options that a file's ``quantization_config`` states. InputError if it is another's."""
        found = str(config.get("quant_method", "")).lower()
        if found != cls.quant_method:
            raise InputError(f"quant_method '{found}' is not {cls.quant_method}", mend="load it with another layout")
        return cls()

    @abstractmethod
    def limits(self, model_dtype: torch.dtype) -> Limits:
        """What it demands of schemes before anything is fitted, for a model that computes in ``model_dtype``."""

    @abstractmethod
    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None where it can store a weight of this shape in this scheme, else the reason why not."""

    @abstractmethod
    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        """The stored tensors of quantized linear ``name``, from shapes alone."""

    @abstractmethod
    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The stored tensors of one weight, as ``tensors`` announces them. PlanError where ``accepts`` refuses."""

    @abstractmethod
    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        """Inverse of ``pack``; ``scheme`` and ``shape`` come from ``read_config``.

        Where a foreign file holds more than its config says (an arbitrary group index, zero points that are off the
        middle in a "symmetric" file), the result's own scheme says so. Raises InputError where tensors are missing or
        contradict each other.
        """

    @abstractmethod
    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``.

        entries: module name -> scheme, of every quantized linear; kept: full names of the linears left in high
        precision, the output head included; meta: options of the method, for keys that only inform, and ``kv_cache``: the InputScheme
        of the KV cache where its scales are stored.
        """

    @abstractmethod
    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        """Module name -> scheme and shape, of every quantized linear found on disk, in our own files and in other
        writers'.

        names: every tensor of the checkpoint; read: reads a small tensor where headers alone leave a shape open (padded
        words).
        """

    def side_files(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """Further files beside ``config.json``: name -> content."""
        del config
        return {}

    def accepts_kv_cache(self, scheme: InputScheme) -> str | None:
        """None where it can store the scales of a KV cache in this scheme, else the reason why not."""
        del scheme
        return "it has no place for KV-cache scales"

    def kv_cache_tensors(self, attention: str, scheme: InputScheme) -> tuple[TensorSpec, ...]:
        """The stored scales of attention module ``attention``: two float32 ``(1,)``, of the keys and of the values."""
        del scheme
        return tuple(TensorSpec(f"{attention}.{part}_scale", (1,), torch.float32) for part in ("k", "v"))

    @abstractmethod
    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        """Engine -> None where a checkpoint of this scheme loads there, else why not, or on which condition."""

    def loads_together(self, entries: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, str | None]:
        """Engine -> None, or why this mixture of schemes and kept modules does not load there."""
        del entries, kept
        return dict.fromkeys(ENGINES)

    def engines(self, entries: Mapping[str, Scheme], kept: Sequence[str], model_type: str) -> dict[str, str | None]:
        """Engine -> None where all parts load there, together, else the first reason why not."""
        result = self.loads_together(entries, kept)
        for scheme in dict.fromkeys(entries.values()):
            for engine, why in self.loads_in(scheme, model_type).items():
                result[engine] = result.get(engine) or why
        return result

    @abstractmethod
    def support(self) -> dict[str, str]:
        """Engine -> what it takes to load there (versions, packages), in one line each."""

    def _refuse(self, q: QuantizedTensor) -> None:
        """PlanError where ``q`` cannot be stored."""
        reason = self.accepts(q.scheme, q.shape)
        if reason is None and q.outliers is not None and not self._holds_outliers(q):
            reason = "it has no place for outliers"
        if reason is None and q.scheme.inputs is not None and len(q.inputs) != len(q.scheme.inputs.param_spec()):
            reason = "the ranges of its inputs were not measured"
        if reason is not None:
            raise PlanError(f"layout {self.name} cannot store this weight: {reason}", mend="use layout native")

    def _holds_outliers(self, q: QuantizedTensor) -> bool:
        del q
        return False


def majority(entries: Mapping[str, Scheme]) -> Scheme:
    """The scheme of most modules; of equals, the one that comes first. Raises InputError for no modules."""
    if not entries:
        raise InputError("no module is quantized", mend="quantize at least one linear")
    counts: dict[Scheme, int] = {}
    for scheme in entries.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    return max(counts, key=lambda scheme: counts[scheme])  # dicts keep order and max takes the first of equals


def transposed(value: torch.Tensor) -> torch.Tensor:
    """A matrix's transpose in memory of its own. ``.t().contiguous()`` of a single row or column keeps odd strides."""
    return value.t().clone(memory_format=torch.contiguous_format)


def check_stored(tensors: Mapping[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
    """The stored tensor that ``spec`` names. Raises InputError where it is missing or has another shape or dtype."""
    found = tensors.get(spec.name)
    if found is None:
        raise InputError(f"tensor '{spec.name}' is missing", mend="the file is damaged or incomplete; fetch it again")
    if tuple(found.shape) != spec.shape or found.dtype != spec.dtype:
        raise InputError(
            f"tensor '{spec.name}' is {found.dtype} {tuple(found.shape)}, expected {spec.dtype} {spec.shape}",
            mend="the config and the file contradict each other",
        )
    return found
