"""Block-scope transforms of one block: find edges, collect statistics, choose factors, fold them into the source."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from bitwright.core.method import Stats
from bitwright.core.transform import BlockTransform, ConsumerView, Edge, EdgeView
from bitwright.engine.collect import Batch, Group, collect, trace
from bitwright.engine.fold import Folder
from bitwright.engine.plan import Plan, PlanEntry
from bitwright.engine.progress import Progress
from bitwright.engine.rewrite import RewrittenSource
from bitwright.errors import NumericError
from bitwright.model.blocks import BlockRunner
from bitwright.model.edges import find_edges
from bitwright.model.observe import Slot
from bitwright.model.roles import role_of

__all__ = ["EDGE_TOKENS", "PROBE_TOKENS", "BlockTransforms", "Samples"]

#: Tokens that edges are searched with, of one sequence, and about how many a probe runs.
EDGE_TOKENS, PROBE_TOKENS = 256, 1024
#: Roles whose output goes through the softmax.
_ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv"})
#: Largest change of what a block adds to its input, relative to it, in float32. Biases that are rounded to 16 bits cause about 0.002.
_UNCHANGED = 0.02


@dataclass(frozen=True)
class Samples:
    """Inputs of one block in float32: for the search of edges (one sequence), and for probes."""

    edges: Batch
    probe: Batch


@dataclass
class BlockTransforms:
    """The transforms of a plan, block by block. max_gram_bytes: how much of Gram matrices may be held at a time.

    Edges are searched in every block, so that a resumed run finds what the first one found.
    """

    plan: Plan
    runner: BlockRunner
    progress: Progress
    max_gram_bytes: int
    _told: set[str] = field(default_factory=set)

    def apply(
        self,
        index: int,
        block: nn.Module,
        source: RewrittenSource,
        entries: Sequence[PlanEntry],
        batches: Callable[[], Iterable[Batch]],
        samples: Samples,
    ) -> None:
        """Add to ``source`` what the transforms make of block ``index``, and load the block anew from it.

        block: loaded with its original weights, in the dtype of ``batches``; its output stays the same (NumericError where it does not).
        """
        # In float32 the error of a few codes is seen, which the rounding of bfloat16 activations would hide.
        exact = block if self.runner.dtype == torch.float32 else copy.deepcopy(block).float()
        sample = samples.edges
        before = self.runner.run(exact, sample.hidden, sample.call)
        edges, left = find_edges(
            exact, lambda: self.runner.run(exact, sample.hidden, sample.call), residual=sample.hidden
        )
        for line in left:
            self._tell(f"not folded: {line}")
        work = _Block(
            self, index, block, exact, source, {e.tensor: e for e in entries if e.action == "quantize"}, batches
        )
        for transform in self.plan.transforms:
            assert isinstance(transform, BlockTransform)
            work.apply(transform, edges, samples.probe)
            self._reload(index, block, source, self.runner.dtype)
            if exact is not block:
                self._reload(index, exact, source, torch.float32)
        self._check(index, before, self.runner.run(exact, sample.hidden, sample.call), sample.hidden)
        if exact is not block:
            self.runner.free(exact)

    def _check(self, index: int, before: torch.Tensor, after: torch.Tensor, hidden: torch.Tensor) -> None:
        change = float((after - before).square().mean().sqrt())
        # The part that the block adds to its input, so that a large residual stream does not hide a difference.
        scale = max(float((before - hidden).square().mean().sqrt()), 1e-30)
        if not change <= _UNCHANGED * scale:
            names = ", ".join(t.name for t in self.plan.transforms)
            raise NumericError(
                f"block {index}: {names} changed its output by {change / scale:.2%}", mend="leave the transform out"
            )

    def _reload(self, index: int, block: nn.Module, source: RewrittenSource, dtype: torch.dtype) -> None:
        """Fill the block again, from the rewritten tensors."""
        block.to("meta")
        kept = self.runner.source, self.runner.dtype
        self.runner.source, self.runner.dtype = source, dtype
        try:
            self.runner.fill(f"{self.runner.skeleton.blocks_path}.{index}", block)
        finally:
            self.runner.source, self.runner.dtype = kept

    def _tell(self, line: str) -> None:
        """Once, for blocks are alike."""
        if line not in self._told:
            self._told.add(line)
            self.progress.note(line)


@dataclass
class _Block:
    """One block while its transforms are applied. block: as statistics are collected; exact: the same in float32."""

    owner: BlockTransforms
    index: int
    block: nn.Module
    exact: nn.Module
    source: RewrittenSource
    entries: Mapping[str, PlanEntry]
    batches: Callable[[], Iterable[Batch]]

    def __post_init__(self) -> None:
        plan = self.owner.plan
        assert plan.skeleton is not None
        assert plan.names is not None
        self.prefix = f"{plan.skeleton.blocks_path}.{self.index}."
        self.folder = Folder(self.prefix, plan.names, self.source.tensors, frozenset(self.entries), self.source.read)
        self.units = [e.unit for e in self.entries.values() if e.unit is not None]

    def apply(self, transform: BlockTransform, edges: Sequence[Edge], probe: Batch) -> None:
        usable = []
        for edge in edges:
            reason = self.folder.reason(edge)
            if reason is None:
                usable.append(edge)
            else:
                self.owner._tell(f"not folded: {edge.name}: {reason}")
        first = next(iter(self.batches()))
        stages = trace(self.block, self.prefix, self.units, first.hidden, first.call)
        groups = [group for stage in stages for group in stage]
        extra = transform.needs - {"gram"}
        chosen: list[tuple[Edge, torch.Tensor]] = []
        for together in self._batched(usable, groups):
            wanted = [g for g in groups if any(set(g.slots) & _slots(edge) for edge in together)]
            found = collect(self.block, wanted, self.batches(), extra=extra)
            stats = {slot: s.of(slot) for g, s in zip(wanted, found, strict=True) for slot in g.slots}
            for edge in together:
                factors = transform.factors(self._view(edge, stats, probe))
                if factors is not None:
                    chosen.append((edge, factors))
        for edge, factors in chosen:
            self.source.add(self.folder.fold(edge, factors))

    def _batched(self, edges: Sequence[Edge], groups: Sequence[Group]) -> Iterable[list[Edge]]:
        """Edges whose consumers' Gram matrices fit in memory together, at least one at a time."""
        batch: list[Edge] = []
        held: set[int] = set()
        for edge in edges:
            mine = {i for i, group in enumerate(groups) if set(group.slots) & _slots(edge)}
            if not mine:
                continue  # nothing that it feeds is quantized
            if batch and sum(groups[i].gram_bytes for i in held | mine) > self.owner.max_gram_bytes:
                yield batch
                batch, held = [], set()
            batch.append(edge)
            held |= mine
        if batch:
            yield batch

    def _view(self, edge: Edge, stats: Mapping[Slot, Stats], probe: Batch) -> EdgeView:
        views: list[ConsumerView] = []
        attention = False
        for consumer in edge.consumers:
            for tensor, place in self.folder.tensors_of(consumer.weight, consumer.expert):
                entry = self.entries.get(tensor)
                weight = self.source.read(tensor).float()
                weight = weight.T.contiguous() if place.transposed != consumer.transposed else weight
                views.append(
                    ConsumerView(
                        name=tensor, weight=weight, channel=consumer.channel,
                        stats=stats.get((consumer.weight, consumer.expert), {}),
                        scheme=entry.scheme if entry is not None else None,
                        feedback=entry is not None and entry.method is not None and entry.method.feeds_back,
                        searched=entry is not None and entry.method is not None and bool(entry.method.needs),
                    )
                )  # fmt: skip
                attention = attention or bool(role_of(tensor.removesuffix(".weight"), "linear") & _ATTENTION)
        producer = edge.producer
        matrix: torch.Tensor = self.exact.get_parameter(producer.weight)
        matrix = matrix if producer.expert is None else matrix[producer.expert]
        matrix = matrix.T if producer.transposed else matrix
        experts = any(c.expert is not None for c in edge.consumers)
        return EdgeView(
            name=f"block {self.index}: {edge.name}", channels=edge.channels, norm=producer.norm, attention=attention,
            producer=matrix[producer.rows] + producer.offset, consumers=tuple(views), storable=self._storing(edge),
            probe=None if experts else _Probe(self, edge, probe),
        )  # fmt: skip

    def _storing(self, edge: Edge) -> Callable[[torch.Tensor], torch.Tensor]:
        stored = self.folder.storing(edge)
        return lambda factors: stored(factors).float()


