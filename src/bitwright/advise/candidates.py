"""Which ways of storing each group of tied weights are on offer under a budget, and what each takes in the layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bitwright import catalog
from bitwright.blocks import codec
from bitwright.blocks.types import TYPES, BlockType, named
from bitwright.core.fused import fused_name
from bitwright.core.layout import Layout
from bitwright.core.method import Context, Method
from bitwright.core.scheme import Scheme
from bitwright.core.stats import Gram
from bitwright.engine.gguf_source import FromCheckpoint
from bitwright.engine.plan import Plan, PlanEntry, make_layout, make_scheme
from bitwright.engine.recipe import Override, Recipe, make_method
from bitwright.engine.sensitivity import Candidate, Tied
from bitwright.errors import InputError, PlanError
from bitwright.gguf.mixture import quantizable
from bitwright.model.structure import LinearUnit

__all__ = ["KEEP", "Offer", "checkpoint_offers", "gguf_offers"]

#: Label of the option that leaves weights as they are.
KEEP = "keep"
_AFFINE = re.compile(r"(\d)(?:g(\d+|channel))?(a?)")
#: name -> scheme and options
_NAMED: Mapping[str, tuple[str, dict[str, object]]] = {
    "nf4": ("codebook", {"book": "nf4"}),
    "nf4-dq": ("codebook", {"book": "nf4", "double_quant": True}),
    "fp4": ("codebook", {"book": "fp4"}),
    "int8": ("absmax-int8", {}),
    "fp8": ("float8", {"granularity": "channel"}),
    "mxfp4": ("microscaling", {"element": "mxfp4"}),
    "nvfp4": ("microscaling", {"element": "nvfp4"}),
}
_PLAIN = ("2g32", "2g64", "2g128", "3g32", "3g64", "3g128", "4g64", "4g128", "5g64", "5g128", "6g128", "8g128")
#: What is offered where the recipe names nothing, by layout.
_DEFAULT: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("nf4", "nf4-dq", KEEP),
    "fp8": ("fp8", KEEP),
}
_K_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_LATTICE = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
#: For rows that are no multiple of 256.
_SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0")
#: Bits of the candidate that is measured in full: errors there are neither tiny nor out of the linear range.
_REFERENCE_BITS = 3.6


@dataclass(frozen=True)
class Offer:
    """A group with its options. bytes: label -> what the whole group takes; weights: how many it has. stored: label -> scheme or type."""

    tied: Tied
    bytes: Mapping[str, int]
    weights: int
    stored: Mapping[str, Scheme | BlockType | None]


def checkpoint_offers(recipe: Recipe, plan: Plan, target: str | None) -> list[Offer]:
    """For every layer that the plan quantizes, whatever its scheme there. PlanError where a group has nothing on offer."""
    layout = make_layout(recipe)
    texts = recipe.budget.candidates if recipe.budget is not None else ()
    schemes = _schemes(texts or _DEFAULT.get(layout.name, (*_PLAIN, KEEP)), recipe, layout, plan.model_dtype)
    groups: dict[str, list[PlanEntry]] = {}
    for entry in plan.quantized:
        assert entry.unit is not None
        groups.setdefault(_tie(entry.unit, layout.fuses), []).append(entry)
    check = _Check(layout, make_method(recipe.method, recipe.method_options), target, plan.model_type)
    return [_checkpoint_offer(name, entries, schemes, check) for name, entries in groups.items()]


def _tie(unit: LinearUnit, fuses: bool) -> str:
    """Group of a unit: parts of a fused layer together, experts of a block together."""
    name = fused_name(unit.name) if fuses else unit.name
    if unit.role != "expert":
        return name
    lead, dot, inside = name.partition(f".{unit.block}.")
    return lead + dot + re.sub(r"\.\d+\.", ".*.", inside)


def _schemes(
    texts: Sequence[str], recipe: Recipe, layout: Layout, model_dtype: torch.dtype
) -> dict[str, Scheme | None]:
    found: dict[str, Scheme | None] = {}
    for text in texts:
        if text == KEEP:
            found[text] = None
            continue
        match = _AFFINE.fullmatch(text)
        if match is not None:
            # A scheme that an exception names starts from that scheme's own defaults, so the recipe's are said again.
            values: dict[str, object] = {
                "scheme": "affine",
                "bits": int(match[1]),
                "group_size": match[2] or recipe.group_size,
                "symmetric": False if match[3] else recipe.symmetric,
            }
        elif text in _NAMED:
            name, options = _NAMED[text]
            values = {"scheme": name, "scheme_options": dict(options)}
        else:
            known = ", ".join(["4g128 (bits, group size)", "4gchannel", "4g32a (asymmetric)", *_NAMED, KEEP])
            raise InputError(f"candidate '{text}' is unknown", mend=f"use: {known}")
        plain = recipe.model_copy(update={"inputs": None})
        found[text] = make_scheme(plain, layout, model_dtype, Override.model_validate(values))
    return found


@dataclass(frozen=True)
class _Check:
    """What stands between a layer and a scheme."""

    layout: Layout
    method: Method
    target: str | None
    model_type: str

    def reason(self, unit: LinearUnit, scheme: Scheme) -> str | None:
        """Why a layer cannot take a scheme; None where it can."""
        try:
            scheme.grid(unit.shape)
        except PlanError as error:
            return error.message
        reason = self.layout.accepts(scheme, unit.shape) or self.method.accepts(scheme)
        if reason is None and self.target is not None:
            return self.layout.loads_in(scheme, self.model_type).get(self.target)
        return reason


def _checkpoint_offer(
    name: str, entries: Sequence[PlanEntry], schemes: Mapping[str, Scheme | None], check: _Check
) -> Offer:
    units = tuple(entry.unit for entry in entries if entry.unit is not None)
    sizes: dict[str, int] = {}
    stored: dict[str, Scheme | BlockType | None] = {}
    reasons: dict[str, str] = {}
    for label, scheme in schemes.items():
        if scheme is None:
            sizes[label], stored[label] = sum(entry.spec.nbytes for entry in entries), None
            continue
        reason = next((why for unit in units if (why := check.reason(unit, scheme)) is not None), None)
        if reason is not None:
            reasons[label] = reason
            continue
        sizes[label] = sum(
            spec.nbytes for unit in units for spec in check.layout.tensors(unit.name, scheme, unit.shape)
        )
        stored[label] = scheme
    rounded = [label for label in sizes if stored[label] is not None]
    if not rounded:
        why = "; ".join(f"{label}: {reason}" for label, reason in list(reasons.items())[:3])
        raise PlanError(
            f"{name}: no candidate can be stored ({why})", mend="keep this layer, or name others with --candidates"
        )
    weights = sum(math.prod(unit.shape) for unit in units)
    candidates = tuple(_scheme_candidate(label, stored[label], units) for label in sizes)
    reference = _nearest({label: 8 * sizes[label] / weights for label in rounded})
    return Offer(Tied(name, units, candidates, reference), sizes, weights, stored)


def _nearest(bits: Mapping[str, float]) -> str:
    return min(bits, key=lambda label: abs(math.log(bits[label] / _REFERENCE_BITS)))


def _scheme_candidate(label: str, scheme: object, units: Sequence[LinearUnit]) -> Candidate:
    if not isinstance(scheme, Scheme):
        return Candidate(label, _unchanged)
    # A coarse search: its errors only rank candidates.
    search, rtn = make_method("search", {"steps": 6, "refits": 1}), make_method("rtn", {})
    method = search if search.accepts(scheme) is None else rtn
    context = Context(
        feedback=catalog.load("kernels", "numba-feedback"),
        tile_sums=catalog.load("kernels", "numba-tiles"),
        encode=catalog.load("kernels", "numba-encode"),
    )

    def quantize(weight: torch.Tensor, gram: Gram | None) -> torch.Tensor:
        own = replace(context, prepared=scheme.prepare([weight]))
        return method.quantize(weight, {} if gram is None else {"gram": gram}, scheme, own).tensor.decode()

    apart = scheme.shares or scheme.two_level or any(scheme.outlier_count(unit.shape) for unit in units)
    return Candidate(label, quantize, by_rows=not apart and all(scheme.by_rows(unit.shape) for unit in units))


def _unchanged(weight: torch.Tensor, _gram: Gram | None) -> torch.Tensor:
    return weight


# --- GGUF --------------------------------------------------------------------------------------------------------------------


def gguf_offers(recipe: Recipe, plan: Plan, source: FromCheckpoint, *, imatrix: bool) -> list[Offer]:
    """For every tensor of the file that a mixture would quantize and whose linears the model's code runs.

    imatrix: importance weights will be there, so that types that need them are on offer, and errors are those of weighted rounding.
    """
    texts = recipe.budget.candidates if recipe.budget is not None else ()
    calibrated = recipe.method != "rtn"
    units = {unit.name: unit for unit in plan.structure.units}
    offers: list[Offer] = []
    for name, place in source.places.items():
        modules = source.modules.get(name, ())
        known = tuple(units[module] for module in modules if module in units)
        if name in source.plain or not quantizable(name, place.shape) or not known or len(known) < len(modules):
            continue
        names = texts or (_K_TYPES + (_LATTICE if imatrix and not calibrated else ()))
        types = [block for text in names if not (block := named(text)).integer]
        fitting = [block for block in types if place.columns % block.values == 0]
        if len(fitting) < len(types) and (not texts or not fitting):
            small = [TYPES[text] for text in _SMALL if place.columns % TYPES[text].values == 0]
            fitting = list(dict.fromkeys([*fitting, *small])) or [TYPES["F16"]]
        inside = known[0].block is not None
        usable = [block for block in fitting if not block.wants_weights or (imatrix and inside)]
        if not usable:
            raise PlanError(
                f"{name}: no candidate can be used without importance weights", mend="give --imatrix auto, or others"
            )
        sizes = {block.name: place.rows * block.row_bytes(place.columns) for block in usable}
        weights = place.rows * place.columns
        tied = Tied(
            name,
            known,
            tuple(_block_candidate(block, weighted=imatrix and inside) for block in usable),
            _nearest({block.name: 8 * sizes[block.name] / weights for block in usable}),
        )
        offers.append(Offer(tied, sizes, weights, {block.name: block for block in usable}))
    if not offers:
        raise PlanError("there is nothing to choose the types of", mend="quantize without a budget")
    return offers


def _block_candidate(block: BlockType, *, weighted: bool) -> Candidate:
    def quantize(weight: torch.Tensor, gram: Gram | None) -> torch.Tensor:
        importance = None
        if weighted:
            columns = weight.shape[1]
            importance = (torch.ones(columns) if gram is None else gram.mean_square).float().numpy()
        blocks = codec.quantize(weight.contiguous().numpy(), block.name, importance)
        return torch.from_numpy(codec.decode(blocks, block.name, weight.shape[1]))

    return Candidate(block.name, quantize)
