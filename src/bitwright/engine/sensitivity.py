"""How much each group of weights minds being rounded: one streamed pass over the blocks.

For every group g of tied weights and every candidate s the error of the outputs is estimated from the Gram matrix H of the layer's inputs,

    e_gs = sum over the group's weights of tr((W - Ŵ_s) H (W - Ŵ_s)ᵀ) / tokens

on a sample of rows. What such an error costs differs by orders of magnitude between layers, so one candidate (the *reference*) is measured
in full: its rounded weights replace the group's, and the KL divergence of the model's output follows,

    loss_gs = KL_g e_gs / e_g,reference

since to first order the divergence is linear in the error's covariance. To have all groups in one pass over the checkpoint, the hidden
states of every perturbed model run beside the original's from the perturbed block on; only one block is in memory at a time.

mode "full": KL at the output. "blocks": the perturbed block's own output through the final norm and head (a logit lens), which spares
the runs through later blocks. "gram": no runs; the relative output error, times the share of the residual stream that the block writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import nn

from bitwright.core.source import Source
from bitwright.core.stats import Gram
from bitwright.engine.blockwise import cast_call, put_back
from bitwright.engine.collect import fast_accumulate, trace
from bitwright.engine.plan import Plan
from bitwright.engine.progress import Progress
from bitwright.engine.rewrite import Overlaid
from bitwright.errors import InputError, NumericError
from bitwright.io.heap import release_free_memory
from bitwright.model.blocks import BlockRunner
from bitwright.model.observe import InputObserver, Slot
from bitwright.model.structure import LinearUnit

__all__ = ["Candidate", "Mode", "Sensitivity", "Tied", "measure_sensitivities"]

Mode = Literal["full", "blocks", "gram"]

#: Rows on which errors are estimated.
_ROWS = 128
#: Positions at which divergences are measured, and how many logits are held at a time.
_POSITIONS, _PIECE = 1024, 128
#: Pieces that are held while another head takes its turn.
_TURN = 4


@dataclass(frozen=True)
class Candidate:
    """One way to round weights. quantize: ``(weight (rows, columns) float32, inputs' statistics) -> decoded``, same shape.

    by_rows: rows know nothing of each other, so that a sample of them will do.
    """

    label: str
    quantize: Callable[[torch.Tensor, Gram | None], torch.Tensor]
    by_rows: bool = True


@dataclass(frozen=True)
class Tied:
    """Weights that must take the same candidate. reference: label of the candidate that is measured in full."""

    name: str
    units: tuple[LinearUnit, ...]
    candidates: tuple[Candidate, ...]
    reference: str


@dataclass(frozen=True)
class Sensitivity:
    """errors: candidate -> squared error per token (outside the blocks: of the weights); energy: the same of the output itself.

    reference: its loss in nats, as the mode measures it, and its label.
    """

    errors: Mapping[str, float]
    energy: float
    reference: str
    reference_loss: float

    def loss(self, label: str) -> float:
        """Predicted loss of a candidate, in nats."""
        base = self.errors[self.reference]
        return self.reference_loss * (self.errors[label] / base) if base > 0 else 0.0


class _HiddenStates:
    """Tensors by key, in memory up to a cap, beyond it in one file; a key's tensor keeps its shape."""

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self._left = cap_bytes
        self._held: dict[tuple[int, int], torch.Tensor] = {}
        self._places: dict[tuple[int, int], tuple[int, torch.Size]] = {}
        self._path = folder / "hidden-states.bin"
        self._file: BinaryIO | None = None
        self._end = 0

    def put(self, key: tuple[int, int], value: torch.Tensor) -> None:
        if key not in self._places and (key in self._held or value.nbytes <= self._left):
            self._left -= 0 if key in self._held else value.nbytes
            self._held[key] = value
            return
        if self._file is None:
            self._file = self._path.open("w+b", buffering=0)
        offset, _ = self._places.setdefault(key, (self._end, value.shape))
        self._end = max(self._end, offset + value.nbytes)
        self._file.seek(offset)
        self._file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)

    def get(self, key: tuple[int, int]) -> torch.Tensor:
        if key in self._held:
            return self._held[key]
        offset, shape = self._places[key]
        assert self._file is not None
        self._file.seek(offset)
        content = np.frombuffer(self._file.read(4 * math.prod(shape)), dtype=np.float32)
        return torch.from_numpy(content.copy()).view(shape)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)


