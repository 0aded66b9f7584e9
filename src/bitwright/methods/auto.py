"""Auto: several methods per layer, and the one kept that does best on tokens that none of them saw.

Each candidate quantizes the layer from one part of the calibration text. What decides is the squared error of the layer's output on the
rest,

    tr(E H Eᵀ) / tr(W H Wᵀ),    E = W - Ŵ,    H = sum of x xᵀ over the held-out tokens

so that a method that fits the noise of a short text does not win by that. Where the drift between the original and the half-quantized
model was measured, the output that should be preserved is the original model's (see ``gptq``), and ``2 tr(E (W D + R)ᵀ)`` joins the
error. D and R are the held-out tokens' where they were collected, else those of the other tokens, scaled to the number of held-out
ones. A term that is the same for all candidates is left away, so that this figure may be negative.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bitwright.core.method import Context, Method, Outcome, Stats
from bitwright.core.scheme import Scheme
from bitwright.core.stats import CrossGram, Gram, Statistic
from bitwright.errors import InputError, PlanError

__all__ = ["METHOD", "Auto"]

#: Statistics that candidates do not see, over the rest of the calibration text: the Gram matrix, and the drifts where there are any.
HELD_OUT, _DRIFT_HELD_OUT, _RESIDUAL_HELD_OUT = "gram_heldout", "drift_heldout", "residual_drift_heldout"


@dataclass(frozen=True, kw_only=True)
class Auto(Method):
    """The best of several methods, layer by layer.

    candidates: names of methods, each with its default options; those that do not serve a scheme are left away. Of equals the first wins.
    """

    name: ClassVar[str] = "auto"
    candidates: tuple[str, ...] = ("rtn", "search", "gptq", "spqr")

    def __post_init__(self) -> None:
        if not self.candidates:
            raise InputError("auto has no candidates", mend="name at least one method")
        self._methods()

    def _methods(self) -> list[Method]:
        return [_method(name) for name in self.candidates]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HELD_OUT}).union(*(method.needs for method in self._methods()))

    def accepts(self, scheme: Scheme) -> str | None:
        reasons = {method.name: method.accepts(scheme) for method in self._methods()}
        if None in reasons.values():
            return None
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())

    def quantize(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context) -> Outcome:
        seen = _seen(stats)
        serving = [method for method in self._methods() if method.accepts(scheme) is None]
        if not serving:
            raise PlanError(f"no candidate serves {scheme.describe()}", mend="name other candidates")
        judge = _Judge(w, stats, drifted=any("drift" in method.needs for method in serving))
        best: tuple[float, str, Outcome] | None = None
        errors: dict[str, float] = {}
        for method in serving:
            outcome = method.quantize(w, seen, scheme, context)
            error = errors[method.name] = judge.error(outcome.tensor.decode())
            if best is None or error < best[0]:
                best = (error, method.name, outcome)
        assert best is not None
        listed = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
        note = f"{best[1]} kept; errors on {judge.text}: {listed}"
        return replace(best[2], notes=(*best[2].notes, note))


def _method(name: str) -> Method:
    """The method called ``name`` with its defaults; InputError where there is none, or it is auto itself."""
    stem = name.replace("-", "_")
    if stem == "auto" or stem.startswith("_") or not stem.isidentifier():
        raise InputError(f"'{name}' cannot be a candidate of auto", mend="name methods such as rtn, search, gptq")
    try:
        method = importlib.import_module(f"bitwright.methods.{stem}").METHOD()
    except ModuleNotFoundError as error:
        if error.name != f"bitwright.methods.{stem}":
            raise
        raise InputError(f"method '{name}' is unknown", mend="name methods such as rtn, search, gptq") from error
    assert isinstance(method, Method)
    return method


class _Judge:
    """Relative squared errors of candidates on the held-out tokens; on all tokens, or of the weight itself, where there are none."""

    def __init__(self, w: torch.Tensor, stats: Stats, *, drifted: bool) -> None:
        self._w = w
        self._h: torch.Tensor | None = None
        self._pull: torch.Tensor | None = None
        self.text = "the weight itself"
        for name, text in ((HELD_OUT, "held-out tokens"), ("gram", "the tokens that the candidates saw")):
            gram = stats.get(name)
            if isinstance(gram, Gram) and gram.count and bool((gram.matrix.diagonal() > 0).any()):
                self._h, self.text = gram.matrix, f"{gram.count} {text}" if name == HELD_OUT else text
                self._pull = _pull(w, stats, gram.count) if drifted else None
                break
        self._energy = _inner(w if self._h is None else w @ self._h, w)

    def error(self, decoded: torch.Tensor) -> float:
        e = self._w - decoded
        total = _inner(e if self._h is None else e @ self._h, e)
        if self._pull is not None:
            total += 2 * _inner(e, self._pull)
        return total / self._energy if self._energy > 0 else total


def _pull(w: torch.Tensor, stats: Stats, tokens: int) -> torch.Tensor | None:
    """W D + R for this many tokens, ``(rows, columns)``, or None where no drift was measured."""
    pull: torch.Tensor | None = None
    for held_out, name in ((_DRIFT_HELD_OUT, "drift"), (_RESIDUAL_HELD_OUT, "residual_drift")):
        found = next((s for s in (stats.get(held_out), stats.get(name)) if isinstance(s, CrossGram) and s.count), None)
        if found is None:
            continue
        part = (w @ found.matrix if name == "drift" else found.matrix) * (tokens / found.count)
        pull = part if pull is None else pull + part
    return pull


def _seen(stats: Stats) -> dict[str, Statistic]:
    """What candidates may see. Drift over more tokens than the Gram matrix would correct too much: it is scaled to as many."""
    seen = {name: value for name, value in stats.items() if name not in (HELD_OUT, _DRIFT_HELD_OUT, _RESIDUAL_HELD_OUT)}
    gram = seen.get("gram")
    for name, value in seen.items():
        if isinstance(gram, Gram) and gram.count and isinstance(value, CrossGram) and value.count > gram.count:
            scaled = CrossGram(value.columns, rows=value.rows)
            scaled.matrix = value.matrix * (gram.count / value.count)
            scaled.count = gram.count
            seen[name] = scaled
    return seen


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sum of products: row by row first, because a sum over everything is divided among threads."""
    rows: Sequence[float] = (a * b).sum(dim=1, dtype=torch.float64).tolist()
    return math.fsum(rows)


METHOD = Auto
