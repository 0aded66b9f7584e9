"""Calibrated runs: one decoder block at a time, statistics and method stage by stage.

Two streams of hidden states run through the blocks: that of the model as it is quantized so far, and, where a method wants the
drift between them, that of the original model (for a single batch otherwise, for the report's quality figures).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bitwright.core.method import Method
from bitwright.core.source import Sink, Source
from bitwright.engine.activations import ActivationStore, ActivationWriter
from bitwright.engine.calibration import CalibrationTokens
from bitwright.engine.collect import Batch, Group, GroupStats, collect, split_by_memory, trace
from bitwright.engine.inputs import InputSchemes, quantized_inputs, with_input_ranges
from bitwright.engine.journal import Commit, Journal
from bitwright.engine.kv_cache import KvRange
from bitwright.engine.plan import Plan, PlanEntry
from bitwright.engine.progress import Progress
from bitwright.engine.rewrite import Overlaid, RewrittenSource
from bitwright.engine.tensors import TensorWork, without_statistics
from bitwright.engine.transforming import EDGE_TOKENS, PROBE_TOKENS, BlockTransforms, Samples
from bitwright.errors import NumericError, ResumeError
from bitwright.model.blocks import BlockCall, BlockRunner, Capture
from bitwright.model.structure import LinearUnit

__all__ = ["Blockwise", "cast_call", "put_back", "unit_view"]


#: Tokens whose logits are held at a time when quality is measured.
_MEASURED = 128


class _NotFiniteError(Exception):
    """Activations overflowed."""


def _finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise _NotFiniteError(what)
    return tensor


class Blockwise:
    """The blocks' part of a calibrated run.

    A stored generation holds the original stream's batches first (``pairs`` of them), then the quantized stream's.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        sink: Sink,
        journal: Journal,
        progress: Progress,
        tokens: CalibrationTokens,
        *,
        max_activation_bytes: int,
        max_gram_bytes: int,
    ) -> None:
        assert plan.skeleton is not None
        assert plan.names is not None
        self._plan, self._source, self._sink, self._journal, self._progress = plan, source, sink, journal, progress
        self._tokens = tokens
        self._max_gram_bytes = max_gram_bytes
        self._prefix = plan.skeleton.blocks_path
        self._runner = BlockRunner(plan.skeleton, plan.names, source, plan.compute_dtype)
        batches, samples = tokens.batches, self._sample_tokens(tokens.batches[0]) if plan.transforms else ()
        captures = self._runner.capture((*batches, *samples))
        self._captures: list[Capture] = captures[: len(batches)]
        self._sample_captures = captures[len(batches) :]
        self._drift = any(entry.method is not None and "drift" in entry.method.needs for entry in plan.quantized)
        self._pairs = len(self._captures) if self._drift else 1
        total = sum(c.hidden.nbytes for c in self._captures + self._captures[: self._pairs])
        self._store = ActivationStore(journal.folder, cap_bytes=max_activation_bytes, total_bytes=total)
        self._input_schemes: InputSchemes = {}
        self._transforms = BlockTransforms(plan, self._runner, progress, max_gram_bytes) if plan.transforms else None
        self._embeddings: dict[str, torch.Tensor] = {}

    # --- state -----------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take the hidden states from the newest whole generation, if there is one."""
        commits = self._journal.commits
        for back, commit in enumerate(reversed(commits[-2:])):
            if commit.activations is not None and self._store.restore(commit.step, commit.activations):
                if back:
                    self._journal.drop_last()
                self._drop_captured()
                return
            self._progress.note(f"the activations of step {commit.step} are damaged; going back to the step before")
        if len(commits) > 1:
            # The journal stays as it is, so that asking again gives the same answer.
            raise ResumeError("no generation of the activations is whole", mend="start again with --resume never")
        if commits:
            self._journal.drop_last()

    def embedded_by(self, tensor: str, weight: torch.Tensor) -> None:
        """From now on embedding ``tensor`` of the quantized model is ``weight``."""
        self._embeddings[tensor] = weight.to(self._plan.compute_dtype)

    def save_first(self) -> str:
        """Store what enters the first block of the original and of the quantized model; returns the generation's hash."""
        captures = self._captures
        if self._embeddings:
            source = Overlaid(self._source, self._embeddings)
            assert self._plan.skeleton is not None
            assert self._plan.names is not None
            runner = BlockRunner(self._plan.skeleton, self._plan.names, source, self._plan.compute_dtype)
            captures = runner.capture(self._tokens.batches)
            self._embeddings = {}
        writer = self._store.writer(0)
        try:
            for capture in self._captures[: self._pairs] + captures:
                writer.append(capture.hidden)
            digest = writer.finish()
        finally:
            writer.close()
        self._store.adopt(writer)
        self._drop_captured()
        return digest

    def _drop_captured(self) -> None:
        """The store holds the hidden states now; how blocks are called is still needed."""
        empty = torch.empty(0)
        self._captures = [Capture(empty, capture.calls) for capture in self._captures]
        self._sample_captures = [Capture(empty, capture.calls) for capture in self._sample_captures]

    def _call(self, batch: int, block: int, dtype: torch.dtype) -> BlockCall:
        return cast_call(self._captures[batch].calls[block], dtype)

    def _original(self, batch: int, dtype: torch.dtype) -> torch.Tensor:
        return self._store[batch].to(dtype)

    def _quantized(self, batch: int, dtype: torch.dtype) -> torch.Tensor:
        return self._store[self._pairs + batch].to(dtype)

    def last_activations(self) -> torch.Tensor:
        """What batch 0 of the quantized stream has become."""
        return self._store[self._pairs]

    # --- one block -------------------------------------------------------------------------------------------------------

    def step(self, step: int, entries: Sequence[PlanEntry]) -> Commit:
        """Quantize block ``step - 1``. Activations that overflow in a narrow dtype are repeated in float32.

        Raises NumericError naming the block where they are not finite in float32 either.
        """
        dtype = self._store[0].dtype
        try:
            return self._block(step, entries, dtype)
        except _NotFiniteError as error:
            if dtype != torch.float32:
                self._progress.note(f"block {step - 1}: {error} overflows in {dtype}; repeated in float32")
                try:
                    return self._block(step, entries, torch.float32)
                except _NotFiniteError as again:
                    error = again
            raise NumericError(
                f"block {step - 1}: {error} is not finite, in float32 too", mend="check the weights of this block"
            ) from error

    def _block(self, step: int, entries: Sequence[PlanEntry], dtype: torch.dtype) -> Commit:
        index = step - 1
        self._runner.dtype = dtype
        work = TensorWork(self._plan, self._source, self._sink)
        for entry in entries:
            # A weight that is not finite is named before it poisons the activations.
            work.check(entry)
        block = self._runner.load_block(index)
        writer = self._store.writer(step)
        try:
            for i in range(self._pairs):
                out = self._runner.run(block, self._original(i, dtype), self._call(i, index, dtype))
                writer.append(_finite(out, "the output of the original model"))
            if self._transforms is not None:
                exact = frozenset(entry.tensor for entry in entries if entry.action == "quantize")
                rewritten = RewrittenSource(self._source, {}, exact)
                self._transforms.apply(
                    index, block, rewritten, entries, lambda: self._batches(index, dtype), self._samples(index)
                )
                work.source = rewritten
            for entry in entries:
                if entry.action != "quantize":
                    work.copy(entry)
            self._quantize_block(index, dtype, block, writer, entries, work)
            digest = writer.finish()
        finally:
            # Also where activations overflow: the block is loaded anew, in float32, from the original weights.
            self._runner.free(block)
            writer.close()
        self._store.adopt(writer)
        return Commit(step, work.hashes, work.report, digest, str(dtype))

    def _quantize_block(
        self,
        index: int,
        dtype: torch.dtype,
        block: nn.Module,
        writer: ActivationWriter,
        entries: Sequence[PlanEntry],
        work: TensorWork,
    ) -> None:
        """Quantize the linears of a loaded block in place, and write what feeds the next block."""
        by_tensor = {entry.tensor: entry for entry in entries}
        self._input_schemes.clear()
        units = [entry.unit for entry in entries if entry.action == "quantize" and entry.unit is not None]
        prefix = f"{self._prefix}.{index}."
        original = copy.deepcopy(block) if self._drift else None
        stages = trace(block, prefix, units, self._quantized(0, dtype), self._call(0, index, dtype))
        if not self._plan.recipe.sequential:
            stages = [[group for stage in stages for group in stage]]
        for stage in stages:
            for groups in split_by_memory(stage, self._max_gram_bytes):
                found = collect(
                    block, groups, self._batches(index, dtype), original=original, batch_count=len(self._captures),
                    extra=_extra(groups, by_tensor),
                )  # fmt: skip
                for group, stats in zip(groups, found, strict=True):
                    if not bool(torch.isfinite(stats.gram.matrix.diagonal()).all()):
                        raise _NotFiniteError(f"the input of {group.units[0].name}")
                    self._quantize_group(group, stats, by_tensor, block, prefix, work)
                del found
        cache = KvRange(self._plan.kv_cache if index in self._plan.attention else None)
        for i in range(len(self._captures)):
            with quantized_inputs(block, self._input_schemes), cache.watching():
                out = self._runner.run(block, self._quantized(i, dtype), self._call(i, index, dtype))
            writer.append(_finite(out, "the output"))
        if self._plan.kv_cache is not None and index in self._plan.attention:
            work.write_all(cache.scales(self._plan.attention[index]))

    def _batches(self, index: int, dtype: torch.dtype) -> Iterator[Batch]:
        for i in range(len(self._captures)):
            original = self._original(i, dtype) if self._drift else None
            yield Batch(self._quantized(i, dtype), self._call(i, index, dtype), original)

    # --- what transforms look at -----------------------------------------------------------------------------------------

    @staticmethod
    def _sample_tokens(first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Corners of the first batch: one sequence to search edges with, and some for probes."""
        rows = max(1, PROBE_TOKENS // first.shape[1])
        return first[:1, :EDGE_TOKENS], first[:rows, :PROBE_TOKENS]

    def _samples(self, index: int) -> Samples:
        """The same corners of the hidden states: what precedes a token does not depend on what follows it."""
        hidden = self._quantized(0, torch.float32)
        calls = [cast_call(capture.calls[index], torch.float32) for capture in self._sample_captures]
        cut = self._sample_tokens(hidden)
        return Samples(*(Batch(part.contiguous(), call) for part, call in zip(cut, calls, strict=True)))

    def _quantize_group(
        self,
        group: Group,
        stats: GroupStats,
        entries: Mapping[str, PlanEntry],
        block: nn.Module,
        prefix: str,
        work: TensorWork,
    ) -> None:
        tokens = stats.gram.count
        for unit in group.units:
            entry = entries[unit.tensor]
            assert entry.method is not None
            assert unit.place is not None
            slot = (unit.place.parameter.removeprefix(prefix), unit.place.expert)
            given = stats.of(slot)
            if unit.place.rows is not None:
                given.pop("residual_drift", None)
            few = unit.role == "expert" and tokens < self._plan.recipe.min_expert_tokens
            few = few and bool(entry.method.needs) and entry.method.name != "search"
            method: Method = without_statistics(entry) if few else entry.method
            outcome = work.quantize(entry, method, given)
            if few:
                outcome = replace(outcome, fallback=f"search: only {tokens} tokens reached this expert")
            outcome = with_input_ranges(entry, outcome, given)
            work.store(entry, outcome, tokens)
            put_back(block, unit, prefix, outcome.tensor.decode())
            if entry.scheme is not None and entry.scheme.inputs is not None:
                self._input_schemes[slot] = (entry.scheme.inputs, outcome.tensor.inputs)

    # --- at the end ------------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float]:
        """Quality on the first batch, in float32, and how foreign the calibration text is to the model.

        perplexity_own_text: exp of the mean entropy of the model's predictions, which is the perplexity that text sampled from
        the model itself would have.
        """
        from bitwright.evaluation.divergence import compare_logits

        self._runner.dtype = torch.float32
        first = self._tokens.batches[0]
        totals: dict[str, float] = {}
        pieces = [(row, at) for row in range(len(first)) for at in range(0, first.shape[1] - 1, _MEASURED)]
        if not pieces:
            return {}
        with self._runner.head() as logits:
            for row, at in pieces:
                # One token more than a piece: the last prediction of a piece is of the next one's first token.
                cut = (slice(row, row + 1), slice(at, at + _MEASURED + 1))
                original = logits(self._original(0, torch.float32)[cut])
                quantized = logits(self._quantized(0, torch.float32)[cut])
                for name, value in compare_logits(original, quantized, first[cut]).items():
                    totals[name] = totals.get(name, 0.0) + value / len(pieces)
        return {
            "perplexity_source": _perplexity(totals["nll_reference"]),
            "perplexity_quantized": _perplexity(totals["nll"]),
            "kl_mean": totals["kl"],
            "perplexity_own_text": _perplexity(totals["entropy_reference"]),
            "tokens": float(first.numel()),
        }


def _extra(groups: Sequence[Group], entries: Mapping[str, PlanEntry]) -> frozenset[str]:
    """Statistics beside Gram matrix and drift that somebody in these groups wants."""
    wanted = [entries[unit.tensor].needs for group in groups for unit in group.units]
    return frozenset().union(*wanted) - {"gram", "drift"}


def _perplexity(nll: float) -> float:
    # exp(709) is the last finite float64; a broken model can be worse than that.
    return math.exp(min(nll, 700.0))


def put_back(block: nn.Module, unit: LinearUnit, prefix: str, decoded: torch.Tensor) -> None:
    """Write a decoded weight ``(out, in)`` into its place in the block's parameter."""
    unit_view(block, unit, prefix).copy_(decoded)


def unit_view(block: nn.Module, unit: LinearUnit, prefix: str) -> torch.Tensor:
    """The ``(out, in)`` weight of a unit inside the parameter of a loaded block that holds it: a view. prefix: path of the block."""
    assert unit.place is not None
    view: torch.Tensor = block.get_parameter(unit.place.parameter.removeprefix(prefix))
    if unit.place.expert is not None:
        view = view[unit.place.expert]
    if unit.place.transposed != unit.transposed:
        view = view.T
    if unit.place.rows is not None:
        view = view[unit.place.rows[0] : unit.place.rows[1]]
    return view


def cast_call(call: BlockCall, dtype: torch.dtype) -> BlockCall:
    """The call with floating tensors (position embeddings, additive masks) in ``dtype``."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, tuple):
            return tuple(cast(v) for v in value)
        return value

    return BlockCall(tuple(cast(a) for a in call.args), {k: cast(v) for k, v in call.kwargs.items()})
