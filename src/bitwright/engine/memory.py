"""How much memory and disk a run takes, from the plan alone."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.engine.calibration import CalibrationTokens
from bitwright.engine.plan import Plan, PlanEntry

__all__ = ["Budget", "Forecast", "forecast"]


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
        return cls(share, share, 2 * hidden_bytes(plan, tokens))


def hidden_bytes(plan: Plan, tokens: CalibrationTokens | None) -> int:
    """One generation of hidden states: calibration tokens times width."""
    if not plan.needs_calibration or plan.skeleton is None:
        return 0
    calibration = plan.recipe.calibration
    count = tokens.count if tokens is not None else calibration.samples * calibration.length
    return count * int(plan.skeleton.config.hidden_size) * plan.compute_dtype.itemsize


@dataclass(frozen=True)
class Forecast:
    """peak_bytes: resident memory beyond the interpreter and its libraries; disk_bytes: temporary files beside the output."""

    peak_bytes: int
    disk_bytes: int


def forecast(plan: Plan, max_memory_bytes: int | None = None) -> Forecast:
    """What a run of this plan will take."""
    budget = Budget.of(plan, max_memory_bytes, None)
    largest = max((_numel(e) for e in plan.quantized), default=0)
    return Forecast(peak_bytes=largest * 16, disk_bytes=budget.disk_bytes)


def _numel(entry: PlanEntry) -> int:
    return entry.spec.nbytes // entry.spec.dtype.itemsize
