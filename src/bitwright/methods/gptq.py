r"""GPTQ: round column by column and let later columns absorb the error (arXiv:2210.17323), over any scheme.

Minimised is ``tr(E H Eᵀ)`` with ``E = W - Ŵ`` and ``H = X Xᵀ`` the Gram matrix of the layer's inputs. GPTQ is usually written with
the Cholesky factor of ``H⁻¹``. The same numbers come from one factorization of H and no inverse. Let ``H = U Uᵀ`` with U upper
triangular and ``M = U / diag(U)`` (columns divided, so M is unit upper triangular). Then

    tr(E H Eᵀ) = sum_j U_jj² |e_j + sum_{k<j} M_kj e_k|²      (e_j: column j of E)

so the best code of column j, given the errors before it, is the one nearest to ``t_j = w_j + sum_{k<j} M_kj e_k``. A third of the
arithmetic of the three-step inverse is left, and no inverse of an ill-conditioned matrix is formed. (That GPTQ is this successive
rounding, known as Babai's nearest plane, is shown in arXiv:2507.18553.)

Activation order visits the columns with the largest H_jj first, so that they are rounded before errors pile up. It is used in the
*static* form: parameters of all tiles are fitted first, from the original weights, and groups stay contiguous on disk, so that
it costs nothing at run time.

Drift: a layer in a half-quantized model does not see the inputs x' of the original one but x. What should be preserved is the
original output W x', so with D = sum (x' - x) xᵀ the least-squares target is ``W + W D H⁻¹`` and GPTQ rounds that instead of W
(arXiv:2504.02692 moves towards the same target column by column). Where a layer's output is added to the residual stream, the
error r' - r that the stream carries by then is put on the layer's account in the same way: ``W + (W D + R) H⁻¹`` with
R = sum (r' - r) xᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.linalg import one_thread, upper_factor
from bitwright.core.method import Context, Method, Outcome, Stats, relative_loss
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Params, Scheme
from bitwright.core.stats import CrossGram, Gram
from bitwright.errors import InputError, NumericError

__all__ = ["METHOD", "Gptq", "outliers_of", "usable_weights", "without"]

#: Damping is raised by this factor at most this often before the layer falls back.
_RAISE_FACTOR, _RAISES = 10.0, 3


@dataclass(frozen=True, kw_only=True)
class Gptq(Method):
    """GPTQ with static activation order.

    damping: added to the diagonal of H, as a fraction of its mean. block: columns per block of lazy feedback. act_order: visit
    columns by descending H_jj (parameters then are fitted first); without it they are fitted on entering each tile. clip: how
    parameters are found, "minmax" (range), or "search" (clip search weighted by E[x²], with ``search_steps`` steps). correct_drift:
    round the weight that gives the original model's outputs from the inputs of the half-quantized one.
    """

    name: ClassVar[str] = "gptq"
    damping: float = 0.1
    block: int = 128
    act_order: bool = True
    clip: str = "search"
    search_steps: int = 20
    correct_drift: bool = True

    @property
    def feeds_back(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "drift"}) if self.correct_drift else frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise InputError(f"damping {self.damping} is outside (0, 1)", mend="use 0.01 to 0.1")
        if self.block < 1:
            raise InputError(f"block {self.block} is not positive", mend="use 128")
        if self.clip not in ("minmax", "search"):
            raise InputError(f"clip '{self.clip}' is unknown", mend="use minmax or search")

    def quantize(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context) -> Outcome:
        gram = stats.get("gram")
        if not isinstance(gram, Gram) or gram.count == 0:
            return self._fallback(w, stats, scheme, context, "no calibration token reached this layer")
        h = gram.matrix
        diagonal = h.diagonal()
        if not bool(torch.isfinite(diagonal).all()):
            raise NumericError("the Gram matrix is not finite", mend="run the calibration in float32")
        dead = diagonal <= 0
        if bool(dead.all()):
            return self._fallback(w, stats, scheme, context, "all inputs of this layer are zero")
        order = torch.argsort(diagonal, descending=True, stable=True) if self.act_order else None
        factored = _factor(h, dead, order, self.damping)
        if factored is None:
            message = f"the Gram matrix is not positive definite at damping {self.damping * _RAISE_FACTOR**_RAISES:g}"
            if context.strict:
                raise NumericError(message, mend="use more calibration text, or drop --strict")
            return self._fallback(w, stats, scheme, context, message)
        upper, damping = factored
        target = _corrected(w, stats, upper, order, dead)
        apart = self._apart(target, upper, order, scheme, context)
        # Two-level parameters exist only for the whole weight, so they are fitted first in the plain order too.
        whole = order is not None or scheme.two_level
        params = self._fit(without(target, apart), scheme, gram.mean_square, context) if whole else None
        factor = upper.div_(upper.diagonal().clone())
        tensor = self._round(target, factor, order, params, scheme, gram.mean_square, context, apart)
        loss = relative_loss(target, tensor.decode(), h)
        return Outcome(tensor=tensor, loss=loss, dead_columns=int(dead.sum()), damping=damping)

    def _fallback(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context, why: str) -> Outcome:
        params = self._search().params(w, scheme, usable_weights(stats), context)
        tensor = QuantizedTensor(scheme, (w.shape[0], w.shape[1]), scheme.encode(w, params), params)
        gram = stats.get("gram")
        loss = relative_loss(w, tensor.decode(), gram.matrix) if isinstance(gram, Gram) and gram.count else None
        return Outcome(tensor=tensor, loss=loss, fallback=f"search: {why}")

    def _apart(
        self,
        w: torch.Tensor,
        upper: torch.Tensor,
        order: torch.Tensor | None,
        scheme: Scheme,
        context: Context,
    ) -> torch.Tensor | None:
        """Which weights are kept apart in 16 bits, ``(rows, columns)`` bool, or None: none. upper: U in visiting order."""
        del w, upper, order, scheme, context
        return None

    def _search(self) -> Any:
        from bitwright.methods.search import Search

        return Search(steps=self.search_steps)

    def _fit(self, w: torch.Tensor, scheme: Scheme, importance: torch.Tensor, context: Context) -> Params:
        if self.clip == "search":
            # A tile whose inputs were all zero has no weights to search by.
            weights = importance if bool((importance > 0).any()) else None
            found: Params = self._search().params(w, scheme, weights, context)
            return found
        return scheme.finish(scheme.fit(w, context=context.prepared), (w.shape[0], w.shape[1]))

    def _round(
        self,
        w: torch.Tensor,
        factor: torch.Tensor,
        order: torch.Tensor | None,
        params: Params | None,
        scheme: Scheme,
        importance: torch.Tensor,
        context: Context,
        apart: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        """The column loop. factor: M, ``(columns, columns)`` unit upper triangular, in visiting order; importance: E[x²]; apart: which
        weights are kept in 16 bits.
        """
        rows, columns = w.shape
        shape = (rows, columns)
        weights = (w if order is None else w[:, order]).T.contiguous()
        visit = torch.arange(columns) if order is None else order
        keep = None if apart is None else apart.T[visit]
        errors = torch.empty_like(weights)
        codes = torch.empty(columns, rows, dtype=torch.uint8)
        fitted: list[Params] = []
        whole = None if params is None else scheme.codec(params, shape)
        # Plain order fits on entering a tile, so a block must not reach past the tile's end.
        span = scheme.span(columns)
        start = 0
        while start < columns:
            stop = min(start + self.block, columns)
            if whole is None:
                stop = min(stop, (start // span + 1) * span)
            targets = weights[start:stop]
            if start:
                targets = targets + factor[:start, start:stop].T @ errors[:start]
            if whole is None:
                if start % span == 0:
                    tile = self._entering(weights, errors, factor, start, start + span)
                    tile = without(tile, None if apart is None else apart[:, start : start + span])
                    fitted.append(self._fit(tile, scheme, importance[start : start + span], context))
                local_shape = (rows, span)
                codec = scheme.codec(fitted[-1], local_shape)
                local = visit[start:stop] - (start // span) * span
            else:
                codec = whole
                local = visit[start:stop]
            block = (targets, weights[start:stop], factor[start:stop, start:stop], codec, local)
            block_codes, block_errors = (
                context.feedback(*block) if keep is None else context.feedback(*block, keep[start:stop])
            )
            codes[start:stop] = block_codes
            errors[start:stop] = block_errors
            start = stop
        if order is not None:
            back = torch.empty_like(codes)
            back[order] = codes
            codes = back
        if params is None:
            params = {name: torch.cat([part[name] for part in fitted], dim=1) for name in fitted[0]}
        codes = codes.T.contiguous()
        if apart is None:
            return QuantizedTensor(scheme, shape, codes, params)
        decoded = torch.empty_like(weights)
        decoded[visit] = weights - errors
        return QuantizedTensor(scheme, shape, codes, params, outliers_of(decoded.T, apart, scheme))

    @staticmethod
    def _entering(
        weights: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """The weights of columns ``start .. stop`` moved to the optimum given the errors before them: ``(rows, span)``.

        The optimum has zero residual in every column: ``e_T M_TT = -E M_{<T,T}``, a triangular solve over the tile.
        """
        tile = weights[start:stop]
        if start == 0:
            return tile.T.contiguous()
        pushed = factor[:start, start:stop].T @ errors[:start]
        inside = factor[start:stop, start:stop].T
        with one_thread():
            moved: torch.Tensor = torch.linalg.solve_triangular(inside, pushed, upper=False, unitriangular=True)
        return (tile + moved).T.contiguous()


def without(w: torch.Tensor, apart: torch.Tensor | None) -> torch.Tensor:
    """The weight with a zero in place of every outlier, so that outliers do not widen the range that a fit finds."""
    return w if apart is None else w.masked_fill(apart, 0.0)


def outliers_of(w: torch.Tensor, apart: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and values of the weights kept apart. Raises NumericError where one overflows their dtype."""
    indices = apart.reshape(-1).nonzero().squeeze(1)
    values = w.reshape(-1)[indices].to(scheme.outlier_dtype)
    if not bool(torch.isfinite(values).all()):
        raise NumericError(f"an outlier overflows {scheme.outlier_dtype}", mend="use a scheme without outliers")
    return indices, values


