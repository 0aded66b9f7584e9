"""Quantized layer inputs in a calibrated run: static ranges, and blocks that run as the quantized model will."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from torch import nn

from bitwright.core.inputs import InputScheme
from bitwright.core.method import Outcome, Stats
from bitwright.core.scheme import Params
from bitwright.engine.plan import PlanEntry
from bitwright.errors import InputError
from bitwright.model.observe import InputQuantizer, Slot

__all__ = ["InputSchemes", "quantized_inputs", "with_input_ranges"]

#: Matrix of a block -> how its input is quantized, and the static parameters.
InputSchemes = dict[Slot, tuple[InputScheme, Params]]


def with_input_ranges(entry: PlanEntry, outcome: Outcome, stats: Stats) -> Outcome:
    """The outcome with the static parameters of its inputs, where the scheme has any."""
    scheme = entry.scheme.inputs if entry.scheme is not None else None
    if scheme is None or entry.range is None:
        return outcome
    try:
        low, high = entry.range.find(stats, scheme)
    except InputError as error:
        raise InputError(f"{entry.tensor}: {error.message}", mend=error.mend) from error
    return replace(outcome, tensor=replace(outcome.tensor, inputs=scheme.fit(low, high)))


def quantized_inputs(
    block: nn.Module, schemes: Mapping[Slot, tuple[InputScheme, Params]]
) -> AbstractContextManager[object]:
    """While it lasts, matrices of ``block`` read their inputs rounded as the schemes say."""
    if not schemes:
        return nullcontext()
    wanted = {name for name, _ in schemes}
    watched = {name: value for name, value in block.named_parameters() if name in wanted}
    return InputQuantizer(watched, {slot: partial(s.apply, params=p) for slot, (s, p) in schemes.items()})
