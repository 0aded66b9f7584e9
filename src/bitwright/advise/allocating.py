"""A recipe with a budget becomes one with an exception for every layer: sensitivities are measured, then an integer program chooses.

Sensitivities do not depend on the budget. They are kept (``io.cache``), so that other budgets, and the whole curve of loss against size,
cost no second pass.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitwright.advise.allocate import Choices, Option, Point, allocate, frontier
from bitwright.advise.candidates import Offer, checkpoint_offers, gguf_offers
from bitwright.blocks.types import BlockType
from bitwright.core.scheme import Scheme
from bitwright.core.source import Source
from bitwright.engine.calibration import CalibrationTokens, load_texts, load_tokenizer, tokens_from_texts
from bitwright.engine.gguf_source import FromCheckpoint
from bitwright.engine.modelwide import plan_rewritten
from bitwright.engine.plan import Plan, make_plan
from bitwright.engine.progress import Progress, Silent
from bitwright.engine.recipe import Budget, Override, Recipe, make_recipe
from bitwright.engine.run import open_source, vocab_size
from bitwright.engine.sample import sample_tokens
from bitwright.engine.sensitivity import Sensitivity, measure_sensitivities
from bitwright.errors import InputError, PlanError
from bitwright.io.cache import cached_folder
from bitwright.io.safetensors_dir import SafetensorsDir

__all__ = ["Allocation", "allocate_recipe"]

#: Hidden states that are held in memory; what is beyond goes to a temporary file.
_STATES_BYTES = 2 << 30
#: A scheme that fits every layer, for plans that are made to see which layers there are.
_ANY_SCHEME: Mapping[str, Any] = {
    "layout": "native", "method": "rtn", "method_options": {}, "scheme": "affine", "bits": 8, "group_size": "channel",
    "symmetric": None, "scheme_options": {}, "scale_dtype": "auto", "inputs": None,
}  # fmt: skip
#: What a file's header says of its importance matrix at most: four values, two of them texts of up to 127 characters.
_IMATRIX_HEADER = 512
#: Predicted losses below this are noise.
_LEAST_LOSS = 1e-12


@dataclass(frozen=True)
class Allocation:
    """recipe: without a budget, with an exception for every layer. weights: how many are in the program; kept_bytes: what lies outside it.

    sensitivities: group -> what was measured.
    """

    recipe: Recipe
    choices: Choices
    point: Point
    weights: int
    kept_bytes: int
    sensitivities: Mapping[str, Sensitivity]

    @property
    def bits_per_weight(self) -> float:
        """Of the layers in the program."""
        return 8 * self.point.bytes / self.weights

    def curve(self) -> list[Point]:
        """Allocations from the smallest to the best."""
        return frontier(self.choices)

    def to_json(self) -> dict[str, Any]:
        """Plain values. ``schema`` changes when the meaning of a key does."""
        return {
            "schema": "bitwright-allocation-1",
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.point.bytes,
            "kept_bytes": self.kept_bytes,
            "predicted_loss": self.point.loss,
            "groups": {
                name: {
                    "chosen": self.point.chosen[name].label,
                    "options": [asdict(option) for option in options],
                    "reference": self.sensitivities[name].reference,
                    "reference_loss": self.sensitivities[name].reference_loss,
                }
                for name, options in self.choices.items()
            },
            "curve": [
                {
                    "bytes": point.bytes,
                    "bits_per_weight": 8 * point.bytes / self.weights,
                    "predicted_loss": point.loss,
                    "chosen": {name: option.label for name, option in point.chosen.items()},
                }
                for point in self.curve()
            ],
        }


def allocate_recipe(
    recipe: Recipe,
    model: Path,
    *,
    target: str | None = None,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Carry out the recipe's budget for the checkpoint folder ``model``; see ``Budget``.

    target: an engine that must load the output. Raises PlanError where the budget is too small, InputError for models whose blocks
    transformers cannot run.
    """
    progress = progress or Silent()
    budget = recipe.budget
    if budget is None:
        raise InputError("the recipe has no budget", mend="give --fit or --bits-per-weight")
    if model.is_file():
        raise InputError("sensitivities are measured on a checkpoint folder", mend="start from the folder")
    with ExitStack() as stack:
        opened = stack.enter_context(open_source(model))
        base = make_recipe({**recipe.model_dump(), "budget": None})
        if recipe.layout == "gguf":
            problem = _gguf_problem(recipe, base, opened)
        else:
            problem = _checkpoint_problem(recipe, base, opened, target)
        tokens = _tokens(recipe, budget, opened, stack, progress)
        measured = _sensitivities(problem, recipe, opened, tokens, max_memory_bytes, progress)
    choices = {
        offer.tied.name: [
            Option(
                label, max(measured[offer.tied.name].loss(label), _LEAST_LOSS) if errors else 0.0, offer.bytes[label]
            )
            for label, errors in measured[offer.tied.name].errors.items()
        ]
        for offer in problem.offers
    }
    weights = sum(offer.weights for offer in problem.offers)
    if budget.bits_per_weight is not None:
        limit = int(budget.bits_per_weight * weights / 8)
        point = allocate(choices, limit)
        made, size = problem.recipe_for(point), 0
    else:
        assert budget.bytes is not None
        made, point, size = _within(problem, choices, budget.bytes)
    kept = max(size - point.bytes, 0) if size else problem.kept_bytes
    progress.note(
        f"{8 * point.bytes / weights:.3f} bits per weight over {len(choices)} groups; predicted KL divergence of rounding {point.loss:.5f}"
    )
    return Allocation(made, choices, point, weights, kept, measured)


