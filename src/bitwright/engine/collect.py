"""Statistics of one block: which linears share an input, in which order they run, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitwright.core.stats import SIMPLE, Accumulate, CrossGram, Gram, Statistic
from bitwright.model.blocks import BlockCall, BlockRunner
from bitwright.model.observe import InputObserver, Slot
from bitwright.model.structure import LinearUnit

__all__ = ["Batch", "Group", "GroupStats", "collect", "fast_accumulate", "split_by_memory", "trace"]


@dataclass(frozen=True)
class Group:
    """Linears that read the same input. columns: width of that input. units: what is stored for these slots."""

    slots: tuple[Slot, ...]
    columns: int
    units: tuple[LinearUnit, ...]

    @property
    def gram_bytes(self) -> int:
        """Size of its Gram matrix in bytes."""
        return 4 * self.columns * self.columns


@dataclass(frozen=True)
class Batch:
    """Inputs of a block for one calibration batch. original: the original model's hidden states, where they are carried."""

    hidden: torch.Tensor
    call: BlockCall
    original: torch.Tensor | None = None


class _StageDone(Exception):
    """Everything this stage reads has been seen; the rest of the block need not run."""


def _slot_of(unit: LinearUnit, prefix: str) -> Slot:
    assert unit.place is not None
    return (unit.place.parameter.removeprefix(prefix), unit.place.expert)


def _watched(block: nn.Module, slots: Iterable[Slot]) -> dict[str, torch.Tensor]:
    wanted = {name for name, _ in slots}
    return {name: value for name, value in block.named_parameters() if name in wanted}


def trace(
    block: nn.Module, prefix: str, units: Sequence[LinearUnit], hidden: torch.Tensor, call: BlockCall
) -> list[list[Group]]:
    """Stages in the order in which the block runs them.

    A stage is a list of groups: one group for dense linears (q, k and v), one group an expert for expert stacks. Units that this
    batch did not reach (rarely chosen experts that are modules of their own) come last, each a group of its own.
    """
    of_slot: dict[Slot, list[LinearUnit]] = {}
    for unit in units:
        of_slot.setdefault(_slot_of(unit, prefix), []).append(unit)
    seen: dict[Slot, int] = {}

    def note(slot: Slot, _x: torch.Tensor, token: int) -> None:
        seen.setdefault(slot, token)

    observer = InputObserver(_watched(block, of_slot), note)
    with observer:
        BlockRunner.run(block, hidden, call)
    stages: dict[tuple[str, object], list[Group]] = {}
    done: set[Slot] = set()
    for slot, token in seen.items():
        if slot in done:
            continue
        name, expert = slot
        if expert is None:
            slots = tuple(s for s, t in seen.items() if t == token and s[1] is None)
            found = tuple(u for s in slots for u in of_slot.get(s, ()))
            done |= set(slots)
            if found:
                stages[("input", token)] = [Group(slots, found[0].shape[1], found)]
        else:
            # Every expert of the stack belongs to the stage, whether or not this batch reached it.
            stack = sorted((s for s in of_slot if s[0] == name), key=lambda s: s[1] or 0)
            done |= set(stack)
            stages[("stack", name)] = [Group((s,), of_slot[s][0].shape[1], tuple(of_slot[s])) for s in stack]
    unseen = [Group((slot,), found[0].shape[1], tuple(found)) for slot, found in of_slot.items() if slot not in done]
    return [*stages.values(), *([unseen] if unseen else [])]


#: Tokens that are cast to float32 and multiplied at a time: for wide matrices, and for narrow ones, whose products MKL divides
#: along the tokens as soon as there are many, into as many parts as there are threads.
_TOKENS, _TOKENS_NARROW, _NARROW = 1024, 256, 768


