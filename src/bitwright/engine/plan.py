"""The plan: from headers alone, what becomes of every tensor, in exact bytes; the impossible is refused here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from bitwright import catalog
from bitwright.core.fused import FUSED
from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES, Layout
from bitwright.core.method import Method
from bitwright.core.options import build
from bitwright.core.ranges import Range
from bitwright.core.scheme import Scheme
from bitwright.core.source import Source
from bitwright.core.tensor import TensorSpec, parse_dtype
from bitwright.core.transform import Transform
from bitwright.engine.recipe import Override, Recipe, block_numbers, make_inputs, make_method, make_plugin
from bitwright.errors import InputError, PlanError
from bitwright.io.safetensors_writer import ShardPlan, plan_shards
from bitwright.model.names import NameMap, map_names
from bitwright.model.roles import role_of
from bitwright.model.skeleton import Skeleton, build_skeleton
from bitwright.model.structure import LinearUnit, Structure, structure_from_headers, structure_from_skeleton

__all__ = ["ENGINES", "Plan", "PlanEntry", "make_layout", "make_plan", "make_scheme"]


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
    range: Range | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics of its input that are wanted, by the method and for static input ranges."""
        needs = self.method.needs if self.method is not None else frozenset()
        return needs | self.range.needs if self.range is not None else needs

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
    transforms: tuple[Transform, ...] = ()
    kv_cache: InputScheme | None = None
    #: attention modules whose KV-cache scales are stored, by block
    attention: Mapping[int, str] = field(default_factory=dict)

    @property
    def quantized(self) -> tuple[PlanEntry, ...]:
        """Entries that are quantized."""
        return tuple(entry for entry in self.entries if entry.action == "quantize")

    @property
    def needs_calibration(self) -> bool:
        """True where statistics of layer inputs are wanted, by a method, a transform or for static ranges."""
        if any(t.needs for t in self.transforms) or (self.kv_cache is not None and not self.kv_cache.dynamic):
            return True
        return any(entry.needs for entry in self.quantized)

    @property
    def extra_tensors(self) -> tuple[str, ...]:
        """Stored tensors that come from no tensor of the source: the scales of the KV cache."""
        if self.kv_cache is None:
            return ()
        return tuple(s.name for a in self.attention.values() for s in self.layout.kv_cache_tensors(a, self.kv_cache))

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
    if recipe.budget is not None:
        raise PlanError(
            "which bits a budget gives to which layer is measured, not read off headers",
            mend="see `bitwright allocate`",
        )
    if target is not None and target not in ENGINES:
        raise PlanError(f"engine '{target}' is unknown", mend=f"use one of: {', '.join(ENGINES)}")
    notes: list[str] = []
    skeleton, names, structure = _structure(recipe, source, notes)
    model_dtype = _model_dtype(source)
    layout = make_layout(recipe)
    entries = _entries(recipe, source, structure, layout, model_dtype, skeleton)
    kv_cache, attention = _kv_cache(recipe, layout, skeleton, structure)
    _refuse_nothing(entries)
    if layout.fuses:
        _refuse_mixed_fusions(entries)
    schemes = {e.unit.name: e.scheme for e in entries if e.action == "quantize" and e.unit and e.scheme}
    kept = [e.unit.name for e in entries if e.action == "keep" and e.unit is not None and e.unit.role != "embedding"]
    kept += _router_names(structure)
    if not any(unit.role == "head" for unit in structure.units):
        kept.append("lm_head")
    meta = _method_meta(recipe)
    if kv_cache is not None:
        meta["kv_cache"] = kv_cache
    config = layout.config(schemes, kept, meta)
    model_type = str(source.config.get("model_type", "?"))
    engines = layout.engines(schemes, kept, model_type)
    if target is not None and engines.get(target) is not None:
        raise PlanError(
            f"the output would not load in {target}: {engines[target]}", mend="change layout, bits or group size"
        )
    stored = [spec for e in entries for spec in e.stored]
    if kv_cache is not None:
        stored += [spec for name in attention.values() for spec in layout.kv_cache_tensors(name, kv_cache)]
    return Plan(
        recipe=recipe,
        entries=tuple(entries),
        structure=structure,
        layout=layout,
        shards=tuple(plan_shards(stored, recipe.max_shard_bytes)),
        model_type=model_type,
        model_dtype=model_dtype,
        compute_dtype=_compute_dtype(recipe, model_dtype),
        quantization_config=config,
        engines=engines,
        notes=tuple(notes),
        skeleton=skeleton,
        names=names,
        transforms=_transforms(recipe),
        kv_cache=kv_cache,
        attention=attention,
    )


