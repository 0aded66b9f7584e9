"""Who writes to the residual stream of a block and who reads it, found by running the block, not by a table of architectures.

The block runs twice: once as it is, then with one thing changed while every matrix is given the input that it had before. So only direct
paths, from matrix to matrix, carry the change:

- another hidden state changes the input of exactly those matrices that *read* the stream;
- a matrix or vector some of whose output channels are zeroed changes the block's output in exactly these channels if it *writes* to it.

A matrix whose output passes a norm before it is added (post-norm blocks) changes other channels too, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitwright.core.rotation import Rotation
from bitwright.core.transform import Edge
from bitwright.errors import PlanError
from bitwright.model.edges import find_edges
from bitwright.model.observe import Slot, product_of

__all__ = ["BlockAnatomy", "Norm", "Reader", "ValueEdge", "channels_changed", "random_values", "study_block"]

#: Largest deviation, relative to the root mean square, that counts as the same in float32.
_SAME = 1e-3
_MEND = "leave the rotation out for this model"


@dataclass(frozen=True)
class Norm:
    """Parameters of a norm that multiplies by ``weight + offset`` and adds ``bias``."""

    weight: str
    bias: str | None
    offset: float


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the stream, through ``norm`` where that has a weight. transposed: the parameter is ``(in, out)``."""

    weight: str
    transposed: bool
    norm: Norm | None


@dataclass(frozen=True, eq=False)
class ValueEdge:
    """Values and the output projection behind them. rows, columns: ``(heads, head_dim)`` int64, of each matrix in Linear orientation."""

    producer: str
    bias: str | None
    rows: torch.Tensor
    producer_transposed: bool
    consumer: str
    columns: torch.Tensor
    consumer_transposed: bool


@dataclass(frozen=True, eq=False)
class BlockAnatomy:
    """Names are of parameters, relative to the block. writers: matrix -> whether it is ``(in, out)``; vectors: biases that are written."""

    readers: tuple[Reader, ...]
    writers: Mapping[str, bool]
    vectors: tuple[str, ...]
    norms: tuple[Norm, ...]
    values: tuple[ValueEdge, ...]


class _Broken(Exception):
    """The block made other products than before."""


class _Frozen(TorchFunctionMode):
    """Records every product with a matrix; with a reference, gives every matrix the input that it had there."""

    def __init__(
        self, matrices: Mapping[str, torch.Tensor], reference: Sequence[tuple[Slot, torch.Tensor]] | None
    ) -> None:
        super().__init__()
        self._by_storage = {value.untyped_storage().data_ptr(): (name, value) for name, value in matrices.items()}
        self._reference = iter(reference) if reference is not None else None
        self.calls: list[tuple[Slot, torch.Tensor]] = []
        self.transposed: dict[str, bool] = {}
        self.changed: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = product_of(func, args, kwargs, self._by_storage)
        if found is None:
            return func(*args, **kwargs)
        at, slot, transposed = found
        x = args[at]
        self.transposed[slot[0]] = transposed
        if self._reference is None:
            self.calls.append((slot, x.detach().clone()))
            return func(*args, **kwargs)
        wanted, before = next(self._reference, (None, x))
        if wanted != slot or before.shape != x.shape:
            raise _Broken
        if not _same(x, before):
            self.changed.add(slot[0])
        return func(*args[:at], before, *args[at + 1 :], **kwargs)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = float(b.square().mean().sqrt()) or 1.0
    return float((a - b).abs().max()) <= _SAME * scale