@dataclass
class _Seen:
    """What one pass notes of a group."""

    errors: dict[str, float] = field(default_factory=dict)
    energy: float = 0.0
    loss: float = 0.0


def measure_sensitivities(
    plan: Plan,
    source: Source,
    tokens: Sequence[torch.Tensor],
    groups: Sequence[Tied],
    mode: Mode,
    *,
    folder: Path,
    cap_bytes: int,
    progress: Progress,
) -> dict[str, Sensitivity]:
    """Sensitivity of every group; see the module. tokens: ``(batch, length)`` int64 each. folder: for what exceeds ``cap_bytes``.

    Everything runs in float32: rounding to bfloat16 would drown small perturbations. Raises InputError for models whose blocks
    transformers cannot run, NumericError where activations are not finite.
    """
    if plan.skeleton is None or plan.names is None:
        raise InputError("transformers cannot run this model's blocks", mend="choose the bits by layer yourself")
    walk = _Walk(plan, source, tokens, groups, mode, folder, cap_bytes)
    try:
        count = plan.structure.block_count
        progress.begin(count + 1, "measuring sensitivities")
        for index in range(count):
            walk.block(index)
            release_free_memory()
            progress.step(f"block {index}")
        walk.finish()
        progress.step("output")
    finally:
        walk.close()
    return {
        group.name: Sensitivity(seen.errors, seen.energy, group.reference, max(seen.loss, 0.0))
        for group, seen in walk.seen()
    }


