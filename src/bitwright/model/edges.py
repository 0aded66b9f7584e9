"""Which norm or linear feeds which linears, found by running a block, not by a table of architectures.

A producer (a norm's vector, rows of a matrix) is multiplied by a different factor in every channel while the block runs on a few tokens.
Where a matrix reads a column that comes out multiplied by exactly one of these factors, that channel reaches that column linearly, and the
matrix is given the unmultiplied input instead, so that what comes after runs as before. If in the end the block's output is the same, all
paths of the producer end in matrices whose columns can take the inverse factor: an edge. It is then verified by folding: producer divided,
columns multiplied, same output. Grouped-query attention (one value channel reaches several columns), gated MLPs, parallel blocks,
LayerNorm with bias, ``1 + w`` norms, routers and experts all follow from this; what does not fold is left out and listed.

Some rows of a fused matrix fold, the others do not. The value rows of a fused query, key and value matrix are seen at the first token,
which attends to itself alone: there the values arrive unmixed, whatever happens to queries and keys. The up half of a fused gate and up
matrix is one of its halves, or every second row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitwright.core.transform import Consumer, Edge, Producer
from bitwright.model.observe import Slot, product_of

__all__ = ["Run", "find_edges", "folded"]

#: Runs the block on its sample: -> output hidden states. The sample's first row is the first token of a sequence.
Run = Callable[[], torch.Tensor]
#: Factors lie between exp(0.1) and exp(1.1), so that none is one.
_LOW, _WIDTH = 0.1, 1.0
#: A column is multiplied by one factor where what is left over is below this, relative to the column. Float32 leaves about 1e-6.
_LINEAR = 1e-4
#: Largest deviation of the output, relative to the root mean square of what the block adds, with inputs put back (other order of the
#: same sums at most) and when folded (every weight rounded anew in float32).
_PUT_BACK, _FOLDED = 1e-5, 2e-3
#: Marks of a column: no channel reaches it; it was zero for every token, so that nothing can be told.
_NONE, _DEAD = -1, -2


@dataclass(frozen=True, eq=False)
class _Call:
    slot: Slot
    x: torch.Tensor
    transposed: bool


class _Broken(Exception):
    """A producer reaches something that is no matrix's columns."""


