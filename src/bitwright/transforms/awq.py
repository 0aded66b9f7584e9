r"""AWQ: channels that carry large inputs are scaled up before rounding, so that they keep more of their precision (arXiv:2306.00978).

Column j of the consumers is multiplied by s_j and the producer's channel j divided. The factors lie on a line of one exponent (equation 5),

    s_j = a_j^alpha                       a_j: mean |x_j| over calibration tokens
    s_j = a_j^alpha / b_j^(1 - alpha)     b_j: mean over the consumers' rows of |w_ij| / max of its group (AutoAWQ's duo scaling)

brought to sqrt(max s min s) = 1. All exponents of a grid are tried, with and without b, and no scaling at all. What a candidate costs is
measured with the rounded weight ``W' = Q(W S) S⁻¹``, its ranges clipped group by group where the method after it will do so:

    tr((W' - W) H (W' - W)ᵀ)              H: Gram matrix of the consumers' input, summed over the consumers

and for queries, keys and values, whose error goes through a softmax, by the mean squared error of the whole block's output.

Where error feedback follows (GPTQ), a column's error is partly absorbed by the columns after it, and neither of the two says what it will
cost. With ``H = U Uᵀ``, U upper triangular in GPTQ's order, what is left is ``sum_j U_jj² |e_j|²`` with e_j the rounding error of column j
alone (see ``methods/gptq.py``); rounding errors are alike whatever is rounded, so e_j is taken from rounding W S itself. S cancels in
U_jj e_j, so that one factorization serves all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.linalg import one_thread, upper_factor
from bitwright.core.scheme import Params, Scheme
from bitwright.core.stats import Gram, MeanAbs
from bitwright.core.transform import BlockTransform, ConsumerView, EdgeView
from bitwright.errors import InputError

__all__ = ["TRANSFORM", "Awq", "scaled_line"]

#: Smallest factor, as in the reference implementation.
_SMALLEST = 1e-4
#: As in GPTQ.
_DAMPING = 0.1


@dataclass(frozen=True, kw_only=True)
class Awq(BlockTransform):
    """grid: exponents alpha = 1/grid .. (grid - 1)/grid. duo: try the normalisation by weights too. clips: ranges tried for each group
    while candidates are compared, from 1 down to 0.6, where the method searches ranges. rows: of each weight, evenly spaced, that the
    linear loss looks at. block_output: compare queries, keys and values by the block's true output; without, by the linear loss as
    everything else.
    """

    name: ClassVar[str] = "awq"
    grid: int = 20
    duo: bool = True
    clips: int = 5
    rows: int = 256
    block_output: bool = True

    def __post_init__(self) -> None:
        if self.grid < 2 or self.clips < 1 or self.rows < 1:
            raise InputError("awq needs grid >= 2, clips >= 1 and rows >= 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "mean_abs"})

    def factors(self, edge: EdgeView) -> torch.Tensor | None:
        active = [c for c in edge.consumers if c.scheme is not None and _inputs(c).count > 0]
        if not active:
            return None
        feedback = any(view.feedback for view in active)
        through_block = edge.probe is not None and edge.attention and self.block_output and not feedback
        left: dict[int, torch.Tensor] = {}
        scores = [_Scored(view, None if through_block else self.rows, self.clips, left) for view in active]

        def cost(factors: torch.Tensor) -> float:
            if through_block and edge.probe is not None:
                return edge.probe({scored.view.name: scored.rounded(factors) for scored in scores})
            return sum(scored.loss(factors) for scored in scores)

        best, least = None, cost(torch.ones(edge.channels))
        for candidate in self._candidates(edge, active):
            found = cost(candidate)
            if found < least:
                best, least = candidate, found
        return best

    def _candidates(self, edge: EdgeView, active: Sequence[ConsumerView]) -> Iterator[torch.Tensor]:
        tokens = sum(_inputs(c).count for c in active)
        rows = sum(len(c.weight) for c in active)
        x, w = torch.zeros(edge.channels), torch.zeros(edge.channels)
        for view in active:
            x += view.per_channel(_inputs(view).value, edge.channels, "mean") * (_inputs(view).count / tokens)
            w += view.per_channel(_relative(view), edge.channels, "mean") * (len(view.weight) / rows)
        for step in range(1, self.grid):
            for weights in (None, w) if self.duo else (None,):
                yield edge.storable(scaled_line(x, weights, step / self.grid))


def scaled_line(x: torch.Tensor, w: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """``x^alpha``, or ``x^alpha / w^(1 - alpha)``, brought to a geometric middle of one; 1 for channels without input: ``(channels,)``.

    >>> scaled_line(torch.tensor([16.0, 1.0, 0.0]), None, 0.5).tolist()
    [2.0, 0.5, 1.0]
    """
    used = x > 0
    factors = x.pow(alpha) if w is None else x.pow(alpha) / (w.pow(1 - alpha) + _SMALLEST)
    factors = factors.clamp_min(_SMALLEST)
    if bool(used.any()):
        factors = factors / (factors[used].max() * factors[used].min()).sqrt()
    return torch.where(used & torch.isfinite(factors), factors, torch.ones_like(factors))


class _Scored:
    """A consumer (or some of its rows), and what factors would cost there."""

    def __init__(self, view: ConsumerView, rows: int | None, clips: int, left: dict[int, torch.Tensor]) -> None:
        assert view.scheme is not None
        gram = view.stats["gram"]
        assert isinstance(gram, Gram)
        self.view, self.scheme, self.gram = view, view.scheme, gram
        # Only where rows do not share parameters, which a part of them would not have.
        alone = view.scheme.by_rows((view.weight.shape[0], view.weight.shape[1]))
        every = -(-len(view.weight) // rows) if rows is not None and alone else 1
        self.weight = view.weight[::every]
        if view.feedback and id(gram) not in left:
            left[id(gram)] = _left_by_feedback(gram.matrix)
        #: what an error in each column costs: ``(columns,)``, per token or not is all the same
        self.importance = left.get(id(gram), gram.matrix.diagonal())
        self.clips = [1.0 - 0.4 * step / max(clips - 1, 1) for step in range(clips if view.searched else 1)]

    def rounded(self, factors: torch.Tensor) -> torch.Tensor:
        """``Q(W S) S⁻¹``: the weight that the consumer would have."""
        scales = self.view.expand(factors)
        scaled = self.weight * scales
        params = _clipped(scaled, self.scheme, self.importance / scales.square(), self.clips)
        return self.scheme.decode(self.scheme.encode(scaled, params), params) / scales

    def loss(self, factors: torch.Tensor) -> float:
        """``tr(E H Eᵀ)``, or what error feedback leaves of it, brought to all rows."""
        error = self.rounded(factors) - self.weight
        costly = error * self.importance if self.view.feedback else error @ self.gram.matrix
        return float((costly * error).sum(dtype=torch.float64)) * len(self.view.weight) / len(self.weight)


def _left_by_feedback(h: torch.Tensor) -> torch.Tensor:
    """U_jj² of ``h = U Uᵀ`` with the columns in descending order of h_jj, slightly damped: ``(columns,)``."""
    diagonal = h.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = h[order][:, order]
    damped.diagonal().add_(_DAMPING * float(diagonal.mean()))
    with one_thread():
        upper = upper_factor(damped)
    if upper is None:
        return diagonal
    left = torch.empty_like(diagonal)
    left[order] = upper.diagonal().square()
    return torch.where(diagonal > 0, left, torch.zeros_like(left))


def _clipped(w: torch.Tensor, scheme: Scheme, importance: torch.Tensor, clips: Sequence[float]) -> Params:
    """Of ranges shrunk by every clip, per tile that with the least squared error weighted by ``importance`` ``(columns,)``."""
    shape = (w.shape[0], w.shape[1])
    context = scheme.prepare([w])
    if len(clips) == 1:
        return scheme.finish(scheme.fit(w, context=context), shape)
    best: Params | None = None
    least = torch.empty(0)
    for params in scheme.clipped(w, clips, context):
        error = scheme.sum_tiles((scheme.decode(scheme.encode(w, params), params) - w).square_().mul_(importance))
        if best is None:
            best, least = params, error
        else:
            better = error < least
            best = scheme.choose(better, params, best)
            least = torch.where(better, error, least)
    assert best is not None
    return scheme.finish(best, shape)


def _inputs(view: ConsumerView) -> MeanAbs:
    found = view.stats.get("mean_abs")
    return found if isinstance(found, MeanAbs) else MeanAbs(view.weight.shape[1])


def _relative(view: ConsumerView) -> torch.Tensor:
    """Mean over the rows of |w| relative to the largest of its group: ``(columns,)``."""
    assert view.scheme is not None
    columns = view.weight.shape[1]
    span = view.scheme.span(columns)
    span = span if columns % span == 0 else columns
    groups = view.weight.abs().view(len(view.weight), -1, span)
    return (groups / groups.amax(-1, keepdim=True).clamp_min(1e-6)).view_as(view.weight).mean(0)


TRANSFORM = Awq