def _transforms(recipe: Recipe) -> tuple[Transform, ...]:
    """Those of block scope; the model's were applied to the source already."""
    found = [make_plugin("transforms", choice) for choice in recipe.transforms]
    return tuple(transform for transform in found if transform.scope == "block")


def _kv_cache(
    recipe: Recipe, layout: Layout, skeleton: Skeleton | None, structure: Structure
) -> tuple[InputScheme | None, dict[int, str]]:
    """How the KV cache is quantized, and the attention module of every block that the scales belong to."""
    if recipe.kv_cache is None:
        return None, {}
    scheme = make_inputs(recipe.kv_cache)
    if scheme.dynamic or scheme.strategy != "tensor":
        raise PlanError("KV-cache scales are static, one per tensor", mend="use strategy: tensor, dynamic: false")
    reason = layout.accepts_kv_cache(scheme)
    if reason is not None:
        raise PlanError(f"layout {layout.name} cannot store it: {reason}", mend="use --layout compressed-tensors")
    if skeleton is None:
        raise PlanError("KV-cache scales need model code to be measured", mend="drop the kv_cache option")
    found: dict[int, str] = {}
    for unit in structure.units:
        if unit.block is not None and role_of(unit.name, unit.role) & {"attn_k", "attn_qkv"}:
            found.setdefault(unit.block, unit.name.rpartition(".")[0])
    if not found:
        raise PlanError("no attention modules were found", mend="drop the kv_cache option")
    return scheme, found


def _structure(recipe: Recipe, source: Source, notes: list[str]) -> tuple[Skeleton | None, NameMap | None, Structure]:
    """With model code where there is any; without, only for methods that need no data."""
    calibrated = recipe.needs_calibration
    try:
        skeleton = build_skeleton(source.path, untied=source.config.get("tie_word_embeddings") is False)
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


def make_layout(recipe: Recipe) -> Layout:
    """The layout that a recipe names, with its options."""
    layout = build(catalog.load("layouts", recipe.layout), recipe.layout_options, f"layout '{recipe.layout}'")
    assert isinstance(layout, Layout)
    return layout


def make_scheme(recipe: Recipe, layout: Layout, model_dtype: torch.dtype, override: Override | None = None) -> Scheme:
    """The scheme that a recipe (with one exception applied) asks for, under the layout's limits.

    ``bits``, ``symmetric``, ``group_size`` (also as ``block_size``) and ``scale_dtype`` go to the fields of these names. Raises PlanError
    where the scheme has no such field.
    """
    name, options = recipe.scheme, dict(recipe.scheme_options)
    values: dict[str, Any] = {key: getattr(recipe, key) for key in ("bits", "group_size", "symmetric")}
    if override is not None:
        if override.scheme is not None:
            name, options, values = override.scheme, {}, dict.fromkeys(values)
        options |= override.scheme_options
        values |= {key: value for key in values if (value := getattr(override, key)) is not None}
    plugin = catalog.load("schemes", name)
    known = {f.name: f for f in fields(plugin)}
    for key, value in values.items():
        if value is None:
            continue
        field_name = key
        if key == "group_size":
            field_name = "granularity" if isinstance(value, str) else "group_size" if key in known else "block_size"
        if field_name not in known:
            raise PlanError(f"scheme {name} has no {key.replace('_', ' ')} to choose", mend=f"drop {key}")
        options[field_name] = value
    if "scale_dtype" in known and "scale_dtype" not in options:
        storable = str(model_dtype).removeprefix("torch.")
        auto = storable if storable in ("float16", "bfloat16", "float32") else "float32"
        if recipe.scale_dtype != "auto" or known["scale_dtype"].default != "float32":
            options["scale_dtype"] = auto if recipe.scale_dtype == "auto" else recipe.scale_dtype
    if recipe.inputs is not None:
        if "inputs" not in known:
            raise PlanError(f"scheme {name} leaves inputs in 16 bits", mend="drop inputs, or use affine or float8")
        options["inputs"] = make_inputs(recipe.inputs)
    build_options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return catalog.load_scheme({"kind": name, **build_options}).limit(layout.limits(model_dtype))


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise PlanError(f"pattern '{pattern}' is not a regular expression: {error}", mend="mend it") from error
    return fnmatch.fnmatchcase(name, pattern)