class _Recorder(TorchFunctionMode):
    """Notes every product with a matrix of the block, in order."""

    def __init__(self, matrices: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._by_storage = {value.untyped_storage().data_ptr(): (name, value) for name, value in matrices.items()}
        self.calls: list[_Call] = []

    def _found(self, slot: Slot, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        self.calls.append(_Call(slot, x.detach().reshape(-1, x.shape[-1]).clone(), transposed))
        return x

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = product_of(func, args, kwargs, self._by_storage)
        if found is None or args[found[0]].numel() == 0:
            return func(*args, **kwargs)
        at, slot, transposed = found
        changed = self._found(slot, args[at], transposed)
        return func(*args[:at], changed, *args[at + 1 :], **kwargs)


class _Follower(_Recorder):
    """Compares every product with the reference run, and puts matched inputs back to what they were."""

    def __init__(self, matrices: dict[str, torch.Tensor], reference: list[_Call], factors: torch.Tensor) -> None:
        super().__init__(matrices)
        self._reference = iter(reference)
        self._ladder = _Ladder(factors)
        self.consumers: dict[Slot, torch.Tensor] = {}

    def _found(self, slot: Slot, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        wanted = next(self._reference, None)
        flat = x.reshape(-1, x.shape[-1])
        if wanted is None or wanted.slot != slot or wanted.x.shape != flat.shape:
            raise _Broken
        if torch.equal(flat, wanted.x):
            return x
        channel = self._ladder.match(flat, wanted.x)
        if channel is None:
            raise _Broken
        if bool((channel >= 0).any()):
            before = self.consumers.get(slot)
            self.consumers[slot] = channel if before is None else torch.maximum(before, channel)
        return wanted.x.view(x.shape)


class _FirstToken(_Recorder):
    """Finds the first matrix whose input changes at the first row, and the channels that its columns show there."""

    def __init__(self, matrices: dict[str, torch.Tensor], reference: list[_Call], factors: torch.Tensor) -> None:
        super().__init__(matrices)
        self._reference = iter(reference)
        self._ladder = _Ladder(factors)
        self.channels: torch.Tensor | None = None

    def _found(self, slot: Slot, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        wanted = next(self._reference, None)
        if wanted is None or wanted.slot != slot:
            raise _Broken
        first = x.reshape(-1, x.shape[-1])[:1]
        if torch.equal(first, wanted.x[:1]):
            return x
        channel = self._ladder.match(first, wanted.x[:1])
        self.channels = torch.unique(channel[channel >= 0]) if channel is not None else None
        raise _Broken


class _Ladder:
    """Distinct factors, found again from the ratio of two columns."""

    def __init__(self, factors: torch.Tensor) -> None:
        self._sorted, self._order = factors.log().sort()

    def match(self, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor | None:
        """The channel whose factor multiplies each column, ``_NONE`` or ``_DEAD``; None where a column is not linear in one factor."""
        a, b = x.double(), reference.double()
        energy = b.square().sum(0)
        ratio = (a * b).sum(0) / energy.clamp_min(1e-300)
        nothing = 1e-12 * float(energy.mean())
        dead = (energy <= nothing) & (a.square().sum(0) <= 16 * nothing)
        residual = (a - ratio * b).square().sum(0)
        if bool((residual > _LINEAR**2 * a.square().sum(0).clamp_min(1e-300))[~dead].any()):
            return None
        log = ratio.clamp_min(1e-9).log()
        at = torch.searchsorted(self._sorted, log).clamp_max(len(self._sorted) - 1)
        below = (at - 1).clamp_min(0)
        at = torch.where((log - self._sorted[below]).abs() < (log - self._sorted[at]).abs(), below, at)
        matched = (log - self._sorted[at]).abs() < _WIDTH / len(self._sorted) / 3
        untouched = log.abs() < _LOW / 10
        if not bool((matched | untouched | dead).all()):
            return None
        channel = torch.where(matched, self._order[at], torch.full_like(at, _NONE))
        return torch.where(dead, torch.full_like(at, _DEAD), channel)


def _factors(count: int) -> torch.Tensor:
    """Distinct factors, in an order that neighbours do not share."""
    rng = torch.Generator().manual_seed(count)
    steps = torch.randperm(count, generator=rng).double() / count
    return (_LOW + _WIDTH * steps).exp()


def _view(block: nn.Module, name: str, expert: int | None, transposed: bool) -> torch.Tensor:
    """A matrix of the block in Linear orientation, or a vector; a view."""
    value: torch.Tensor = block.get_parameter(name)
    value = value if expert is None else value[expert]
    return value.T if transposed else value


@contextmanager
def _restored(views: Iterable[torch.Tensor]) -> Iterator[None]:
    """Parts of parameters are put back to what they were."""
    kept = [(view, view.detach().clone()) for view in views]
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for view, value in kept:
                view.copy_(value)


def _producer_views(block: nn.Module, producer: Producer) -> list[torch.Tensor]:
    weight = _view(block, producer.weight, producer.expert, producer.transposed)
    return [weight, *([] if producer.bias is None else [_view(block, producer.bias, producer.expert, False)])]


def _multiply(views: list[torch.Tensor], producer: Producer, factors: torch.Tensor) -> None:
    """Multiply a producer's channels by ``factors`` ``(channels,)`` float64, in place."""
    weight, rows = views[0], producer.rows
    if producer.norm:
        weight[rows] = ((weight[rows].double() + producer.offset) * factors - producer.offset).to(weight.dtype)
    else:
        weight[rows] *= factors.to(weight.dtype).unsqueeze(1)
    for bias in views[1:]:
        bias[rows] *= factors.to(bias.dtype)


@contextmanager
def folded(block: nn.Module, edge: Edge, factors: torch.Tensor) -> Iterator[None]:
    """The block with an edge folded in place: producer divided by ``factors`` ``(channels,)``, consumers' columns multiplied."""
    produced = _producer_views(block, edge.producer)
    consumed = [_view(block, c.weight, c.expert, c.transposed) for c in edge.consumers]
    with _restored([*produced, *consumed]):
        _multiply(produced, edge.producer, 1.0 / factors.double())
        for consumer, matrix in zip(edge.consumers, consumed, strict=True):
            used = consumer.channel >= 0
            matrix[:, used] *= factors[consumer.channel[used]].to(matrix.dtype)
        yield


class _Finder:
    def __init__(self, block: nn.Module, run: Run, residual: torch.Tensor | None) -> None:
        self.block, self.run = block, run
        self.matrices: dict[str, torch.Tensor] = {n: p for n, p in block.named_parameters() if p.dim() in (2, 3)}
        with _Recorder(self.matrices) as recorder:
            self.output = run().float()
        self.calls = recorder.calls
        self.transposed = {call.slot[0]: call.transposed for call in self.calls}
        added = self.output if residual is None else self.output - residual
        self.scale = float(added.square().mean().sqrt())
        self.left: list[str] = []

    def same(self, output: torch.Tensor, tolerance: float) -> bool:
        """Whether an output is that of the reference run, up to ``tolerance`` times what the block adds, and float32's rounding."""
        allowed = tolerance * self.scale + 1e-5 * self.output.abs()
        return bool(((output - self.output).abs() <= allowed).all())

    def follow(self, producer: Producer) -> Edge | None:
        """The edge of a producer, None where it does not fold or nothing reads it."""
        factors = _factors(len(producer.rows))
        follower = _Follower(self.matrices, self.calls, factors)
        try:
            output = self._changed(producer, factors, follower)
        except _Broken:
            return None
        if not self.same(output, _PUT_BACK) or not follower.consumers:
            return None
        kept = _usable(follower.consumers, len(producer.rows))
        if kept is None:
            return None
        rows, channels = kept
        found: dict[Slot, Consumer] = {}
        for slot, channel in channels.items():
            for weight, expert in (slot, *self._alike(slot)):
                found.setdefault((weight, expert), Consumer(weight, channel, expert, self.transposed[slot[0]]))
        place = {name: i for i, name in enumerate(self.matrices)}
        # In one order whatever the tokens: sums over consumers then come out the same in a resumed run.
        consumers = [found[slot] for slot in sorted(found, key=lambda slot: (place[slot[0]], slot[1] or 0))]
        if producer.expert is not None:
            consumers = [c for c in consumers if c.expert in (producer.expert, None)]
        producer = replace(producer, rows=producer.rows[rows])
        return Edge(_title(producer, consumers), producer, tuple(consumers))

    def _changed(self, producer: Producer, factors: torch.Tensor, mode: TorchFunctionMode) -> torch.Tensor:
        views = _producer_views(self.block, producer)
        with _restored(views):
            _multiply(views, producer, factors)
            with mode:
                return self.run()

    def _alike(self, slot: Slot) -> Iterator[Slot]:
        """The like of a consumer: experts that none of these tokens chose read the same channels as those that were chosen."""
        name, expert = slot
        if expert is not None:
            yield from ((name, other) for other in range(len(self.matrices[name])) if other != expert)
            return
        pattern = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        yield from ((n, None) for n in self.matrices if n not in self.transposed and re.fullmatch(pattern, n))

    # --- producers -----------------------------------------------------------------------------------------------------

    def norms(self) -> Iterator[list[Edge]]:
        """Edges from the vectors of norms."""
        for name, module in self.block.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() != 1:
                continue
            bias = f"{name}.bias" if module._parameters.get("bias") is not None else None
            vector = Producer(f"{name}.weight", torch.arange(len(weight)), bias, norm=True)
            found = self.follow(vector) or self.follow(replace(vector, offset=1.0))
            if found is None:
                self.left.append(f"{name}: what it feeds is not linear in it")
            else:
                yield [found]

    def linears(self) -> Iterator[list[Edge]]:
        """Edges from rows of matrices; what holds for one expert of a stack is taken to hold for all, and verified for all."""
        slots: dict[str, list[_Call]] = {}
        for call in self.calls:
            slots.setdefault(call.slot[0], []).append(call)
        for name, calls in slots.items():
            matrix = self.matrices[name]
            rows = matrix.shape[-1] if calls[0].transposed else matrix.shape[-2]
            # The expert with the most tokens shows the most.
            _, expert = max(calls, key=lambda call: len(call.x)).slot
            owner, _, leaf = name.rpartition(".")
            bias = f"{owner}.bias" if leaf == "weight" and self._has_bias(owner) else None
            edge = self._rows_of(Producer(name, torch.arange(rows), bias, expert, transposed=calls[0].transposed))
            if edge is None:
                continue
            if expert is None:
                yield [edge]
                continue
            yield [_for_expert(edge, number) for number in range(len(matrix))]

    def _rows_of(self, whole: Producer) -> Edge | None:
        found = self.follow(whole)
        if found is not None:
            return found
        for rows in self._parts(whole):
            found = self.follow(replace(whole, rows=rows))
            if found is not None:
                return found
        return None

    def _parts(self, whole: Producer) -> Iterator[torch.Tensor]:
        """Rows of a fused matrix that may fold by themselves."""
        factors, count = _factors(len(whole.rows)), len(whole.rows)
        first = _FirstToken(self.matrices, self.calls, factors)
        try:
            self._changed(whole, factors, first)
        except _Broken:
            if first.channels is not None and 0 < len(first.channels) < count:
                yield whole.rows[first.channels]
        # Gate and up in one matrix: something reads half as many columns as it has rows.
        if count % 2 == 0 and any(call.x.shape[1] == count // 2 for call in self.calls):
            yield from (whole.rows[count // 2 :], whole.rows[: count // 2], whole.rows[1::2], whole.rows[::2])

    def _has_bias(self, owner: str) -> bool:
        return self.block.get_submodule(owner)._parameters.get("bias") is not None


def _for_expert(edge: Edge, number: int) -> Edge:
    """An edge inside one expert of a stack, for another one."""
    producer = replace(edge.producer, expert=number)
    consumers = tuple(replace(c, expert=number) for c in edge.consumers if c.expert is not None)
    return Edge(_title(producer, consumers), producer, consumers)


def _usable(consumers: dict[Slot, torch.Tensor], channels: int) -> tuple[torch.Tensor, dict[Slot, torch.Tensor]] | None:
    """Rows of a producer that are kept, and the channels of every consumer's columns, counted among the kept rows.

    Columns that were zero for every token belong to the channel of the same number where all others do; otherwise the rows that
    reach no living column are left out. None where some row's columns are only partly alive.
    """
    if not any(bool((channel == _DEAD).any()) for channel in consumers.values()):
        return torch.arange(channels), consumers
    columns = torch.arange(channels)
    if all(len(c) == channels and bool(((c == columns) | (c == _DEAD)).all()) for c in consumers.values()):
        return columns, dict.fromkeys(consumers, columns)
    reached = torch.zeros(channels, dtype=torch.int64)
    for channel in consumers.values():
        reached += torch.bincount(channel[channel >= 0], minlength=channels)
    alive = reached > 0
    if len(torch.unique(reached[alive])) > 1:
        return None
    number = torch.where(alive, alive.cumsum(0) - 1, torch.full_like(reached, _NONE))
    kept = {
        slot: torch.where(c >= 0, number[c.clamp_min(0)], torch.full_like(c, _NONE)) for slot, c in consumers.items()
    }
    return alive.nonzero().flatten(), kept


def _title(producer: Producer, consumers: Iterable[Consumer]) -> str:
    def short(weight: str) -> str:
        return weight.removesuffix(".weight")

    names = dict.fromkeys(short(c.weight).rpartition(".")[2] for c in consumers)
    number = "" if producer.expert is None else f"[{producer.expert}]"
    return f"{short(producer.weight)}{number} -> {', '.join(names)}"


def find_edges(block: nn.Module, run: Run, *, residual: torch.Tensor | None = None) -> tuple[list[Edge], list[str]]:
    """The edges of a block, and what was left out and why.

    block: loaded, in float32; run: runs it on a sample; residual: the sample's hidden states, to which the block adds (deviations are
    measured against what it adds). Every edge returned has been folded with random factors and gave the same output.
    """
    with torch.no_grad():
        finder = _Finder(block, run, residual)
        edges: list[Edge] = []
        for together in (*finder.norms(), *finder.linears()):
            if _folds(finder, together):
                edges += together
                continue
            for edge in together:
                if len(together) > 1 and _folds(finder, [edge]):
                    edges.append(edge)
                else:
                    finder.left.append(f"{edge.name}: folding changes the output")
    return edges, finder.left


def _folds(finder: _Finder, edges: list[Edge]) -> bool:
    with ExitStack() as stack:
        for edge in edges:
            stack.enter_context(folded(finder.block, edge, _factors(edge.channels).float()))
        return finder.same(finder.run(), _FOLDED)
