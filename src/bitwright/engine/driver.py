"""The driver: carries a plan out, one committed step at a time.

Step 0 writes what lies outside the blocks, step i + 1 writes block i. A step is committed to the journal after its tensors (and,
for calibrated recipes, the activations that feed the next block) are on the disk.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitwright import catalog
from bitwright.core.method import Context, Outcome
from bitwright.core.source import Sink, Source
from bitwright.core.stats import Gram
from bitwright.core.tensor import QuantizedTensor
from bitwright.engine.activations import ActivationStore
from bitwright.engine.calibration import CalibrationTokens
from bitwright.engine.collect import Group, collect, split_by_memory, trace
from bitwright.engine.journal import Commit, Journal
from bitwright.engine.plan import Plan, PlanEntry
from bitwright.engine.progress import Progress
from bitwright.errors import InputError, NumericError, ResumeError
from bitwright.methods.search import Search
from bitwright.model.blocks import BlockCall, BlockRunner, Capture

__all__ = ["Driver", "cast_call", "decoded_hash"]

#: Kept tensors are copied, and row-wise methods run, in pieces of at most this many elements.
CHUNK_ELEMENTS = 4 * 1024 * 1024
#: Sequences that run through the original model too, for the quality figures of the report.
PROBES = 8


def decoded_hash(tensor: QuantizedTensor) -> str:
    """SHA-256 of the decoded weight, float32 row-major."""
    digest = hashlib.sha256()
    rows = max(1, CHUNK_ELEMENTS // tensor.shape[1])
    if tensor.outliers is not None or tensor.scheme.tile.rows != 1:
        digest.update(tensor.decode().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
    for start in range(0, tensor.shape[0], rows):
        params = {name: value[start : start + rows] for name, value in tensor.params.items()}
        part = tensor.scheme.decode(tensor.codes[start : start + rows], params)
        digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Driver:
    """One run. max_memory_bytes bounds what is held of activations and Gram matrices at a time."""

    plan: Plan
    source: Source
    sink: Sink
    journal: Journal
    progress: Progress
    tokens: CalibrationTokens | None = None
    max_activation_bytes: int = 1 << 30
    max_gram_bytes: int = 1 << 30
    should_stop: Callable[[], bool] = lambda: False
    quality: dict[str, float] = field(default_factory=dict)
    #: what batch 0 became after the last block; verification repeats it from the written files
    last_activations: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._feedback = catalog.load("kernels", "numba-feedback")
        self._by_block: dict[int | None, list[PlanEntry]] = {}
        for entry in self.plan.entries:
            self._by_block.setdefault(self.plan.structure.block_of.get(entry.tensor), []).append(entry)

    # --- both kinds of run -----------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Carry out all steps that are not yet committed. False where it was asked to stop before the end."""
        steps = self.plan.structure.block_count + 1
        self.progress.begin(steps, "quantizing")
        calibrated = self.plan.needs_calibration
        state = self._restore() if calibrated else None
        done = len(self.journal.commits)
        for step in range(steps):
            if step < done:
                self.progress.step(f"step {step} (already committed)")
                continue
            began = time.monotonic()
            if state is not None and step > 0:
                commit = self._calibrated_step(step, state)
            else:
                commit = self._plain_step(step)
            if step == 0 and state is not None:
                commit = Commit(step, commit.hashes, commit.report, self._save_first(state))
            self.sink.sync()
            self.journal.append(commit)
            label = "outside the blocks" if step == 0 else f"block {step - 1}"
            self.progress.step(f"{label} ({time.monotonic() - began:.1f} s)")
            if self.should_stop() and step + 1 < steps:
                return False
        if state is not None:
            self.last_activations = state.store[0]
            self._measure(state)
        return True

    def _plain_step(self, step: int) -> Commit:
        hashes: dict[str, str] = {}
        report: list[dict[str, Any]] = []
        for entry in self._by_block.get(None if step == 0 else step - 1, []):
            if entry.action == "quantize":
                outcome = self._data_free(entry)
                hashes[entry.tensor] = self._store(entry, outcome.tensor)
                report.append(_report(entry, outcome, 0))
            else:
                self._copy(entry, hashes)
        return Commit(step, hashes, report)

    def _copy(self, entry: PlanEntry, hashes: dict[str, str]) -> None:
        """Copy a kept tensor piece by piece; check that a dropped tied one equals its twin."""
        twin = entry.reason.removeprefix("tied to ") if entry.action == "drop" else None
        digest = hashlib.sha256()
        for start, piece in self._pieces(entry):
            if twin is not None:
                other = self.source.read(twin, (start, start + len(piece)))
                if not torch.equal(piece, other):
                    raise InputError(
                        f"{entry.tensor} differs from {twin}, but the config ties them",
                        mend="set tie_word_embeddings to false in config.json",
                    )
                continue
            self.sink.write(entry.tensor, piece, start)
            digest.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if twin is None:
            hashes[entry.tensor] = digest.hexdigest()

    def _pieces(self, entry: PlanEntry) -> Iterator[tuple[int, torch.Tensor]]:
        """``(first row, rows)`` of a stored tensor; NumericError where one is not finite."""
        shape = entry.spec.shape
        if not shape or math.prod(shape) <= CHUNK_ELEMENTS:
            tensor = self.source.read(entry.tensor)
            _check_finite(entry.tensor, tensor)
            yield 0, tensor
            return
        rows = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
        for start in range(0, shape[0], rows):
            piece = self.source.read(entry.tensor, (start, min(start + rows, shape[0])))
            _check_finite(entry.tensor, piece)
            yield start, piece

    def _read_weight(self, entry: PlanEntry) -> torch.Tensor:
        """The weight ``(out, in)`` float32."""
        assert entry.unit is not None
        weight = self.source.read(entry.tensor)
        _check_finite(entry.tensor, weight)
        return (weight.T if entry.unit.transposed else weight).float().contiguous()

    def _data_free(self, entry: PlanEntry) -> Outcome:
        """Quantize without statistics, in pieces of rows where the scheme's tiles allow it."""
        assert entry.method is not None
        assert entry.scheme is not None
        assert entry.unit is not None
        method = entry.method if not entry.method.needs or entry.method.name == "search" else Search()
        scheme, (out, columns) = entry.scheme, entry.unit.shape
        if scheme.tile.rows != 1 or entry.unit.transposed or out * columns <= CHUNK_ELEMENTS:
            weight = self._read_weight(entry)
            return self._method(entry, method, weight, {})
        parts = [self._method(entry, method, piece.float(), {}).tensor for _, piece in self._pieces(entry)]
        params = {name: torch.cat([part.params[name] for part in parts]) for name in parts[0].params}
        codes = torch.cat([part.codes for part in parts])
        return Outcome(tensor=QuantizedTensor(scheme, entry.unit.shape, codes, params))

    def _method(self, entry: PlanEntry, method: Any, weight: torch.Tensor, stats: Mapping[str, Any]) -> Outcome:
        assert entry.scheme is not None
        prepared = entry.scheme.prepare([weight])
        context = Context(feedback=self._feedback, prepared=prepared, strict=self.plan.recipe.strict)
        try:
            outcome: Outcome = method.quantize(weight, stats, entry.scheme, context)
        except NumericError as error:
            raise NumericError(f"{entry.tensor}: {error.message}", mend=error.mend) from error
        return outcome

    def _store(self, entry: PlanEntry, tensor: QuantizedTensor) -> str:
        assert entry.unit is not None
        for name, value in self.plan.layout.pack(entry.unit.name, tensor).items():
            self.sink.write(name, value)
        return decoded_hash(tensor)

    # --- calibrated runs -------------------------------------------------------------------------------------------------

    def _restore(self) -> _State:
        """Capture the blocks' inputs anew (cheap), then take the hidden states from the newest whole generation."""
        assert self.tokens is not None
        assert self.plan.skeleton is not None
        assert self.plan.names is not None
        runner = BlockRunner(self.plan.skeleton, self.plan.names, self.source, self.plan.compute_dtype)
        probes = _probe_batches(self.tokens)
        captures = runner.capture(self.tokens.batches)
        extra = runner.capture(probes)
        total = sum(c.hidden.nbytes for c in captures) + 2 * sum(c.hidden.nbytes for c in extra)
        folder = self.journal.folder
        store = ActivationStore(folder, cap_bytes=self.max_activation_bytes, total_bytes=total)
        state = _State(runner, store, captures, extra, probes)
        for _ in range(2):
            if not self.journal.commits:
                return state
            commit = self.journal.commits[-1]
            if commit.activations is not None and store.restore(commit.step, commit.activations):
                state.drop_hidden()
                return state
            self.progress.note(f"the activations of step {commit.step} are damaged; going back to the step before")
            self.journal.drop_last()
        if self.journal.commits:
            raise ResumeError("no generation of the activations is whole", mend="start again with --resume never")
        return state

    def _save_first(self, state: _State) -> str:
        writer = state.store.writer(0)
        for capture in state.captures:
            writer.append(capture.hidden)
        for capture in state.probe_captures:
            writer.append(capture.hidden)
            writer.append(capture.hidden)
        digest = writer.finish()
        state.store.adopt(writer)
        state.drop_hidden()
        return digest

    def _calibrated_step(self, step: int, state: _State) -> Commit:
        index = step - 1
        dtype = state.store[0].dtype
        try:
            return self._block(step, state, dtype)
        except _NotFiniteError as error:
            if dtype == torch.float32:
                raise NumericError(
                    f"block {index}: {error} is not finite, in float32 too", mend="check the weights of this block"
                ) from error
            self.progress.note(f"block {index}: {error} overflows in {dtype}; repeated in float32")
            return self._block(step, state, torch.float32)

    def _block(self, step: int, state: _State, dtype: torch.dtype) -> Commit:
        index = step - 1
        runner = state.runner
        runner.dtype = dtype
        hashes: dict[str, str] = {}
        report: list[dict[str, Any]] = []
        entries = {entry.tensor: entry for entry in self._by_block.get(index, [])}
        for entry in entries.values():
            if entry.action != "quantize":
                self._copy(entry, hashes)
            else:
                # A weight that is not finite is named before it poisons the activations.
                for _ in self._pieces(entry):
                    pass
        block = runner.load_block(index)
        writer = state.store.writer(step)
        originals = [
            _finite(runner.run(block, state.probe(p, 0, dtype), state.probe_call(p, index, dtype)), "the output")
            for p in range(state.probe_count)
        ]
        units = [e.unit for e in entries.values() if e.action == "quantize" and e.unit is not None]
        prefix = f"{self.plan.skeleton.blocks_path}.{index}." if self.plan.skeleton else ""
        stages = trace(block, prefix, units, *state.batch(0, index, dtype))
        if not self.plan.recipe.sequential:
            stages = [[group for stage in stages for group in stage]]
        for stage in stages:
            for groups in split_by_memory(stage, self.max_gram_bytes):
                batches = (state.batch(i, index, dtype) for i in range(state.batch_count))
                grams = collect(block, groups, batches)
                for group, gram in zip(groups, grams, strict=True):
                    if not bool(torch.isfinite(gram.matrix.diagonal()).all()):
                        raise _NotFiniteError(f"the input of {group.units[0].name}")
                    self._quantize_group(group, gram, entries, block, prefix, hashes, report)
                del grams
        for i in range(state.batch_count):
            writer.append(_finite(runner.run(block, *state.batch(i, index, dtype)), "the output"))
        for p in range(state.probe_count):
            writer.append(originals[p])
            quantized = runner.run(block, state.probe(p, 1, dtype), state.probe_call(p, index, dtype))
            writer.append(_finite(quantized, "the output"))
        runner.free(block)
        digest = writer.finish()
        state.store.adopt(writer)
        return Commit(step, hashes, report, digest, str(dtype))

    def _quantize_group(
        self,
        group: Group,
        gram: Gram,
        entries: Mapping[str, PlanEntry],
        block: nn.Module,
        prefix: str,
        hashes: dict[str, str],
        report: list[dict[str, Any]],
    ) -> None:
        for unit in group.units:
            entry = entries[unit.tensor]
            assert entry.method is not None
            assert unit.place is not None
            method: Any = entry.method
            few = unit.role == "expert" and gram.count < self.plan.recipe.min_expert_tokens
            if few and method.name == "gptq":
                method = Search()
            weight = self._read_weight(entry)
            outcome = self._method(entry, method, weight, {"gram": gram})
            hashes[entry.tensor] = self._store(entry, outcome.tensor)
            line = _report(entry, outcome, gram.count)
            if few and method is not entry.method:
                line["fallback"] = f"search: only {gram.count} tokens reached this expert"
            report.append(line)
            decoded = outcome.tensor.decode()
            parameter = block.get_parameter(unit.place.parameter.removeprefix(prefix))
            view = parameter if unit.place.expert is None else parameter[unit.place.expert]
            stored_turned = unit.place.transposed != unit.transposed
            view = view.T if stored_turned else view
            if unit.place.rows is not None:
                view = view[unit.place.rows[0] : unit.place.rows[1]]
            view.copy_(decoded)

    def _measure(self, state: _State) -> None:
        """Quality on the probes, and how foreign the calibration text is to the model."""
        from bitwright.evaluation.divergence import compare_logits

        runner = state.runner
        runner.dtype = torch.float32
        logits, release = runner.head()
        totals: dict[str, float] = {}
        count = 0
        for i, tokens in enumerate(state.probe_tokens):
            original = logits(state.probe(i, 0, torch.float32))
            quantized = logits(state.probe(i, 1, torch.float32))
            found = compare_logits(original, quantized, tokens)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value
            count += 1
        release()
        if count:
            mean = {name: value / count for name, value in totals.items()}
            self.quality = {
                "perplexity_source": math.exp(mean["nll_reference"]),
                "perplexity_quantized": math.exp(mean["nll"]),
                "kl_mean": mean["kl"],
                "perplexity_own_text": math.exp(mean["entropy_reference"]),
                "tokens": float(sum(t.numel() for t in state.probe_tokens)),
            }


