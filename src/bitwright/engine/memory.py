"""How much memory and disk a run takes, from the plan alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from bitwright.engine.calibration import BATCH_TOKENS, CalibrationTokens
from bitwright.engine.plan import Plan, PlanEntry
from bitwright.engine.tensors import CHUNK_ELEMENTS, in_pieces

__all__ = ["Budget", "Forecast", "forecast"]

# Constants of the forecast, fitted to measured peaks (benchmarks/memory.py, docs/benchmarks.md).
#: What any run takes: tokenizer, headers, buffers of the libraries.
_BASE = 20_000_000
#: What transformers' modules and compiled kernels take beside, in a calibrated run.
_CALIBRATED_BASE = 150_000_000
#: Bytes per element of the piece of a weight that is quantized at a time without data.
_PIECE_BYTES = 19.4
#: Intermediate activations of the MLP width that are alive at a time while a batch runs through a block.
_WIDE_ACTIVATIONS = 5


@dataclass(frozen=True)
class Budget:
    """Caps for a run. activation_bytes and gram_bytes: what may be held at a time; disk_bytes: temporary files."""

    activation_bytes: int
    gram_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, plan: Plan, max_memory_bytes: int | None, tokens: CalibrationTokens | None) -> Budget:
        """Shares of ``max_memory_bytes`` (default: 1 GiB each for activations and Gram matrices)."""
        share = (max_memory_bytes // 3) if max_memory_bytes is not None else 1 << 30
        return cls(share, share, 2 * _generation_bytes(plan, tokens))


@dataclass(frozen=True)
class Forecast:
    """peak_bytes: resident memory beyond the interpreter and its libraries; disk_bytes: temporary files beside the output."""

    peak_bytes: int
    disk_bytes: int


def forecast(plan: Plan, max_memory_bytes: int | None = None) -> Forecast:
    """What a run of this plan will take; docs/benchmarks.md compares it with measured peaks."""
    budget = Budget.of(plan, max_memory_bytes, None)
    peak = _calibrated_peak(plan, budget) if plan.needs_calibration else _plain_peak(plan)
    return Forecast(peak_bytes=int(peak), disk_bytes=budget.disk_bytes)


def _elements(entry: PlanEntry) -> int:
    return entry.spec.nbytes // entry.spec.dtype.itemsize


def _drift(plan: Plan) -> bool:
    return any(entry.method is not None and "drift" in entry.method.needs for entry in plan.quantized)


def _generation_bytes(plan: Plan, tokens: CalibrationTokens | None) -> int:
    """One generation of hidden states: calibration tokens times width, for both streams where both are carried."""
    if not plan.needs_calibration or plan.skeleton is None:
        return 0
    calibration = plan.recipe.calibration
    count = tokens.count if tokens is not None else calibration.samples * calibration.length
    both = count if _drift(plan) else min(count, BATCH_TOKENS)
    return (count + both) * int(plan.skeleton.config.hidden_size) * plan.compute_dtype.itemsize


def _plain_peak(plan: Plan) -> float:
    """Without data: the largest weight's piece, its codes and their packed form while pieces are joined, kept tensors piece by piece."""
    kept = max((min(entry.spec.nbytes, 2 * CHUNK_ELEMENTS) for entry in plan.entries), default=0)
    most = max((_plain_weight(entry) for entry in plan.quantized), default=0.0)
    return _BASE + max(most, kept)


def _plain_weight(entry: PlanEntry) -> float:
    elements = _elements(entry)
    if in_pieces(entry):
        return _PIECE_BYTES * CHUNK_ELEMENTS + 4 * elements
    return _PIECE_BYTES * elements


def _calibrated_peak(plan: Plan, budget: Budget) -> float:
    """With data: two generations of activations, the block (twice with drift), and the largest group's statistics and workspace."""
    drift = _drift(plan)
    item = plan.compute_dtype.itemsize
    generation = _generation_bytes(plan, None)
    activations = 2 * generation if generation <= budget.activation_bytes else 0
    blocks: dict[int, int] = defaultdict(int)
    for entry in plan.entries:
        block = plan.structure.block_of.get(entry.tensor)
        if block is not None:
            blocks[block] += _elements(entry) * item
    largest = max(blocks.values(), default=0)
    # Edges are searched in float32, with a block loaded for nothing else.
    block = max(largest * (2 if drift else 1), largest // item * 4 if plan.transforms else 0)
    outside = max((e.spec.nbytes for e in plan.entries if plan.structure.block_of.get(e.tensor) is None), default=0)
    widest = max((max(e.unit.shape) for e in plan.quantized if e.unit is not None), default=0)
    running = _WIDE_ACTIVATIONS * BATCH_TOKENS * widest * item + min(outside, 50_000_000)
    return _CALIBRATED_BASE + activations + block + running + _group_peak(plan.quantized, drift)


def _group_peak(entries: Iterable[PlanEntry], drift: bool) -> int:
    """The largest linear's Gram matrix, its drift, three more of its size to factorize, and the weight in float32 and as stored."""
    peak = 0
    for entry in entries:
        if entry.unit is None:
            continue
        rows, columns = entry.unit.shape
        square = 4 * columns * columns
        residual = 4 * rows * columns if drift else 0
        peak = max(peak, square * (5 if drift else 4) + residual + _elements(entry) * (4 + entry.spec.dtype.itemsize))
    return peak