@dataclass(frozen=True)
class _Problem:
    """recipe_for: an allocation -> recipe; size_of: recipe -> bytes of all files."""

    plan: Plan
    source: Source
    offers: Sequence[Offer]
    kept_bytes: int
    recipe_for: Callable[[Point], Recipe]
    size_of: Callable[[Recipe], int]


def _within(problem: _Problem, choices: Choices, limit: int) -> tuple[Recipe, Point, int]:
    """The best allocation whose files, headers and all, take at most ``limit`` bytes."""
    allowed = limit - problem.kept_bytes
    least = sum(min(option.bytes for option in options) for options in choices.values())
    for _ in range(8):
        if allowed < least:
            break
        point = allocate(choices, allowed)
        made = problem.recipe_for(point)
        size = problem.size_of(made)
        if size <= limit:
            return made, point, size
        allowed = point.bytes - (size - limit)
    raise PlanError(
        f"{limit} bytes are too few: {problem.kept_bytes} bytes are not quantized, the rest takes at least {least} bytes",
        mend="allow more, quantize --head and --embeddings where the layout can, or offer smaller --candidates",
    )


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def _checkpoint_problem(recipe: Recipe, base: Recipe, opened: SafetensorsDir, target: str | None) -> _Problem:
    # The recipe's own scheme is of no account; layers to which the user gave one are not in the program.
    fixed = [{**override.model_dump(), "keep": override.keep or _decides(override)} for override in base.overrides]
    plan, source = plan_rewritten(make_recipe({**base.model_dump(), **_ANY_SCHEME, "overrides": fixed}), opened)
    offers = checkpoint_offers(recipe, plan, target)

    def recipe_for(point: Point) -> Recipe:
        return _with_exceptions(base, offers, point)

    def size_of(made: Recipe) -> int:
        return plan_rewritten(made, opened, target=target)[0].weight_file_bytes

    return _Problem(plan, source, offers, _kept(offers, recipe_for, size_of), recipe_for, size_of)


def _decides(override: Override) -> bool:
    """True for an exception that says which numbers exist."""
    given = (override.scheme, override.bits, override.group_size, override.symmetric)
    return bool(override.scheme_options) or any(value is not None for value in given)


def _kept(offers: Sequence[Offer], recipe_for: Callable[[Point], Recipe], size_of: Callable[[Recipe], int]) -> int:
    """Bytes of the files without the groups: those of one allocation, less what the groups take in it."""
    chosen = {}
    for offer in offers:
        rounded = [label for label, stored in offer.stored.items() if stored is not None]
        label = max(rounded, key=lambda label: offer.bytes[label])
        chosen[offer.tied.name] = Option(label, 0.0, offer.bytes[label])
    total = sum(option.bytes for option in chosen.values())
    return size_of(recipe_for(Point(chosen, 0.0, total))) - total


def _with_exceptions(base: Recipe, offers: Sequence[Offer], point: Point) -> Recipe:
    """The recipe with one exception for every option that was chosen. The user's own come first."""
    names: dict[str, list[str]] = {}
    stored: dict[str, Scheme | BlockType | None] = {}
    roles: dict[str, bool] = {}
    for offer in offers:
        label = point.chosen[offer.tied.name].label
        stored[label] = offer.stored[label]
        for unit in offer.tied.units:
            names.setdefault(label, []).append(unit.name)
            field = {"head": "head", "embedding": "embeddings"}.get(unit.role)
            if field is not None:
                roles[field] = roles.get(field, False) or offer.stored[label] is not None
    overrides: list[dict[str, Any]] = [override.model_dump(exclude_unset=True) for override in base.overrides]
    for label, modules in names.items():
        pattern = "re:^(?:" + "|".join(re.escape(name) for name in modules) + ")$"
        scheme = stored[label]
        if scheme is None:
            overrides.append({"pattern": pattern, "keep": True})
            continue
        assert isinstance(scheme, Scheme)
        options = scheme.to_spec()
        kind = options.pop("kind")
        options.pop("inputs", None)
        overrides.append({"pattern": pattern, "scheme": kind, "scheme_options": options})
    return make_recipe({**base.model_dump(), "overrides": overrides, **roles})


