"""Parameter search: for every tile the range that minimises the squared error weighted by E[x²].

Round-to-nearest takes the range from the extremes, so that one outlier costs its whole tile resolution. Here the range is
shrunk in steps, each candidate is scored by ``sum_i E[x_i²] (w_i - ŵ_i)²`` and the best one of each tile is kept; then the
scale is refitted to the chosen codes in closed form (weighted least squares) where the scheme has one, alternating with
re-encoding, as long as the error falls. The clip search is that of arXiv:2306.00978, section 3.2 (there with a layer-wise score).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitwright.core.method import Context, Method, Outcome, Stats, TileSums, relative_loss
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Params, Scheme
from bitwright.core.stats import Gram
from bitwright.errors import InputError

__all__ = ["METHOD", "Search", "search_params"]


def tile_errors(w: torch.Tensor, decoded: torch.Tensor, weights: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Weighted squared error of every tile: ``(tile rows, tile columns)`` float32."""
    error = (w - decoded).square_()
    if weights is not None:
        error *= weights
    return scheme.sum_tiles(error)


def _sums(
    w: torch.Tensor, weights: torch.Tensor | None, scheme: Scheme, params: Params, context: Context
) -> TileSums | None:
    return context.tile_sums(w, weights, scheme, params) if context.tile_sums is not None else None


def search_params(
    w: torch.Tensor,
    scheme: Scheme,
    weights: torch.Tensor | None,
    context: Context,
    *,
    clips: Sequence[float],
    refits: int,
) -> Params:
    """The best parameters found for ``w`` ``(rows, columns)``; never worse than ``scheme.fit``, tile by tile.

    weights: ``(columns,)`` importance or None. The first of ``clips`` must be 1.
    """
    best: Params | None = None
    best_error = torch.empty(0)
    sums: TileSums | None = None

    def consider(candidate: Params) -> bool:
        """Keep the candidate for the tiles where it is better; true where there are any."""
        nonlocal best, best_error, sums
        found = _sums(w, weights, scheme, candidate, context)
        if found is not None:
            error = found.error
        else:
            error = tile_errors(w, scheme.decode(scheme.encode(w, candidate), candidate), weights, scheme)
        if best is None:
            best, best_error, sums = candidate, error, found
            return True
        better = error < best_error
        best = scheme.choose(better, candidate, best)
        best_error = torch.where(better, error, best_error)
        if found is not None and sums is not None:
            sums = TileSums(
                best_error,
                torch.where(better, found.above, sums.above),
                torch.where(better, found.below, sums.below),
            )
        return bool(better.any())

    for candidate in scheme.clipped(w, clips, context.prepared, weights):
        consider(candidate)
    assert best is not None
    for _ in range(refits):
        refitted = scheme.refit_sums(sums.above, sums.below, best) if sums is not None else None
        if refitted is None:
            refitted = scheme.refit(w, scheme.encode(w, best), best, weights=weights)
        if refitted is best or not consider(refitted):
            break
    return best


@dataclass(frozen=True, kw_only=True)
class Search(Method):
    """Clip search weighted by E[x²] (unweighted where no data was given).

    steps: candidates; smallest: the smallest fraction of the range tried; refits: alternations of refit and encode.
    """

    name: ClassVar[str] = "search"
    steps: int = 20
    smallest: float = 0.5
    refits: int = 4
    #: rows handled at once, so that the workspace stays small
    chunk_rows: int = 512

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 < self.smallest <= 1 or self.refits < 0 or self.chunk_rows < 1:
            raise InputError("search needs steps >= 0, 0 < smallest <= 1, refits >= 0, chunk_rows >= 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    def quantize(self, w: torch.Tensor, stats: Stats, scheme: Scheme, context: Context) -> Outcome:
        gram = stats.get("gram")
        usable = isinstance(gram, Gram) and gram.count > 0
        weights = gram.mean_square if isinstance(gram, Gram) and usable else None
        if weights is not None and not bool((weights > 0).any()):
            weights = None
        params = self.params(w, scheme, weights, context)
        tensor = QuantizedTensor(scheme, (w.shape[0], w.shape[1]), scheme.encode(w, params), params)
        loss = relative_loss(w, tensor.decode(), gram.matrix) if isinstance(gram, Gram) and usable else None
        return Outcome(tensor=tensor, loss=loss)

    def params(self, w: torch.Tensor, scheme: Scheme, weights: torch.Tensor | None, context: Context) -> Params:
        """Searched parameters, row chunk by row chunk where tiles allow it."""
        clips = [1.0 - (1.0 - self.smallest) * step / max(self.steps, 1) for step in range(self.steps + 1)]
        whole = not scheme.by_rows((w.shape[0], w.shape[1]))
        parts = [
            search_params(chunk, scheme, weights, context, clips=clips, refits=self.refits)
            for chunk in ([w] if whole else torch.split(w, self.chunk_rows))
        ]
        loose = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return scheme.finish(loose, (w.shape[0], w.shape[1]))


METHOD = Search