class _NotFiniteError(Exception):
    """Activations overflowed."""


def _finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise _NotFiniteError(what)
    return tensor


@dataclass
class _State:
    """Inputs of the next block. After the calibration batches, the store holds pairs of probes: original, quantized."""

    runner: BlockRunner
    store: ActivationStore
    captures: list[Capture]
    probe_captures: list[Capture]
    probe_tokens: list[torch.Tensor]

    @property
    def batch_count(self) -> int:
        return len(self.captures)

    @property
    def probe_count(self) -> int:
        return len(self.probe_captures)

    def batch(self, index: int, block: int, dtype: torch.dtype) -> tuple[torch.Tensor, BlockCall]:
        """Hidden states of a calibration batch and the call of a block for it."""
        return self.store[index].to(dtype), cast_call(self.captures[index].calls[block], dtype)

    def probe(self, index: int, which: int, dtype: torch.dtype) -> torch.Tensor:
        """Hidden states of a probe in the original (0) or the quantized (1) model."""
        return self.store[len(self.captures) + 2 * index + which].to(dtype)

    def probe_call(self, index: int, block: int, dtype: torch.dtype) -> BlockCall:
        return cast_call(self.probe_captures[index].calls[block], dtype)

    def drop_hidden(self) -> None:
        """The store holds the hidden states now."""
        empty = torch.empty(0)
        self.captures = [Capture(empty, c.calls) for c in self.captures]
        self.probe_captures = [Capture(empty, c.calls) for c in self.probe_captures]


def cast_call(call: BlockCall, dtype: torch.dtype) -> BlockCall:
    """The call with floating tensors (position embeddings, additive masks) in ``dtype``."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, tuple):
            return tuple(cast(v) for v in value)
        return value

    return BlockCall(tuple(cast(a) for a in call.args), {k: cast(v) for k, v in call.kwargs.items()})


def _probe_batches(tokens: CalibrationTokens) -> list[torch.Tensor]:
    """The first sequences, one a batch; each runs through the original model and through the quantized one."""
    return [row[None] for batch in tokens.batches for row in batch][:PROBES]


def _report(entry: PlanEntry, outcome: Outcome, tokens: int) -> dict[str, Any]:
    assert entry.scheme is not None
    assert entry.method is not None
    return {
        "tensor": entry.tensor,
        "method": entry.method.name,
        "scheme": entry.scheme.describe(),
        "loss": outcome.loss,
        "tokens": tokens,
        "dead_columns": outcome.dead_columns,
        "damping": outcome.damping,
        "fallback": outcome.fallback,
    }


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise NumericError(
                f"{name}: {bad} values are NaN or infinite", mend="the checkpoint is damaged; download it again"
            )
