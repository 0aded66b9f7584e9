"""The plan: from headers alone, what becomes of every tensor, in exact bytes; the impossible is refused here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bitwright import catalog
from bitwright.core.layout import ENGINES, Layout
from bitwright.core.method import Method
from bitwright.core.scheme import Scheme
from bitwright.core.source import Source
from bitwright.core.tensor import TensorSpec, parse_dtype
from bitwright.engine.recipe import Override, Recipe, make_method
from bitwright.errors import InputError, PlanError
from bitwright.io.safetensors_writer import ShardPlan, plan_shards
from bitwright.model.names import NameMap, map_names
from bitwright.model.skeleton import Skeleton, build_skeleton
from bitwright.model.structure import LinearUnit, Structure, structure_from_headers, structure_from_skeleton

__all__ = ["ENGINES", "Plan", "PlanEntry", "make_plan"]

#: Linears that serving engines fuse into one: their parts must be quantized alike (vLLM's packed_modules_mapping).
_FUSED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class PlanEntry:
    """What becomes of one stored tensor. stored: the tensors that replace it, exact to the byte."""

    tensor: str
    spec: TensorSpec
    action: Literal["quantize", "keep", "drop"]
    stored: tuple[TensorSpec, ...]
    reason: str = ""
    unit: LinearUnit | None = None
    scheme: Scheme | None = None
    method: Method | None = None

    @property
    def stored_bytes(self) -> int:
        """Data bytes on disk, headers not counted."""
        return sum(spec.nbytes for spec in self.stored)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read.

    engines: name -> None where the output will load there, else why not. notes: what the reader should know.
    """

    recipe: Recipe
    entries: tuple[PlanEntry, ...]
    structure: Structure
    layout: Layout
    shards: tuple[ShardPlan, ...]
    model_type: str
    model_dtype: torch.dtype
    compute_dtype: torch.dtype
    quantization_config: dict[str, Any]
    engines: Mapping[str, str | None]
    notes: tuple[str, ...]
    skeleton: Skeleton | None = None
    names: NameMap | None = None

    @property
    def quantized(self) -> tuple[PlanEntry, ...]:
        """Entries that are quantized."""
        return tuple(entry for entry in self.entries if entry.action == "quantize")

    @property
    def needs_calibration(self) -> bool:
        """True where a method wants statistics of layer inputs."""
        return any(entry.method is not None and entry.method.needs for entry in self.quantized)

    @property
    def weight_file_bytes(self) -> int:
        """Exact size of all weight files together, headers included."""
        return sum(shard.total_bytes for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        """Data bytes of the source's tensors."""
        return sum(entry.spec.nbytes for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter over the whole model."""
        count = sum(_numel(entry.spec) for entry in self.entries if entry.action != "drop")
        return 8 * sum(entry.stored_bytes for entry in self.entries) / count if count else 0.0

    @property
    def quantized_bits_per_weight(self) -> float:
        """Stored bits per weight over the quantized linears alone."""
        count = sum(_numel(entry.spec) for entry in self.quantized)
        return 8 * sum(entry.stored_bytes for entry in self.quantized) / count if count else 0.0


def _numel(spec: TensorSpec) -> int:
    return spec.nbytes // spec.dtype.itemsize


def make_plan(recipe: Recipe, source: Source, *, target: str | None = None) -> Plan:
    """Plan ``recipe`` for ``source``.

    target: an engine that the output must load in. Raises PlanError (with the mend) for what cannot be carried out: a group size
    that does not divide, a scheme the layout cannot store, parts of a fused layer that differ, an engine that would refuse.
    """
    if target is not None and target not in ENGINES:
        raise PlanError(f"engine '{target}' is unknown", mend=f"use one of: {', '.join(ENGINES)}")
    notes: list[str] = []
    skeleton, names, structure = _structure(recipe, source, notes)
    model_dtype = _model_dtype(source)
    layout = _make_layout(recipe)
    entries = _entries(recipe, source, structure, layout, model_dtype, skeleton)
    _refuse_nothing(entries, recipe)
    if layout.name != "native":
        _refuse_mixed_fusions(entries)
    schemes = {e.unit.name: e.scheme for e in entries if e.action == "quantize" and e.unit and e.scheme}
    kept = [e.unit.name for e in entries if e.action == "keep" and e.unit is not None and e.unit.role != "embedding"]
    kept += _router_names(structure)
    if not any(unit.role == "head" for unit in structure.units):
        kept.append("lm_head")
    meta = _method_meta(recipe)
    config = layout.config(schemes, kept, meta)
    model_type = str(source.config.get("model_type", "?"))
    engines = _engines(layout, schemes, kept, model_type)
    if target is not None and engines.get(target) is not None:
        raise PlanError(
            f"the output would not load in {target}: {engines[target]}", mend="change layout, bits or group size"
        )
    shards = plan_shards([spec for e in entries for spec in e.stored], recipe.max_shard_bytes)
    return Plan(
        recipe=recipe,
        entries=tuple(entries),
        structure=structure,
        layout=layout,
        shards=tuple(shards),
        model_type=model_type,
        model_dtype=model_dtype,
        compute_dtype=_compute_dtype(recipe, model_dtype),
        quantization_config=config,
        engines=engines,
        notes=tuple(notes),
        skeleton=skeleton,
        names=names,
    )


def _structure(recipe: Recipe, source: Source, notes: list[str]) -> tuple[Skeleton | None, NameMap | None, Structure]:
    """With model code where there is any; without, only for methods that need no data."""
    calibrated = bool(make_method(recipe.method, recipe.method_options).needs)
    calibrated = calibrated or any(o.method and make_method(o.method, {}).needs for o in recipe.overrides)
    try:
        skeleton = build_skeleton(source.path)
    except InputError as error:
        if calibrated:
            raise
        notes.append(f"no model code: {error.message}; linears were found by tensor names")
        return None, None, structure_from_headers(source.tensors, source.config)
    names = map_names(skeleton, source.tensors)
    return skeleton, names, structure_from_skeleton(skeleton, names, source.tensors)


def _model_dtype(source: Source) -> torch.dtype:
    text = source.config.get("text_config")
    parts = [source.config, text if isinstance(text, Mapping) else {}]
    for part in parts:
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str):
            return parse_dtype(name)
    floats = [spec.dtype for spec in source.tensors.values() if spec.dtype.is_floating_point and len(spec.shape) == 2]
    return floats[0] if floats else torch.float32


def _compute_dtype(recipe: Recipe, model_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 models run in bfloat16 on CPUs that multiply it natively, everything else in float32."""
    if recipe.compute_dtype != "auto":
        return parse_dtype(recipe.compute_dtype)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if model_dtype == torch.bfloat16 and native else torch.float32


def _make_layout(recipe: Recipe) -> Layout:
    plugin = catalog.load("layouts", recipe.layout)
    try:
        layout = plugin(**recipe.layout_options)
    except TypeError as error:
        raise PlanError(
            f"layout '{recipe.layout}' does not take these options: {error}", mend="see docs/layouts.md"
        ) from error
    assert isinstance(layout, Layout)
    return layout


def make_scheme(recipe: Recipe, layout: Layout, model_dtype: torch.dtype, override: Override | None = None) -> Scheme:
    """The scheme that a recipe (with one exception applied) asks for, under the layout's limits."""
    bits, group_size, symmetric = recipe.bits, recipe.group_size, recipe.symmetric
    if override is not None:
        bits = override.bits if override.bits is not None else bits
        group_size = override.group_size if override.group_size is not None else group_size
        symmetric = override.symmetric if override.symmetric is not None else symmetric
    options: dict[str, Any] = dict(recipe.scheme_options)
    if recipe.scheme == "affine":
        options |= {"bits": bits, "symmetric": symmetric}
        options |= {"granularity": group_size} if isinstance(group_size, str) else {"group_size": group_size}
        storable = str(model_dtype).removeprefix("torch.")
        auto = storable if storable in ("float16", "bfloat16", "float32") else "float32"
        options["scale_dtype"] = auto if recipe.scale_dtype == "auto" else recipe.scale_dtype
    return catalog.load_scheme({"kind": recipe.scheme, **options}).limit(layout.limits(model_dtype))


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise PlanError(f"pattern '{pattern}' is not a regular expression: {error}", mend="mend it") from error
    return fnmatch.fnmatchcase(name, pattern)


def _entries(
    recipe: Recipe,
    source: Source,
    structure: Structure,
    layout: Layout,
    model_dtype: torch.dtype,
    skeleton: Skeleton | None,
) -> list[PlanEntry]:
    units = {unit.tensor: unit for unit in structure.units}
    tied = _tied_stored(source, skeleton)
    unused = set(range(len(recipe.overrides)))
    entries: list[PlanEntry] = []
    for name, spec in source.tensors.items():
        unit = units.get(name)
        if name in tied:
            entries.append(PlanEntry(name, spec, "drop", (), f"tied to {tied[name]}", unit))
            continue
        keep = PlanEntry(name, spec, "keep", (spec,), unit=unit)
        if unit is None:
            entries.append(replace(keep, reason=structure.left.get(name, "not a matrix")))
            continue
        hits = [i for i, o in enumerate(recipe.overrides) if _matches(o.pattern, unit.name)]
        unused -= set(hits)
        override = recipe.overrides[hits[0]] if hits else None
        wanted = unit.role in ("linear", "expert") or (unit.role == "head" and recipe.head)
        wanted = wanted or (unit.role == "embedding" and recipe.embeddings)
        if override is not None and override.keep:
            entries.append(replace(keep, reason=f"kept by '{override.pattern}'"))
        elif not wanted:
            entries.append(replace(keep, reason=f"{unit.role} kept unless asked for"))
        elif not spec.dtype.is_floating_point:
            entries.append(replace(keep, reason=f"already {spec.dtype}"))
        else:
            entries.append(_quantized(recipe, layout, model_dtype, unit, spec, override))
    if unused:
        pattern = recipe.overrides[min(unused)].pattern
        raise PlanError(f"override '{pattern}' matches no layer", mend="see the names with `bitwright plan`")
    asked = [("head", recipe.head), ("embedding", recipe.embeddings)]
    for role, on in asked:
        if on and not any(e.action == "quantize" and e.unit and e.unit.role == role for e in entries):
            raise PlanError(
                f"there is no {role} of its own to quantize in this checkpoint", mend=f"drop the {role} option"
            )
    if recipe.embeddings and layout.name != "native":
        raise PlanError(f"layout {layout.name} cannot store embeddings", mend="use --layout native")
    return entries


def _quantized(
    recipe: Recipe,
    layout: Layout,
    model_dtype: torch.dtype,
    unit: LinearUnit,
    spec: TensorSpec,
    override: Override | None,
) -> PlanEntry:
    scheme = make_scheme(recipe, layout, model_dtype, override)
    try:
        scheme.grid(unit.shape)
    except PlanError as error:
        raise PlanError(f"{unit.name}: {error.message}", mend=error.mend) from error
    reason = layout.accepts(scheme, unit.shape)
    if reason is not None:
        raise PlanError(
            f"{unit.name}: layout {layout.name} cannot store it: {reason}", mend="keep it, or use --layout native"
        )
    name = override.method if override and override.method else recipe.method
    method = make_method(name, recipe.method_options if name == recipe.method else {})
    return PlanEntry(
        unit.tensor,
        spec,
        "quantize",
        layout.tensors(unit.name, scheme, unit.shape),
        scheme.describe(),
        unit,
        scheme,
        method,
    )


def _tied_stored(source: Source, skeleton: Skeleton | None) -> dict[str, str]:
    """Stored tensors that only repeat a tied one. The driver checks that they are equal before dropping them."""
    if skeleton is None or not source.config.get("tie_word_embeddings", False):
        return {}
    return {a: b for a, b in skeleton.tied.items() if a in source.tensors and b in source.tensors}


def _refuse_nothing(entries: Sequence[PlanEntry], recipe: Recipe) -> None:
    if not any(entry.action == "quantize" for entry in entries):
        raise PlanError("nothing would be quantized", mend="check the overrides; no linear layer of a block is left")
    del recipe


def _refuse_mixed_fusions(entries: Iterable[PlanEntry]) -> None:
    groups: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for entry in entries:
        if entry.unit is None or entry.unit.role not in ("linear", "expert"):
            continue
        parent, _, leaf = entry.unit.name.rpartition(".")
        for fused in _FUSED:
            if leaf in fused:
                what = entry.scheme.describe() if entry.scheme is not None else "kept"
                groups.setdefault((parent, fused), {})[leaf] = what
    for (parent, fused), found in groups.items():
        if len(set(found.values())) > 1:
            parts = ", ".join(f"{leaf} {what}" for leaf, what in found.items())
            raise PlanError(
                f"{parent}: serving engines fuse {'/'.join(fused)}, but they would differ ({parts})",
                mend="write the override so that it matches all of them, or use --layout native",
            )


def _router_names(structure: Structure) -> list[str]:
    return [t.removesuffix(".weight") for t, why in structure.left.items() if "Router" in why or "router" in why]


def _method_meta(recipe: Recipe) -> dict[str, Any]:
    method = make_method(recipe.method, recipe.method_options)
    options = {k: v for k, v in vars(method).items() if isinstance(v, int | float | str | bool)}
    return {"method": recipe.method, **options, "sequential": recipe.sequential}


def _engines(
    layout: Layout, schemes: Mapping[str, Scheme], kept: Sequence[str], model_type: str
) -> dict[str, str | None]:
    """Engine -> None where all parts load there, together, else the first reason why not."""
    result = layout.loads_together(schemes, kept)
    for scheme in dict.fromkeys(schemes.values()):
        for engine, why in layout.loads_in(scheme, model_type).items():
            result[engine] = result.get(engine) or why
    return result
