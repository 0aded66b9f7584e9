"""Model-scope transforms around a plan: the rewritten source is planned, and compared with the original before anything is written."""

from __future__ import annotations

from dataclasses import replace

import torch

from bitwright.core.source import Source
from bitwright.core.transform import ModelTransform
from bitwright.engine.plan import Plan, make_plan
from bitwright.engine.recipe import Recipe, make_plugin
from bitwright.engine.rotated import RotatedSource
from bitwright.engine.rotating import rotated_source
from bitwright.errors import NumericError, PlanError
from bitwright.model.blocks import BlockRunner
from bitwright.model.names import map_names
from bitwright.model.skeleton import build_skeleton

__all__ = ["plan_rewritten", "prove_unchanged"]

#: Random tokens that run through both models.
_TOKENS = 32
#: Largest median over the tokens of the relative error of their logits. The median, because a router that is within rounding of a tie can
#: choose another expert for one token; a wrong rotation is wrong for all.
_TOLERANCE = 1e-3


def plan_rewritten(recipe: Recipe, source: Source, *, target: str | None = None) -> tuple[Plan, Source]:
    """The plan for ``source`` as the recipe's model-scope transforms rewrite it, and that source; see ``make_plan``."""
    found = [make_plugin("transforms", choice) for choice in recipe.transforms]
    scopes = [transform.scope for transform in found]
    if scopes != sorted(scopes, reverse=True):  # "model" before "block"
        raise PlanError("transforms of the whole model come before those of blocks", mend="name rotate first")
    notes: list[str] = []
    rotated: RotatedSource | None = None
    for transform in found:
        if isinstance(transform, ModelTransform):
            rotated, new = rotated_source(rotated or source, transform, recipe.seed)
            notes += new
    plan = make_plan(recipe, rotated or source, target=target)
    if rotated is None:
        return plan, source
    exact = frozenset(entry.tensor for entry in plan.quantized)
    rounded = [e.tensor for e in plan.entries if e.action == "keep" and e.tensor in rotated.turned]
    if any(rotated.tensors[name].dtype != torch.float32 for name in rounded):
        shown = ", ".join(rounded[:3]) + (" ..." if len(rounded) > 3 else "")
        notes.append(f"{len(rounded)} rotated tensors that are kept are rounded to their stored dtype ({shown})")
    return replace(plan, notes=(*notes, *plan.notes)), rotated.with_exact(exact)


def prove_unchanged(plan: Plan, source: Source, rewritten: Source) -> None:
    """Run some tokens through both checkpoints, block by block in float32; NumericError where the logits differ."""
    if not isinstance(rewritten, RotatedSource):
        return
    assert plan.skeleton is not None
    assert plan.names is not None
    skeleton = build_skeleton(source.path)
    runners = (
        BlockRunner(skeleton, map_names(skeleton, source.tensors), source, torch.float32),
        BlockRunner(plan.skeleton, plan.names, rewritten.with_exact(None), torch.float32),
    )
    vocabulary = int(skeleton.model.get_input_embeddings().num_embeddings)
    tokens = torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    logits: list[torch.Tensor] = []
    for runner in runners:
        (capture,) = runner.capture([tokens])
        hidden = capture.hidden
        for index, call in enumerate(capture.calls):
            block = runner.load_block(index)
            hidden = runner.run(block, hidden, call)
            runner.free(block)
        with runner.head() as head:
            logits.append(head(hidden)[0].float())
    if not bool(torch.isfinite(logits[0]).all()):
        raise NumericError("the model's own logits are not finite", mend="check the weights")
    centred = logits[0] - logits[0].mean(-1, keepdim=True)
    error = (logits[1] - logits[0]).norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-30)
    if not float(error.median()) <= _TOLERANCE:
        raise NumericError(
            f"the rotated model computes other logits than the original (relative error {float(error.median()):.2g})",
            mend="leave the rotation out for this model",
        )
