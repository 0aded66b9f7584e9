"""Statistics of one block: which linears share an input, in which order they run, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitwright.core.stats import Gram, Product
from bitwright.model.blocks import BlockCall, BlockRunner, InputObserver, Slot
from bitwright.model.structure import LinearUnit

__all__ = ["Group", "collect", "fast_gram_product", "trace"]


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


class _StageDone(Exception):  # noqa: N818 - a signal, not an error
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


def fast_gram_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``xᵀ y`` in float32; bfloat16 inputs are multiplied by the CPU's bfloat16 units with float32 sums, which loses nothing."""
    if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16 or not _bfloat16_units():
        return x.float().T @ y.float()
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        return x.float().T @ y.float()
    finally:
        settings.fp32_precision = before


def _bfloat16_units() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass
class _Collector:
    groups: Sequence[Group]
    product: Product
    grams: dict[int, Gram] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.of_slot = {slot: index for index, group in enumerate(self.groups) for slot in group.slots}
        self.dense = sum(len(g.slots) for g in self.groups) if all(s[1] is None for s in self.of_slot) else 0
        self.filled: set[int] = set()
        self.seen = 0

    def new_run(self) -> None:
        self.filled.clear()
        self.seen = 0

    def __call__(self, slot: Slot, x: torch.Tensor, _token: int) -> None:
        index = self.of_slot.get(slot)
        if index is None:
            return
        # An expert may be called more than once per run; dense linears of a group see the same input, which counts once.
        if slot[1] is not None or index not in self.filled:
            gram = self.grams.setdefault(index, Gram(self.groups[index].columns, product=self.product))
            if len(x):
                gram.update(x)
            self.filled.add(index)
        self.seen += 1
        if self.dense and self.seen >= self.dense:
            raise _StageDone


def collect(
    block: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[tuple[torch.Tensor, BlockCall]],
    product: Product = fast_gram_product,
) -> list[Gram]:
    """One Gram matrix per group over all batches; an expert that no token reached gets an empty one."""
    collector = _Collector(groups, product)
    observer = InputObserver(_watched(block, collector.of_slot), collector)
    for hidden, call in batches:
        observer.new_run()
        collector.new_run()
        try:
            with observer:
                BlockRunner.run(block, hidden, call)
        except _StageDone:
            pass
    return [collector.grams.get(i, Gram(group.columns)) for i, group in enumerate(groups)]


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
