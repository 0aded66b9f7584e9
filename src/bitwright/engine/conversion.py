"""The plan of a conversion: what becomes of every module of a quantized checkpoint in another layout, or as plain weights.

Headers come first: a layout that stores no such scheme is refused before anything is read. Then every module's parameters (scales, zero
points, group indices; not its codes) are read once, because they decide whether the other grid holds the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitwright.core.fused import fused_name
from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES, Layout
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.engine.regrid import express, forms
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.io.safetensors_writer import ShardPlan, plan_shards
from bitwright.model.names import map_names
from bitwright.model.skeleton import build_skeleton
from bitwright.model.structure import Structure, structure_from_headers, structure_from_skeleton
from bitwright.runtime.checkpoint import DecodedSource

__all__ = ["ConversionPlan", "ModulePlan", "plan_conversion"]

#: Endings of stored scales of a KV cache, and the one kind of KV cache whose scales any layout stores.
_KV_SCALES = (".k_scale", ".v_scale")
_KV_CACHE = InputScheme(number="float", strategy="tensor", dynamic=False)


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one quantized module. target: its scheme in the output, None where it is decoded. stored: the tensors that replace
    it, exact to the byte. rounding: the largest relative change of a scale; 0 where the numbers stay the same."""

    name: str
    shape: tuple[int, int]
    source: Scheme
    target: Scheme | None
    stored: tuple[TensorSpec, ...]
    rounding: float = 0.0


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that is known before a code is read.

    layout: None for plain weights. kept: tensor -> its specification in the output, of all that is not quantized. dropped: stored
    tensors that mean nothing in the output -> why. engines: name -> None where the output will load there, else why not.
    """

    layout: Layout | None
    modules: tuple[ModulePlan, ...]
    kept: Mapping[str, TensorSpec]
    dropped: Mapping[str, str]
    shards: tuple[ShardPlan, ...]
    dtype: torch.dtype
    quantization_config: dict[str, Any] | None
    untie: bool
    engines: Mapping[str, str | None]
    notes: tuple[str, ...]

    @property
    def layout_name(self) -> str:
        """The layout's name, or ``dense``."""
        return self.layout.name if self.layout is not None else "dense"

    @property
    def weight_file_bytes(self) -> int:
        """Exact size of all weight files together, headers included."""
        return sum(shard.total_bytes for shard in self.shards)

    @property
    def rounding(self) -> float:
        """The largest relative change of any scale."""
        return max((module.rounding for module in self.modules), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """A summary of plain values."""
        return {
            "layout": self.layout_name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_file_bytes": self.weight_file_bytes,
            "modules": [
                {
                    "module": module.name,
                    "from": module.source.describe_all(),
                    "to": module.target.describe_all() if module.target is not None else "decoded",
                    "rounding": module.rounding,
                }
                for module in self.modules
            ],
            "largest_rounding": self.rounding,
            "dropped": dict(self.dropped),
            "engines": dict(self.engines),
            "notes": list(self.notes),
        }


def plan_conversion(
    source: DecodedSource,
    layout: Layout | None,
    *,
    dtype: torch.dtype | None = None,
    lossy: bool = False,
    target: str | None = None,
) -> ConversionPlan:
    """Plan the conversion of ``source`` to ``layout`` (None: plain weights).

    dtype: that of the output's unquantized tensors (default: the model's). lossy: scales may be rounded. target: an engine that the
    output must load in. Raises PlanError that names the first module that cannot be converted, and counts them.
    """
    if target is not None and target not in ENGINES:
        raise PlanError(f"engine '{target}' is unknown", mend=f"use one of: {', '.join(ENGINES)}")
    wanted = dtype or source.dtype
    structure, tied, notes = _structure(source)
    roles = {unit.name: unit.role for unit in structure.units}
    kv_cache = _kv_cache(source, layout, lossy)
    modules = _dense(source, wanted) if layout is None else _quantized(source, layout, wanted, lossy, roles)
    notes += _changed_inputs(modules)
    kept, dropped = _kept(source, layout is None, wanted, dtype is not None, kv_cache is not None)
    config: dict[str, Any] | None = None
    engines: dict[str, str | None] = {}
    if layout is not None:
        entries = {m.name: m.target for m in modules if m.target is not None}
        names = _kept_linears(structure, entries)
        config = layout.config(entries, names, {"kv_cache": kv_cache} if kv_cache is not None else {})
        engines = layout.engines(entries, names, str(source.config.get("model_type", "?")))
    if target is not None and engines.get(target) is not None:
        raise PlanError(f"the output would not load in {target}: {engines[target]}", mend="choose another layout")
    heads = [name for name, role in roles.items() if role == "head" and name in source.modules]
    return ConversionPlan(
        layout=layout,
        modules=modules,
        kept=kept,
        dropped=dropped,
        shards=plan_shards(_in_order(source, modules, kept)),
        dtype=wanted,
        quantization_config=config,
        # A head that was quantized has weights of its own, whatever the config says of tying.
        untie=layout is None and any(f"{name}.weight" in tied for name in heads),
        engines=engines,
        notes=tuple(notes),
    )


def _structure(source: DecodedSource) -> tuple[Structure, frozenset[str], list[str]]:
    """The linears, the names of tied tensors, and what is to be noted."""
    try:
        skeleton = build_skeleton(source.path)
    except InputError as error:
        note = f"no model code: {error.message}; linears were found by tensor names"
        tied = frozenset({"lm_head.weight"}) if source.config.get("tie_word_embeddings") else frozenset[str]()
        return structure_from_headers(source.tensors, source.config), tied, [note]
    names = map_names(skeleton, source.tensors)
    tied = frozenset(skeleton.tied) if source.config.get("tie_word_embeddings") is not False else frozenset[str]()
    return structure_from_skeleton(skeleton, names, source.tensors), tied, []


def _kv_cache(source: DecodedSource, layout: Layout | None, lossy: bool) -> InputScheme | None:
    """How the KV cache is quantized, where the source holds scales for it and the layout can store them."""
    if layout is None or not any(name.endswith(_KV_SCALES) for name in source.stored.tensors):
        return None
    reason = layout.accepts_kv_cache(_KV_CACHE)
    if reason is None:
        return _KV_CACHE
    if not lossy:
        raise PlanError(
            f"layout {layout.name} cannot store the scales of the KV cache: {reason}",
            mend="use --layout compressed-tensors; --lossy leaves them out",
        )
    return None


def _changed_inputs(modules: Sequence[ModulePlan]) -> list[str]:
    """A note for every way in which layer inputs will be computed otherwise than before. Decoding them is no change of that kind."""
    found: dict[str, int] = {}
    for module in modules:
        if module.target is not None and module.target.inputs != module.source.inputs:
            was, now = (_said(scheme.inputs) for scheme in (module.source, module.target))
            text = f"inputs of {{}} modules were {was}, engines will take {now}"
            found[text] = found.get(text, 0) + 1
    return [text.format(count) for text, count in found.items()]


def _said(inputs: InputScheme | None) -> str:
    if inputs is None:
        return "16 bits"
    return inputs.describe() + (f" (columns beyond {inputs.threshold:g} in 16 bits)" if inputs.threshold else "")


def _kept_linears(structure: Structure, entries: Mapping[str, Scheme]) -> list[str]:
    """Full names of all linears and routers in high precision, the output head included."""
    kept = [u.name for u in structure.units if u.name not in entries and u.role != "embedding"]
    kept += [tensor.removesuffix(".weight") for tensor, why in structure.left.items() if "router" in why.lower()]
    return kept if any(unit.role == "head" for unit in structure.units) else [*kept, "lm_head"]


def _dense(source: DecodedSource, dtype: torch.dtype) -> tuple[ModulePlan, ...]:
    found = []
    for name, (scheme, shape) in source.modules.items():
        spec = source.tensors[name + ".weight"]
        found.append(ModulePlan(name, shape, scheme, None, (TensorSpec(spec.name, spec.shape, dtype),)))
    return tuple(found)


def _quantized(
    source: DecodedSource, layout: Layout, dtype: torch.dtype, lossy: bool, roles: Mapping[str, str]
) -> tuple[ModulePlan, ...]:
    """Headers first, then parameters, then one choice for the whole model."""
    failed: list[tuple[str, PlanError]] = []
    for name, (scheme, shape) in source.modules.items():
        try:
            if roles.get(name) == "embedding" and layout.name != "native":
                raise PlanError(
                    f"layout {layout.name} cannot store embeddings", mend="use --layout native, or --layout dense"
                )
            forms(scheme, shape, layout, dtype)
        except PlanError as error:
            failed.append((name, error))
    _refuse(failed, len(source.modules))
    options: dict[str, list[tuple[Scheme, float]]] = {}
    schemes: dict[str, Scheme] = {}
    for name in source.modules:
        q = _parameters(source, name)
        schemes[name] = q.scheme
        try:
            options[name] = _possible(q, layout, dtype, lossy)
        except PlanError as error:
            failed.append((name, error))
        except NumericError as error:
            raise NumericError(f"{name}: {error.message}", mend=error.mend) from error
    _refuse(failed, len(source.modules))
    plans = []
    for name, (scheme, rounding) in _choose(options).items():
        shape = source.modules[name][1]
        plans.append(ModulePlan(name, shape, schemes[name], scheme, layout.tensors(name, scheme, shape), rounding))
    return tuple(plans)


def _parameters(source: DecodedSource, module: str) -> QuantizedTensor:
    """A module with its parameters and none of its codes, where the layout stores these apart in a module's first tensor."""
    if not source.layout.codes_apart:
        return source.quantized(module)
    scheme, shape = source.modules[module]
    first, *rest = source.layout.tensors(module, scheme, shape)
    spec = source.stored.tensors[first.name]
    parts = {first.name: torch.zeros(spec.shape, dtype=spec.dtype)}
    return source.layout.unpack(module, scheme, shape, parts | {s.name: source.stored.read(s.name) for s in rest})


def _possible(q: QuantizedTensor, layout: Layout, dtype: torch.dtype, lossy: bool) -> list[tuple[Scheme, float]]:
    """Schemes that the parameters allow, the nearest first, with the rounding of each. PlanError where there is none."""
    found, first = [], None
    for scheme in forms(q.scheme, q.shape, layout, dtype):
        try:
            found.append((scheme, express(q, scheme, lossy=lossy)[1]))
        except PlanError as error:
            first = first or error
    if not found:
        assert first is not None
        raise first
    return found


def _choose(options: Mapping[str, Sequence[tuple[Scheme, float]]]) -> dict[str, tuple[Scheme, float]]:
    """One scheme a module: symmetric where all modules can be, else as they are, the parts of a fused layer alike.

    Engines take symmetric weights in more places, and some files hold zero points that are all in the middle.
    """
    everywhere = all(any(_symmetric(s) in (True, None) for s, _ in those) for those in options.values())
    groups: dict[str, set[bool | None]] = {}
    for name, those in options.items():
        groups.setdefault(fused_name(name), set()).add(_symmetric(those[0][0]))
    chosen = {}
    for name, those in options.items():
        mixed = len(groups[fused_name(name)]) > 1
        wanted = True if everywhere else False if mixed else _symmetric(those[0][0])
        chosen[name] = next((option for option in those if _symmetric(option[0]) == wanted), those[0])
    return chosen


def _symmetric(scheme: Scheme) -> bool | None:
    return getattr(scheme, "symmetric", None)


def _refuse(failed: Sequence[tuple[str, PlanError]], total: int) -> None:
    if failed:
        name, error = failed[0]
        raise PlanError(
            f"{name}: {error.message}; {len(failed)} of {total} quantized modules cannot be converted", mend=error.mend
        )


def _kept(
    source: DecodedSource, dense: bool, dtype: torch.dtype, asked: bool, kv_cache: bool
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Tensors that are copied, and those that are not, with the reason."""
    kept: dict[str, TensorSpec] = {}
    dropped: dict[str, str] = {}
    for name, spec in source.tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in source.modules:
            if leaf == "weight":
                continue
            if leaf != "bias":
                dropped[name] = f"part of the {source.layout.name} layout"
                continue
        if not kv_cache and name.endswith(_KV_SCALES):
            dropped[name] = "scale of a quantized KV cache"
            continue
        cast = (asked and spec.dtype == source.dtype) or (dense and module in source.modules)
        kept[name] = TensorSpec(name, spec.shape, dtype if cast and spec.dtype.is_floating_point else spec.dtype)
    return kept, dropped


def _in_order(source: DecodedSource, modules: Sequence[ModulePlan], kept: Mapping[str, TensorSpec]) -> list[TensorSpec]:
    """The output's tensors in the order of the source's."""
    replaced = {}
    for module in modules:
        for spec in source.layout.tensors(module.name, *source.modules[module.name]):
            replaced[spec.name] = module
    found: dict[str, TensorSpec] = {}
    for name in source.stored.tensors:
        if name in replaced:
            found |= {spec.name: spec for spec in replaced[name].stored}
        elif name in kept:
            found[name] = kept[name]
    return list(found.values())
