"""The driver: carries a plan out, one committed step at a time.

Step 0 writes what lies outside the blocks, step i + 1 writes block i. A step is committed to the journal after its tensors (and,
for calibrated recipes, the activations that feed the next block) are on the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from bitwright.core.source import Sink, Source
from bitwright.engine.blockwise import Blockwise
from bitwright.engine.calibration import CalibrationTokens
from bitwright.engine.journal import Commit, Journal
from bitwright.engine.plan import Plan, PlanEntry
from bitwright.engine.progress import Progress
from bitwright.engine.tensors import TensorWork, without_statistics
from bitwright.io.heap import release_free_memory

__all__ = ["Driver"]


@dataclass
class Driver:
    """One run. max_activation_bytes and max_gram_bytes bound what is held of activations and statistics at a time.

    quality: figures on calibration text, after a calibrated run; last_activations: what batch 0 became after the last block
    (verification repeats it from the written files).
    """

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
    last_activations: torch.Tensor | None = None

    def run(self) -> bool:
        """Carry out all steps that are not yet committed. False where it was asked to stop before the end."""
        steps = self.plan.structure.block_count + 1
        by_block: dict[int | None, list[PlanEntry]] = {}
        for entry in self.plan.entries:
            by_block.setdefault(self.plan.structure.block_of.get(entry.tensor), []).append(entry)
        self.progress.begin(steps, "quantizing")
        blocks = self._blockwise()
        done = len(self.journal.commits)
        for step in range(steps):
            if step < done:
                self.progress.step(f"step {step} (already committed)")
                continue
            began = time.monotonic()
            entries = by_block.get(None if step == 0 else step - 1, [])
            if blocks is None or step == 0:
                commit = self._plain_step(step, entries, blocks)
            else:
                commit = blocks.step(step, entries)
            release_free_memory()
            self.sink.sync()
            self.journal.append(commit)
            label = "outside the blocks" if step == 0 else f"block {step - 1}"
            self.progress.step(f"{label} ({time.monotonic() - began:.1f} s)")
            if self.should_stop() and step + 1 < steps:
                return False
        if blocks is not None:
            self.last_activations = blocks.last_activations()
            self.quality = blocks.measure()
        return True

    def _blockwise(self) -> Blockwise | None:
        if not self.plan.needs_calibration:
            return None
        assert self.tokens is not None
        blocks = Blockwise(
            self.plan, self.source, self.sink, self.journal, self.progress, self.tokens,
            max_activation_bytes=self.max_activation_bytes, max_gram_bytes=self.max_gram_bytes,
        )  # fmt: skip
        blocks.restore()
        return blocks

    def _plain_step(self, step: int, entries: list[PlanEntry], blocks: Blockwise | None) -> Commit:
        """Copy what is kept and quantize without data; what lies outside the blocks has no statistics.

        Quantized embeddings feed the first block, whose layers then make up for part of their error.
        """
        work = TensorWork(self.plan, self.source, self.sink)
        for entry in entries:
            if entry.action == "quantize":
                assert entry.method is not None
                data_free = not entry.method.needs or entry.method.name == "search"
                outcome = work.quantize(entry, entry.method if data_free else without_statistics(entry), {})
                if not data_free:
                    outcome = replace(outcome, fallback="search: there are no statistics outside the blocks")
                work.store(entry, outcome, 0)
                if blocks is not None and entry.unit is not None and entry.unit.role == "embedding":
                    blocks.embedded_by(entry.tensor, outcome.tensor.decode())
            else:
                work.copy(entry)
        return Commit(step, work.hashes, work.report, blocks.save_first() if blocks is not None else None)