def _holds(override: Override, unit: LinearUnit, blocks: int) -> bool:
    """True where every condition of an exception holds for a unit."""
    if override.role is not None and override.role not in role_of(unit.name, unit.role):
        return False
    if override.layers is not None and unit.block not in block_numbers(override.layers, blocks):
        return False
    return _matches(override.pattern, unit.name)


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
        hits = [i for i, o in enumerate(recipe.overrides) if _holds(o, unit, structure.block_count)]
        unused -= set(hits)
        override = recipe.overrides[hits[0]] if hits else None
        wanted = unit.role in ("linear", "expert") or (unit.role == "head" and recipe.head)
        wanted = wanted or (unit.role == "embedding" and recipe.embeddings)
        if override is not None and override.keep:
            entries.append(replace(keep, reason=f"kept by '{override.title()}'"))
        elif not wanted:
            entries.append(replace(keep, reason=f"{unit.role} kept unless asked for"))
        elif not spec.dtype.is_floating_point:
            entries.append(replace(keep, reason=f"already {spec.dtype}"))
        else:
            entries.append(_quantized(recipe, layout, model_dtype, unit, spec, override))
    if unused:
        title = recipe.overrides[min(unused)].title()
        raise PlanError(f"override '{title}' matches no layer", mend="see the names with `bitwright plan`")
    asked = [("head", recipe.head), ("embedding", recipe.embeddings)]
    for role, on in asked:
        if on and not any(e.action == "quantize" and e.unit and e.unit.role == role for e in entries):
            raise PlanError(
                f"there is no {role} of its own to quantize in this checkpoint", mend=f"drop the {role} option"
            )
    if recipe.embeddings and not layout.stores_embeddings:
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
    if unit.role in ("head", "embedding") and scheme.inputs is not None:
        # There are no statistics outside the blocks, and serving engines keep the head's input in 16 bits.
        scheme = replace(scheme, inputs=None)  # type: ignore[type-var]
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
    own = override.method_options if override and override.method else {}
    method = make_method(name, own or (recipe.method_options if name == recipe.method else {}))
    reason = method.accepts(scheme)
    if reason is not None:
        raise PlanError(
            f"{unit.name}: method {method.name} cannot serve {scheme.describe()}: {reason}", mend="use another"
        )
    static = scheme.inputs is not None and not scheme.inputs.dynamic
    return PlanEntry(
        unit.tensor,
        spec,
        "quantize",
        layout.tensors(unit.name, scheme, unit.shape),
        scheme.describe_all(),
        unit,
        scheme,
        method,
        make_plugin("ranges", recipe.input_range) if static else None,
    )


def _tied_stored(source: Source, skeleton: Skeleton | None) -> dict[str, str]:
    """Stored tensors that only repeat a tied one. The driver checks that they are equal before dropping them."""
    if skeleton is None or not source.config.get("tie_word_embeddings", False):
        return {}
    return {a: b for a, b in skeleton.tied.items() if a in source.tensors and b in source.tensors}


def _refuse_nothing(entries: Sequence[PlanEntry]) -> None:
    if not any(entry.action == "quantize" for entry in entries):
        raise PlanError("nothing would be quantized", mend="check the overrides; no linear layer of a block is left")


def _refuse_mixed_fusions(entries: Iterable[PlanEntry]) -> None:
    groups: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for entry in entries:
        if entry.unit is None or entry.unit.role not in ("linear", "expert"):
            continue
        parent, _, leaf = entry.unit.name.rpartition(".")
        for fused in FUSED.values():
            if leaf in fused:
                what = entry.scheme.describe_all() if entry.scheme is not None else "kept"
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