class _Walk:
    """Stream 0 is the original model; stream n is the model in which group n - 1 is rounded."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        tokens: Sequence[torch.Tensor],
        groups: Sequence[Tied],
        mode: Mode,
        folder: Path,
        cap_bytes: int,
    ) -> None:
        assert plan.skeleton is not None
        assert plan.names is not None
        self._plan, self._source, self._mode, self._groups = plan, source, mode, groups
        self._prefix = plan.skeleton.blocks_path
        self._seen = [_Seen() for _ in groups]
        self._runner = BlockRunner(plan.skeleton, plan.names, source, torch.float32)
        captures = self._runner.capture(tokens)
        self._calls = [tuple(cast_call(call, torch.float32) for call in capture.calls) for capture in captures]
        self._batches = len(captures)
        self._tokens = sum(batch.numel() for batch in tokens)
        self._states = _HiddenStates(folder, cap_bytes)
        for batch, capture in enumerate(captures):
            self._states.put((0, batch), capture.hidden)
        #: streams that run through the blocks, beside the original
        self._running: list[int] = []
        #: streams whose outputs are compared at the end, each with that of the original at the same place
        self._compared: list[tuple[int, int]] = []
        self._overlays: dict[int, Source] = {}
        for number, group in enumerate(groups, 1):
            if group.units[0].block is None:
                self._outside(number, group, tokens)

    def seen(self) -> Iterator[tuple[Tied, _Seen]]:
        return zip(self._groups, self._seen, strict=True)

    def close(self) -> None:
        self._states.close()

    # --- outside the blocks ----------------------------------------------------------------------------------------------

    def _outside(self, number: int, group: Tied, tokens: Sequence[torch.Tensor]) -> None:
        """Embeddings and head: errors of the weights, and, but in mode gram, a stream of their own from the start."""
        seen = self._seen[number - 1]
        changed: dict[str, torch.Tensor] = {}
        for unit in group.units:
            weight = self._weight(unit)
            seen.energy += float(weight.square().sum(dtype=torch.float64))
            for candidate in group.candidates:
                rows, scale = _sample(weight, candidate)
                error = candidate.quantize(rows, None) - rows
                added = scale * float(error.square().sum(dtype=torch.float64))
                seen.errors[candidate.label] = seen.errors.get(candidate.label, 0.0) + added
            decoded = _reference(group).quantize(weight, None)
            changed[unit.tensor] = decoded.T.contiguous() if unit.transposed else decoded
        if self._mode == "gram":
            seen.loss = seen.errors[group.reference] / seen.energy if seen.energy else 0.0
            return
        assert self._plan.skeleton is not None
        assert self._plan.names is not None
        self._overlays[number] = Overlaid(self._source, changed)
        runner = BlockRunner(self._plan.skeleton, self._plan.names, self._overlays[number], torch.float32)
        moved = False
        for batch, capture in enumerate(runner.capture(tokens)):
            moved = moved or not torch.equal(capture.hidden, self._states.get((0, batch)))
            self._states.put((number, batch), capture.hidden)
        # Those of a head stay the original's: only what follows the blocks differs.
        if moved:
            self._running.append(number)

    def _weight(self, unit: LinearUnit) -> torch.Tensor:
        """``(out, in)`` float32."""
        weight = self._source.read(unit.tensor)
        if not bool(torch.isfinite(weight).all()):
            raise NumericError(f"{unit.tensor}: values are NaN or infinite", mend="the checkpoint is damaged")
        return (weight.T if unit.transposed else weight).float().contiguous()

    # --- blocks ------------------------------------------------------------------------------------------------------------

    def block(self, index: int) -> None:
        """Run every stream through a block, and start those of its own groups."""
        numbers = [n for n, group in enumerate(self._groups, 1) if group.units[0].block == index]
        block = self._runner.load_block(index)
        try:
            before = [self._states.get((0, batch)) for batch in range(self._batches)]
            after, grams, share = self._original(block, index, before)
            for number in self._running:
                for batch, call in enumerate(self._calls):
                    hidden = self._states.get((number, batch))
                    self._states.put((number, batch), self._run(block, hidden, call[index]))
            for number in numbers:
                self._errors(number, grams, share)
                if self._mode != "gram":
                    self._perturbed(block, index, number, grams, before)
            for batch, hidden in enumerate(after):
                self._states.put((0, batch), hidden)
            if self._mode == "blocks" and numbers:
                at = -index - 1
                for batch in range(self._batches):
                    self._states.put((at, batch), self._states.get((0, batch)).clone())
                self._compared += [(number, at) for number in numbers]
        finally:
            self._runner.free(block)

    def _run(self, block: nn.Module, hidden: torch.Tensor, call: object) -> torch.Tensor:
        out = self._runner.run(block, hidden, call)  # type: ignore[arg-type]
        if not bool(torch.isfinite(out).all()):
            raise NumericError("activations are not finite", mend="check the weights of the model")
        return out

    def _original(
        self, block: nn.Module, index: int, before: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[str, Gram], float]:
        """The original's output, the Gram matrix of what every unit reads (experts of a stack together), and the share of the
        output that the block writes."""
        units = [unit for unit in self._plan.structure.units if unit.block == index and unit.place is not None]
        stages = trace(block, f"{self._prefix}.{index}.", units, before[0], self._calls[0][index])
        of_slot: dict[Slot, Gram] = {}
        grams: dict[str, Gram] = {}
        stacks: dict[str, Gram] = {}
        for group in (group for stage in stages for group in stage):
            name, expert = group.slots[0]
            gram = stacks.get(name) if expert is not None else None
            if gram is None:
                gram = Gram(group.columns, accumulate=fast_accumulate)
                if expert is not None:
                    stacks[name] = gram
            of_slot |= dict.fromkeys(group.slots, gram)
            grams |= {unit.name: gram for unit in group.units}
        names = {name for name, _ in of_slot}
        parameters = {name: value for name, value in block.named_parameters() if name in names}
        written = total = 0.0
        counted: dict[int, int] = {}

        def on_input(slot: Slot, x: torch.Tensor, token: int) -> None:
            # Linears that share an input share a Gram matrix, which counts it once.
            gram = of_slot[slot]
            if slot[1] is None and counted.get(id(gram)) == token:
                return
            counted[id(gram)] = token
            gram.update(x)

        after: list[torch.Tensor] = []
        for hidden, call in zip(before, self._calls, strict=True):
            counted.clear()
            with InputObserver(parameters, on_input):
                out = self._run(block, hidden, call[index])
            written += float((out - hidden).square().sum(dtype=torch.float64))
            total += float(out.square().sum(dtype=torch.float64))
            after.append(out)
        return after, grams, written / total if total else 0.0

    def _errors(self, number: int, grams: Mapping[str, Gram], share: float) -> None:
        group, seen = self._groups[number - 1], self._seen[number - 1]
        for unit in group.units:
            gram = grams.get(unit.name)
            if gram is not None and gram.count == 0:
                gram = None
            weight = self._weight(unit)
            seen.energy += _energy(weight, gram)
            for candidate in group.candidates:
                rows, scale = _sample(weight, candidate)
                error = candidate.quantize(rows, gram) - rows
                added = scale * _energy(error, gram)
                seen.errors[candidate.label] = seen.errors.get(candidate.label, 0.0) + added
        if self._mode == "gram" and seen.energy:
            seen.loss = share * seen.errors[group.reference] / seen.energy

    def _perturbed(
        self, block: nn.Module, index: int, number: int, grams: Mapping[str, Gram], before: Sequence[torch.Tensor]
    ) -> None:
        """Round the group's weights in the block, run the original's hidden states through it, and put the weights back."""
        group = self._groups[number - 1]
        prefix = f"{self._prefix}.{index}."
        for unit in group.units:
            put_back(block, unit, prefix, _reference(group).quantize(self._weight(unit), grams.get(unit.name)))
        for batch, call in enumerate(self._calls):
            self._states.put((number, batch), self._run(block, before[batch], call[index]))
        for unit in group.units:
            put_back(block, unit, prefix, self._weight(unit))
        if self._mode == "full":
            self._running.append(number)
            self._compared.append((number, 0))

    # --- output ------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Divergence of every perturbed stream from the original, through the final norm and the head."""
        if self._mode == "gram":
            return
        totals = self._divergences()
        for number in self._overlays:
            totals[number] = self._against_overlay(number)
        for number, value in totals.items():
            self._seen[number - 1].loss = value

    def _pieces(self) -> Iterator[tuple[int, slice, slice]]:
        """(batch, rows, positions) of what is looked at, a few logits at a time."""
        step = max(1, self._tokens // _POSITIONS)
        for batch in range(self._batches):
            rows, length = self._states.get((0, batch)).shape[:2]
            for row in range(rows):
                for start in range(0, length, _PIECE * step):
                    yield batch, slice(row, row + 1), slice(start, min(start + _PIECE * step, length), step)

    def _divergences(self) -> dict[int, float]:
        """Of all streams whose head is the original's."""
        sums = dict.fromkeys((number for number, _ in self._compared), 0.0)
        count = 0
        with self._runner.head() as head:
            for piece in self._pieces():
                originals: dict[int, torch.Tensor] = {}
                for number, original in self._compared:
                    if original not in originals:
                        originals[original] = self._log_probs(head, original, piece)
                    p = originals[original]
                    sums[number] += _divergence(p, self._log_probs(head, number, piece))
                count += len(p) if originals else 0
        return {number: value / count for number, value in sums.items()}

    def _against_overlay(self, number: int) -> float:
        """Of a group whose head may be another one: both models in turn, a few positions at a time."""
        assert self._plan.skeleton is not None
        assert self._plan.names is not None
        other = BlockRunner(self._plan.skeleton, self._plan.names, self._overlays[number], torch.float32)
        stream = number if number in self._running else 0
        pieces = list(self._pieces())
        total, count = 0.0, 0
        for start in range(0, len(pieces), _TURN):
            turn = pieces[start : start + _TURN]
            with self._runner.head() as head:
                expected = [self._log_probs(head, 0, piece) for piece in turn]
            with other.head() as head:
                for p, piece in zip(expected, turn, strict=True):
                    total += _divergence(p, self._log_probs(head, stream, piece))
                    count += len(p)
        return total / count

    def _log_probs(
        self, head: Callable[[torch.Tensor], torch.Tensor], stream: int, piece: tuple[int, slice, slice]
    ) -> torch.Tensor:
        """``(positions, vocabulary)`` float32."""
        batch, rows, at = piece
        logits = head(self._states.get((stream, batch))[rows, at])[0]
        return torch.log_softmax(logits.float(), dim=-1)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum over positions of KL(p || q), both log-probabilities."""
    return float((p.exp() * (p - q)).sum(dtype=torch.float64))


def _reference(group: Tied) -> Candidate:
    return next(candidate for candidate in group.candidates if candidate.label == group.reference)


def _sample(weight: torch.Tensor, candidate: Candidate) -> tuple[torch.Tensor, float]:
    """Evenly spaced rows, and how many each stands for."""
    step = max(1, len(weight) // _ROWS) if candidate.by_rows else 1
    rows = weight[::step].contiguous()
    return rows, len(weight) / len(rows)


def _energy(weight: torch.Tensor, gram: Gram | None) -> float:
    """tr(W H Wᵀ) per token; the squared norm where nothing was seen of the inputs."""
    if gram is None or gram.count == 0:
        return float(weight.square().sum(dtype=torch.float64))
    return float((weight @ gram.matrix).mul_(weight).sum(dtype=torch.float64)) / gram.count