def fast_accumulate(into: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add ``xᵀ y`` to ``into`` in float32.

    bfloat16 inputs are multiplied by the CPU's bfloat16 units with float32 sums, which loses nothing. The pieces of tokens do not
    depend on the thread count, and each is added in order.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    exact = x.dtype == torch.bfloat16 and y.dtype == torch.bfloat16 and _bfloat16_units()
    if exact:
        settings.fp32_precision = "bf16"
    try:
        tokens = _TOKENS_NARROW if len(into) < _NARROW else _TOKENS
        for start in range(0, len(x), tokens):
            left = x[start : start + tokens].float()
            right = left if x is y else y[start : start + tokens].float()
            into.addmm_(left.T, right)
    finally:
        settings.fp32_precision = before


def _bfloat16_units() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass
class GroupStats:
    """What was collected for one group.

    drift: with d = the original model's input minus this one's, the sum of d xᵀ. residual_drift: per slot whose output is added
    to the residual stream, the same with the difference of the streams before the addition.
    """

    gram: Gram
    drift: CrossGram | None = None
    residual_drift: dict[Slot, CrossGram] = field(default_factory=dict)
    #: further statistics by name: those of ``core.stats.SIMPLE``, and "gram_heldout"
    extra: dict[str, Statistic] = field(default_factory=dict)

    def of(self, slot: Slot) -> dict[str, Statistic]:
        """Everything by name, as methods take it; ``slot``'s own residual drift."""
        found: dict[str, Statistic] = {"gram": self.gram, **self.extra}
        if self.drift is not None:
            found["drift"] = self.drift
        if slot in self.residual_drift:
            found["residual_drift"] = self.residual_drift[slot]
        return found


@dataclass
class _Inputs:
    """Inputs (and residual operands) of the groups in one run of the original block."""

    groups: Sequence[Group]
    x: dict[int, torch.Tensor] = field(default_factory=dict)
    residual: dict[Slot, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.of_slot = {slot: i for i, group in enumerate(self.groups) for slot in group.slots if slot[1] is None}

    def on_input(self, slot: Slot, x: torch.Tensor, _token: int) -> None:
        if slot in self.of_slot:
            self.x[self.of_slot[slot]] = x

    def on_sum(self, slot: Slot, other: torch.Tensor) -> None:
        if slot in self.of_slot:
            self.residual[slot] = other


@dataclass
class _Collector:
    """Fills the statistics during runs of the block that is being quantized."""

    groups: Sequence[Group]
    accumulate: Accumulate
    extra: frozenset[str] = frozenset()
    stats: dict[int, GroupStats] = field(default_factory=dict)
    original: _Inputs | None = None
    held_out: bool = False

    def __post_init__(self) -> None:
        self.of_slot = {slot: index for index, group in enumerate(self.groups) for slot in group.slots}
        # Experts may be called in any order and number; only dense stages can be cut short.
        self.dense = all(expert is None for _, expert in self.of_slot)
        self.current: dict[int, torch.Tensor] = {}
        self.waiting: set[Slot] = set()
        self.sums_left: set[Slot] = set()

    def new_run(self, original: _Inputs | None) -> None:
        self.original = original
        self.current.clear()
        self.sums_left = set(original.residual) if original else set()
        self.waiting = set(self.of_slot)

    def on_input(self, slot: Slot, x: torch.Tensor, _token: int) -> None:
        index = self.of_slot.get(slot)
        if index is None:
            return
        group = self.groups[index]
        if index not in self.stats:
            self.stats[index] = _empty(group, self.accumulate, self.extra)
        stats = self.stats[index]
        # Linears of a dense group see the same input, which counts once; an expert may be called more than once a run.
        if slot[1] is not None or index not in self.current:
            if len(x):
                held = stats.extra.get(_HELD_OUT) if self.held_out else None
                (stats.gram if held is None else held).update(x)
                for name, statistic in stats.extra.items():
                    if name != _HELD_OUT:
                        statistic.update(x)
            self.current[index] = x
            if self.original is not None and index in self.original.x:
                if stats.drift is None:
                    stats.drift = CrossGram(group.columns, accumulate=self.accumulate)
                stats.drift.update_pair(self.original.x[index], x)
        self.waiting.discard(slot)
        self._maybe_stop()

    def on_sum(self, slot: Slot, other: torch.Tensor) -> None:
        if slot not in self.sums_left or self.original is None:
            return
        index = self.of_slot[slot]
        x = self.current[index]
        found = self.stats[index].residual_drift
        if slot not in found:
            found[slot] = CrossGram(x.shape[1], rows=other.shape[1], accumulate=self.accumulate)
        found[slot].update_against(self.original.residual[slot], other, x)
        self.sums_left.discard(slot)
        self._maybe_stop()

    def _maybe_stop(self) -> None:
        if self.dense and not self.waiting and not self.sums_left:
            raise _StageDone


#: A Gram matrix of its own from every eighth batch, for methods that compare candidates on tokens they were not fitted to.
_HELD_OUT = "gram_heldout"
_HELD_OUT_EVERY = 8


def _empty(group: Group, accumulate: Accumulate, extra: Iterable[str]) -> GroupStats:
    found: dict[str, Statistic] = {}
    for name in sorted(extra):
        found[name] = Gram(group.columns, accumulate=accumulate) if name == _HELD_OUT else SIMPLE[name](group.columns)
    return GroupStats(Gram(group.columns, accumulate=accumulate), extra=found)


def collect(
    block: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Batch],
    *,
    original: nn.Module | None = None,
    accumulate: Accumulate = fast_accumulate,
    extra: frozenset[str] = frozenset(),
    batch_count: int = 0,
) -> list[GroupStats]:
    """Statistics per group over all batches; an expert that no token reached gets an empty Gram matrix.

    extra: names of further statistics (``core.stats.SIMPLE``, "gram_heldout"). batch_count: how many batches there are, of which every
    eighth, and at least the last of several, is held out where "gram_heldout" is wanted.

    original: the block with its original weights. Where it is given and a batch has the original model's hidden states, both
    run, and the drift between them is collected for dense groups.
    """
    collector = _Collector(groups, accumulate, extra)
    observer = InputObserver(_watched(block, collector.of_slot), collector.on_input, collector.on_sum)
    for number, batch in enumerate(batches):
        last = number == batch_count - 1 and 1 < batch_count < _HELD_OUT_EVERY
        collector.held_out = _HELD_OUT in extra and (number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 or last)
        seen = None
        if original is not None and batch.original is not None and not collector.held_out:
            seen = _Inputs(groups)
            with InputObserver(_watched(original, seen.of_slot), seen.on_input, seen.on_sum):
                BlockRunner.run(original, batch.original, batch.call)
        observer.new_run()
        collector.new_run(seen)
        try:
            with observer:
                BlockRunner.run(block, batch.hidden, batch.call)
        except _StageDone:
            pass
    return [collector.stats.get(i) or _empty(group, accumulate, extra) for i, group in enumerate(groups)]


def split_by_memory(groups: Sequence[Group], budget_bytes: int) -> Iterator[list[Group]]:
    """Batches of groups whose Gram matrices together stay below the budget (at least one group each)."""
    batch: list[Group] = []
    used = 0
    for group in groups:
        if batch and used + group.gram_bytes > budget_bytes:
            yield batch
            batch, used = [], 0
        batch.append(group)
        used += group.gram_bytes
    if batch:
        yield batch