class _Probe:
    """Mean squared error of the block's true output if an edge's consumers were other weights."""

    def __init__(self, work: _Block, edge: Edge, sample: Batch) -> None:
        self._work, self._edge, self._sample = work, edge, sample
        self._wanted: torch.Tensor | None = None

    def _run(self) -> torch.Tensor:
        return self._work.owner.runner.run(self._work.exact, self._sample.hidden, self._sample.call)

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> float:
        if self._wanted is None:
            self._wanted = self._run()
        with self._replaced(weights):
            return float((self._run() - self._wanted).square().mean())

    @contextmanager
    def _replaced(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            with torch.no_grad():
                for target, value in self._targets(weights):
                    kept.append((target, target.clone()))
                    target.copy_(value)
            yield
        finally:
            with torch.no_grad():
                for target, value in kept:
                    target.copy_(value)

    def _targets(self, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views ``(out, in)`` of the block's parameters, and what belongs there."""
        for consumer in self._edge.consumers:
            for tensor, place in self._work.folder.tensors_of(consumer.weight, consumer.expert):
                if tensor not in weights:
                    continue
                target: torch.Tensor = self._work.exact.get_parameter(consumer.weight)
                target = target if consumer.expert is None else target[consumer.expert]
                target = target.T if consumer.transposed else target
                yield (target if place.rows is None else target[place.rows[0] : place.rows[1]]), weights[tensor]


def _slots(edge: Edge) -> set[Slot]:
    return {(consumer.weight, consumer.expert) for consumer in edge.consumers}