def usable_weights(stats: Stats) -> torch.Tensor | None:
    """E[x²] of every column, or None where no token, or nothing but zeros, was seen."""
    gram = stats.get("gram")
    if not isinstance(gram, Gram) or gram.count == 0 or not bool((gram.matrix.diagonal() > 0).any()):
        return None
    return gram.mean_square


def _corrected(
    w: torch.Tensor, stats: Stats, upper: torch.Tensor, order: torch.Tensor | None, dead: torch.Tensor
) -> torch.Tensor:
    """The weight that gives the original model's outputs from this model's inputs: W + (W D + R) (H + damping)⁻¹.

    D and R are the drifts of the input and of the residual stream; without them the weight itself is returned. upper: U of the
    damped Gram matrix in visiting order.
    """
    drift, residual = stats.get("drift"), stats.get("residual_drift")
    if not isinstance(drift, CrossGram) or drift.count == 0:
        return w
    pull = w @ drift.matrix
    if isinstance(residual, CrossGram) and residual.count:
        pull += residual.matrix
    pull[:, dead] = 0
    if not bool(pull.any()):
        return w
    if order is not None:
        pull = pull[:, order]
    with one_thread():
        # B (U Uᵀ)⁻¹: solve Z Uᵀ = B, then X U = Z.
        half = torch.linalg.solve_triangular(upper.T, pull, upper=False, left=False)
        moved: torch.Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    if order is not None:
        back = torch.empty_like(moved)
        back[:, order] = moved
        moved = back
    # Rows that somebody pruned stay pruned.
    moved[~w.any(dim=1)] = 0
    return w + moved


def _factor(
    h: torch.Tensor, dead: torch.Tensor, order: torch.Tensor | None, damping: float
) -> tuple[torch.Tensor, float] | None:
    """U of the damped, reordered Gram matrix and the damping that worked; None where none did.

    Dead columns (inputs that were always zero) get a diagonal of one and no coupling: they are rounded to nearest.
    """
    mean = float(h.diagonal().mean())
    for attempt in range(_RAISES + 1):
        used = damping * _RAISE_FACTOR**attempt
        damped = h.clone() if order is None else h[order][:, order]
        diagonal = damped.diagonal()
        diagonal += used * mean
        flags = dead if order is None else dead[order]
        if bool(flags.any()):
            damped[flags] = 0
            damped[:, flags] = 0
            diagonal[flags] = 1.0
        with one_thread():
            upper = upper_factor(damped)
        if upper is not None:
            return upper, used
    return None


METHOD = Gptq