# --- GGUF --------------------------------------------------------------------------------------------------------------------


def _gguf_problem(recipe: Recipe, base: Recipe, opened: SafetensorsDir) -> _Problem:
    from bitwright.engine.gguf_run import plan_gguf_file

    choice = recipe.gguf
    assert choice is not None
    if choice.tensor_types or choice.pure or choice.embedding_type or choice.output_type:
        raise InputError("a budget chooses the types of all tensors", mend="drop --tensor-type, --pure and the like")
    plan_recipe = make_recipe({**base.model_dump(), "gguf": None, **_ANY_SCHEME})
    plan, source = (
        plan_rewritten(plan_recipe, opened) if recipe.transforms else (make_plan(plan_recipe, opened), opened)
    )
    offers = gguf_offers(recipe, plan, FromCheckpoint(source, pre=choice.pre), imatrix=choice.imatrix is not None)

    def recipe_for(point: Point) -> Recipe:
        types = tuple(f"^{re.escape(name)}$={option.label}" for name, option in point.chosen.items())
        common = max(point.chosen.values(), key=lambda option: option.bytes).label
        gguf = choice.model_copy(update={"tensor_types": types, "type": _mixture_of(common)})
        return make_recipe({**base.model_dump(), "gguf": gguf.model_dump()})

    def size_of(made: Recipe) -> int:
        return plan_gguf_file(made, opened.path).file_bytes + (_IMATRIX_HEADER if choice.imatrix is not None else 0)

    return _Problem(plan, source, offers, _kept(offers, recipe_for, size_of), recipe_for, size_of)


def _mixture_of(type_: str) -> str:
    """A mixture that has this type as its base, for what the program does not decide and for ``general.file_type``."""
    from bitwright.gguf.mixture import MIXTURES

    named = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "IQ2_S": "IQ2_M"}.get(type_, type_)
    return named if named in MIXTURES else "Q4_K_M"


# --- measuring -----------------------------------------------------------------------------------------------------------------


def _tokens(
    recipe: Recipe, budget: Budget, opened: SafetensorsDir, stack: ExitStack, progress: Progress
) -> CalibrationTokens:
    """The first windows of what calibration would read."""
    text = recipe.calibration.model_copy(update={"samples": budget.samples, "length": budget.length})
    own = recipe.model_copy(update={"calibration": text})
    size = vocab_size(opened)
    if text.text is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitwright-samples-")))
        return sample_tokens(own, opened, folder, size, progress)
    return tokens_from_texts(
        load_texts(text), load_tokenizer(opened.path), text, seed=recipe.seed, vocab_size=size, origin=text.text
    )


def _sensitivities(
    problem: _Problem,
    recipe: Recipe,
    opened: SafetensorsDir,
    tokens: CalibrationTokens,
    max_memory_bytes: int | None,
    progress: Progress,
) -> dict[str, Sensitivity]:
    """Measured, or as an earlier run on the same model, text and candidates kept them."""
    assert recipe.budget is not None
    mode = recipe.budget.sensitivity
    groups = [offer.tied for offer in problem.offers]
    rewritten = [choice.model_dump(mode="json") for choice in recipe.transforms]
    facts = {
        **{f"file {name}": value for name, value in opened.fingerprint().items()},
        **{f"version of {name}": version(name) for name in ("bitwright", "torch", "transformers")},
        "tokens": tokens.digest,
        "mode": mode,
        "groups": json.dumps(
            [[g.name, [u.name for u in g.units], [c.label for c in g.candidates], g.reference] for g in groups]
        ),
        "stored": json.dumps(
            [{k: _spec(v) for k, v in offer.stored.items()} for offer in problem.offers], sort_keys=True
        ),
        "rewritten": json.dumps([rewritten, recipe.seed if rewritten else None], sort_keys=True),
        "weighted": str(recipe.gguf is not None and recipe.gguf.imatrix is not None),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cap = _STATES_BYTES if max_memory_bytes is None else max_memory_bytes // 3

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="bitwright-states-") as scratch:
            found = measure_sensitivities(
                problem.plan, problem.source, tokens.batches, groups, mode, folder=Path(scratch),
                cap_bytes=cap, progress=progress,
            )  # fmt: skip
        content = {name: asdict(one) for name, one in found.items()}
        (folder / "sensitivities.json").write_text(json.dumps(content), encoding="utf-8")

    text = (cached_folder("sensitivities", key, build) / "sensitivities.json").read_text(encoding="utf-8")
    return {name: Sensitivity(**values) for name, values in json.loads(text).items()}


def _spec(stored: Scheme | BlockType | None) -> object:
    return stored.to_spec() if isinstance(stored, Scheme) else None if stored is None else stored.name
