r"""SpQR: GPTQ with the weights that would cost most kept apart in 16 bits (arXiv:2306.03078, sections 3 and 4).

Keeping weight w_ij apart spares the error that rounding it would cause after the other columns have made up for it as well as they can,

    s_ij = (w_ij - quant(w_ij))² / (2 [H⁻¹]_jj)                                            (eq. 2 to 4)

and, where w_ij is what stretches its group's range, part of its neighbours' errors too. Both are counted by *leave-one-out*: the
weighted error of the whole group with w_ij in it, less that of the group fitted without w_ij. Of a range only the two extremes can
change it, so two further fits per group give the exact figure for every weight.

In place of 1 / [H⁻¹]_jj stands U_jj² (``H = U Uᵀ``, see ``gptq``): the cost that is left when the columns visited *after* j make up for the
error, which is what happens in the column loop. (It is the Cholesky diagonal that the authors' own code divides by.)

Outliers leave a zero in the fits of their group. In the column loop an outlier takes the value that makes up for all errors before it,
rounded to 16 bits; what that rounding leaves goes on to the columns after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.method import Context, Outcome, Stats, has_outliers, relative_loss
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Scheme
from bitwright.core.stats import Gram
from bitwright.errors import InputError
from bitwright.methods.gptq import Gptq, outliers_of, usable_weights, without

__all__ = ["METHOD", "Spqr"]


@dataclass(frozen=True, kw_only=True)
class Spqr(Gptq):
    """GPTQ with sensitivity-based outliers; how many there are says the scheme (``outlier_count``).

    Options are those of ``gptq``, and ``rounds``: outliers are chosen in this many equal parts, each from fits without those before it, so
    that several outliers of one group are found.
    """

    name: ClassVar[str] = "spqr"
    keeps_outliers: ClassVar[bool] = True
    rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise InputError(f"rounds {self.rounds} is not positive", mend="use 1 to 8")

    def accepts(self, scheme: Scheme) -> str | None:
        if not has_outliers(scheme):
            return "the scheme keeps no outliers, so that it would do what gptq does"
        return None

    def _apart(
        self,
        w: torch.Tensor,
        upper: torch.Tensor,
        order: torch.Tensor | None,
        scheme: Scheme,
        context: Context,
    ) -> torch.Tensor | None:
        cost = upper.diagonal().square()
        if order is not None:
            cost = torch.empty_like(cost).index_copy_(0, order, cost)
        return self._choose(w, cost, scheme, context)

    def _choose(self, w: torch.Tensor, cost: torch.Tensor, scheme: Scheme, context: Context) -> torch.Tensor | None:
        """The outliers, ``(rows, columns)`` bool, or None where the scheme has none. cost: ``(columns,)``, of a squared error."""
        total = scheme.outlier_count((w.shape[0], w.shape[1]))
        if total == 0:
            return None
        apart = torch.zeros(w.shape, dtype=torch.bool)
        for turn in range(1, self.rounds + 1):
            gain = sensitivity(without(w, apart), cost, scheme, context)
            apart = largest(gain.masked_fill_(apart, float("inf")), total * turn // self.rounds)
        return apart

    def _fallback(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context, why: str) -> Outcome:
        """Clip search without error feedback; outliers by E[x²], or by their own errors where there is no data."""
        weights = usable_weights(stats)
        apart = self._choose(w, torch.ones(w.shape[1]) if weights is None else weights, scheme, context)
        rest = without(w, apart)
        params = self._search().params(rest, scheme, weights, context)
        outliers = None if apart is None else outliers_of(w, apart, scheme)
        tensor = QuantizedTensor(scheme, (w.shape[0], w.shape[1]), scheme.encode(rest, params), params, outliers)
        gram = stats.get("gram")
        loss = relative_loss(w, tensor.decode(), gram.matrix) if isinstance(gram, Gram) and gram.count else None
        return Outcome(tensor=tensor, loss=loss, fallback=f"search: {why}")


def sensitivity(w: torch.Tensor, cost: torch.Tensor, scheme: Scheme, context: Context) -> torch.Tensor:
    """What keeping each weight apart spares, ``(rows, columns)``: its group's error with it less the error without it.

    cost: ``(columns,)``, of a squared error in each column. A weight spares its own error at least, even where the fit without it happens
    to be worse. For tiles of more than one row the weight's own error alone is counted.
    """
    rows, columns = w.shape

    def errors(x: torch.Tensor) -> torch.Tensor:
        params = scheme.fit(x, context=context.prepared)
        return (x - scheme.decode(scheme.encode(x, params), params)).square_().mul_(cost)

    gain = errors(w)
    if scheme.tile.rows != 1:
        return gain
    span = scheme.span(columns)
    tiles, gains = w.view(rows, -1, span), gain.view(rows, -1, span)
    whole = gains.sum(-1, keepdim=True)
    for extreme in (tiles.argmax(-1, keepdim=True), tiles.argmin(-1, keepdim=True)):
        left = errors(tiles.scatter(-1, extreme, 0.0).view(rows, columns)).view(rows, -1, span)
        # The zero in the weight's place is no weight: its error does not count.
        spared = whole - (left.sum(-1, keepdim=True) - left.gather(-1, extreme))
        gains.scatter_(-1, extreme, torch.maximum(spared, gains.gather(-1, extreme)))
    return gain


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """True at the ``count`` largest values; of equal ones those that come first.

    >>> largest(torch.tensor([[1.0, 3.0], [3.0, 3.0]]), 2).tolist()
    [[False, True], [True, False]]
    """
    flat = values.reshape(-1)
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    border = flat.topk(count, sorted=False).values.min()
    chosen = flat > border
    short = count - int(chosen.sum())
    chosen[(flat == border).nonzero().squeeze(1)[:short]] = True
    return chosen.view(values.shape)


METHOD = Spqr