def channels_changed(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """``(width,)`` bool: channels of the last axis in which two tensors differ beyond rounding."""
    scale = float(before.square().mean().sqrt()) or 1.0
    return (after - before).abs().flatten(0, -2).amax(0) > 1e-5 * scale


def random_values(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Normal random numbers from a seed; beyond a million a piece of prime length is repeated, which takes no time."""
    rng = torch.Generator().manual_seed(seed)
    count = 1
    for size in shape:
        count *= size
    piece = torch.randn(min(count, 1_000_003), generator=rng)
    return piece.repeat(-(-count // max(1, len(piece))))[:count].view(*shape)


class _Study:
    def __init__(self, block: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> None:
        self.block, self.run, self.hidden = block, run, hidden
        self.width = hidden.shape[-1]
        self.parameters: dict[str, torch.Tensor] = dict(block.named_parameters())
        self.matrices = {name: p for name, p in self.parameters.items() if p.dim() in (2, 3)}
        with _Frozen(self.matrices, None) as recorder:
            self.output = run(hidden)
        self.calls, self.transposed = recorder.calls, recorder.transposed
        self.part = torch.rand(self.width, generator=torch.Generator().manual_seed(1)) < 0.5

    def frozen(self, hidden: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
        """Output for ``hidden`` while every matrix reads what it read before, and the matrices that would have read something else."""
        mode = _Frozen(self.matrices, self.calls)
        with mode:
            output = self.run(hidden)
        return output, mode.changed

    def out(self, name: str) -> int:
        """Output width of a matrix that was used."""
        return int(self.matrices[name].shape[-1 if self.transposed[name] else -2])

    def into(self, name: str) -> int:
        """Input width of a matrix that was used."""
        return int(self.matrices[name].shape[-2 if self.transposed[name] else -1])

    def readers(self) -> set[str]:
        try:
            _, found = self.frozen(random_values(self.hidden.shape, 2))
        except _Broken:
            raise PlanError("which matrices a block uses depends on more than its routers", mend=_MEND) from None
        for name in found:
            if self.into(name) != self.width:
                raise PlanError(f"{name} reads the residual stream through something that is no norm", mend=_MEND)
        return found

    def written(self, name: str) -> bool | None:
        """True where a parameter's last or output axis is channels of the stream, None where it does not reach the output directly."""
        parameter = self.parameters[name]
        whole = parameter.detach().clone()
        try:
            with torch.no_grad():
                if name in self.transposed:
                    rows = parameter if self.transposed[name] else parameter.transpose(-1, -2)
                    rows[..., self.part] = 0
                else:
                    parameter[..., self.part] += 1
            output, _ = self.frozen(self.hidden)
        except _Broken:
            return None
        finally:
            with torch.no_grad():
                parameter.copy_(whole)
        changed = channels_changed(output, self.output)
        if not bool(changed.any()):
            return None
        return not bool(changed[~self.part].any())

    def writers(self) -> tuple[dict[str, bool], list[str]]:
        matrices: dict[str, bool] = {}
        vectors: list[str] = []
        for name, parameter in self.parameters.items():
            used = name in self.transposed
            if (self.out(name) if used else parameter.shape[-1]) != self.width or parameter.dim() == 0:
                continue
            found = self.written(name)
            if found is False:
                raise PlanError(
                    f"what {name} computes passes a step that rotation cannot, such as a norm, before it is added to the "
                    "residual stream",
                    mend=_MEND,
                )
            if found and used:
                matrices[name] = self.transposed[name]
            elif found:
                vectors.append(name)
        return matrices, vectors

    def alike(self, name: str) -> Iterator[str]:
        """A matrix and its like that no token of the trial reached: experts that are modules of their own."""
        yield name
        pattern = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        yield from (n for n in self.matrices if n not in self.transposed and re.fullmatch(pattern, n))

    def norms(self, edges: Iterable[Edge], readers: set[str]) -> dict[str, Norm]:
        """Reader -> its norm."""
        found: dict[str, Norm] = {}
        straight = torch.arange(self.width)
        for edge in edges:
            fed = {consumer.weight for consumer in edge.consumers}
            if not edge.producer.norm or not fed & readers:
                continue
            plain = all(torch.equal(consumer.channel, straight) for consumer in edge.consumers)
            if not plain or edge.channels != self.width:
                raise PlanError(f"{edge.name}: the norm does not feed whole matrices", mend=_MEND)
            norm = Norm(edge.producer.weight, edge.producer.bias, edge.producer.offset)
            for name in fed:
                if name in found:
                    raise PlanError(f"{name} is fed by two norms", mend=_MEND)
                found[name] = norm
        return found

    def values(
        self, edges: Iterable[Edge], head_dims: Sequence[int], trial: Callable[[int], Rotation]
    ) -> Iterator[ValueEdge]:
        """Edges between linears whose channels may be mixed within each head, found by mixing them."""
        for edge in edges:
            if edge.producer.norm or edge.producer.expert is not None or len(edge.consumers) != 1:
                continue
            (consumer,) = edge.consumers
            if consumer.expert is not None or edge.producer.weight == consumer.weight:
                continue
            for head_dim in head_dims:
                found = _heads(edge, head_dim)
                if found is not None and self._mixes(found, trial(head_dim)):
                    yield found
                    break

    def _mixes(self, edge: ValueEdge, rotation: Rotation) -> bool:
        with _rotated(self.block, edge, rotation):
            return _same(self.run(self.hidden), self.output)


def _heads(edge: Edge, head_dim: int) -> ValueEdge | None:
    """The edge cut into heads of neighbouring channels; None where its channels or columns do not come in whole heads."""
    producer, (consumer,) = edge.producer, edge.consumers
    channel = consumer.channel
    if head_dim < 2 or edge.channels % head_dim or len(channel) % head_dim or bool((channel < 0).any()):
        return None
    blocks = channel.view(-1, head_dim)
    straight = torch.equal(blocks, blocks[:, :1] + torch.arange(head_dim)) and not bool((blocks[:, 0] % head_dim).any())
    if not straight:
        return None
    return ValueEdge(
        producer.weight, producer.bias, producer.rows.view(-1, head_dim), producer.transposed,
        consumer.weight, torch.arange(len(channel)).view(-1, head_dim), consumer.transposed,
    )  # fmt: skip


@contextmanager
def _rotated(block: nn.Module, edge: ValueEdge, rotation: Rotation) -> Iterator[None]:
    names = [edge.producer, edge.consumer, *([edge.bias] if edge.bias is not None else [])]
    saved = {name: block.get_parameter(name).detach().clone() for name in names}
    try:
        with torch.no_grad():
            values: torch.Tensor = block.get_parameter(edge.producer)
            values = values if edge.producer_transposed else values.T
            values[:, edge.rows] = rotation.apply(values[:, edge.rows].double()).float()
            if edge.bias is not None:
                bias = block.get_parameter(edge.bias)
                bias[edge.rows] = rotation.apply(bias[edge.rows].double()).float()
            output: torch.Tensor = block.get_parameter(edge.consumer)
            output = output.T if edge.consumer_transposed else output
            output[:, edge.columns] = rotation.apply(output[:, edge.columns].double()).float()
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                block.get_parameter(name).copy_(value)


def study_block(
    block: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    *,
    head_dims: Sequence[int],
    trial: Callable[[int], Rotation] | None,
) -> BlockAnatomy:
    """Find readers, writers, norms and values of a block.

    block: filled, in float32; run: hidden states ``(1, tokens, width)`` -> the block's output; head_dims: widths of a head that the config
    names; trial: head width -> a rotation to try, None leaves values out. Raises PlanError, with the reason, where the residual stream of
    this block cannot be rotated.
    """
    with torch.no_grad():
        study = _Study(block, run, hidden)
        writers, vectors = study.writers()
        readers = study.readers()
        edges, _ = find_edges(block, lambda: run(hidden), residual=hidden)
        norms = study.norms(edges, readers)
        values = tuple(study.values(edges, head_dims, trial)) if trial is not None else ()
        found = [
            Reader(name, study.transposed[original], norms.get(original))
            for original in sorted(readers)
            for name in study.alike(original)
        ]
        written = {name: writers[original] for original in writers for name in study.alike(original)}
    known = {reader.weight for reader in found} | set(written) | set(study.transposed)
    for name, parameter in study.matrices.items():
        if name not in known and name not in vectors and study.width in parameter.shape:
            raise PlanError(f"what {name} does in its block could not be seen", mend=_MEND)
    unique = {reader.weight: reader for reader in found}
    return BlockAnatomy(tuple(unique.values()), written, tuple(vectors), tuple(dict.fromkeys(norms.values())), values)
