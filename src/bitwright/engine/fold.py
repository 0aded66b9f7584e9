"""From an edge and its factors, in memory, to factors of stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from bitwright.core.tensor import TensorSpec
from bitwright.core.transform import Edge
from bitwright.engine.rewrite import Factors
from bitwright.model.names import NameMap, Place

__all__ = ["Folder"]


class Folder:
    """Folds edges of one block into its stored tensors.

    prefix: path of the block; stored: every tensor of the checkpoint; exact: names of tensors that will be quantized from float32
    (all others are rounded to their stored dtype); read: gives a tensor as it is rewritten so far.
    """

    def __init__(
        self,
        prefix: str,
        names: NameMap,
        stored: Mapping[str, TensorSpec],
        exact: frozenset[str],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        self._prefix, self._stored, self._exact, self._read = prefix, stored, exact, read
        self._of: dict[str, list[tuple[str, Place]]] = {}
        for tensor, place in names.places.items():
            self._of.setdefault(place.parameter, []).append((tensor, place))

    def tensors_of(self, parameter: str, expert: int | None) -> list[tuple[str, Place]]:
        """The stored tensors that a parameter of the block (one expert of it) consists of."""
        found = self._of.get(self._prefix + parameter, [])
        return [(name, place) for name, place in found if place.expert in (None, expert)]

    def reason(self, edge: Edge) -> str | None:
        """None where every matrix and vector of an edge is a plain slice of a stored tensor, else why not."""
        needed = [(edge.producer.weight, edge.producer.expert), *((c.weight, c.expert) for c in edge.consumers)]
        if edge.producer.bias is not None:
            needed.append((edge.producer.bias, edge.producer.expert))
        for parameter, expert in needed:
            found = self.tensors_of(parameter, expert)
            if not found or any(expert is not None and place.expert is None for _, place in found):
                return f"{parameter} is not stored as plain matrices"
        return None

    def storing(self, edge: Edge) -> Callable[[torch.Tensor], torch.Tensor]:
        """What factors ``(channels,)`` become when the edge is stored: float64 from float32.

        Where all consumers are quantized from float32, a norm's vector n is rounded to its dtype first, n' = round(n / f), and the columns
        take exactly what it lost: n / n'. Where a matrix of the edge stays in 16 bits (a router, a kept layer), factors are rounded to
        powers of two, which 16 bits hold without loss.
        """
        matrices = [(c.weight, c.expert) for c in edge.consumers]
        matrices += [] if edge.producer.norm else [(edge.producer.weight, edge.producer.expert)]
        exact = all(name in self._exact for slot in matrices for name, _ in self.tensors_of(*slot))
        vector: TensorSpec | None = None
        old = torch.empty(0)
        if edge.producer.norm:
            ((name, _),) = self.tensors_of(edge.producer.weight, None)
            vector, old = self._stored[name], self._read(name)[edge.producer.rows].double() + edge.producer.offset

        def stored(factors: torch.Tensor) -> torch.Tensor:
            factors = factors.double()
            if not exact:
                factors = torch.exp2(factors.log2().round())
            return factors if vector is None else _rounded(old, factors, vector.dtype, edge.producer.offset)

        return stored

    def fold(self, edge: Edge, factors: torch.Tensor) -> dict[str, Factors]:
        """What each stored tensor is multiplied by: the producer by 1/f, columns by f; ``(channels,)`` positive float32."""
        factors = self.storing(edge)(factors)
        result: dict[str, Factors] = {}
        self._divide(edge, edge.producer.weight, factors, result)
        if edge.producer.bias is not None:
            self._divide(edge, edge.producer.bias, factors, result)
        for consumer in edge.consumers:
            columns = torch.where(
                consumer.channel >= 0, factors[consumer.channel.clamp_min(0)], torch.ones(()).double()
            )
            for name, place in self.tensors_of(consumer.weight, consumer.expert):
                turned = place.transposed != consumer.transposed
                part = Factors(rows=columns.float()) if turned else Factors(columns=columns.float())
                result[name] = result[name].then(part) if name in result else part
        return result

    def _divide(self, edge: Edge, parameter: str, factors: torch.Tensor, result: dict[str, Factors]) -> None:
        producer = edge.producer
        offset = producer.offset if parameter == producer.weight else 0.0
        for name, place in self.tensors_of(parameter, producer.expert):
            shape = self._stored[name].shape
            turned = len(shape) == 2 and place.transposed != producer.transposed
            length = shape[1] if turned else shape[0]
            first = place.rows[0] if place.rows is not None else 0
            inside = (producer.rows >= first) & (producer.rows < first + length)
            if not bool(inside.any()):
                continue
            whole = torch.ones(length, dtype=torch.float64)
            whole[producer.rows[inside] - first] = 1.0 / factors[inside]
            part = Factors(columns=whole.float()) if turned else Factors(rows=whole.float(), offset=offset)
            result[name] = result[name].then(part) if name in result else part


def _rounded(old: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype, offset: float) -> torch.Tensor:
    """``old / new`` with ``new = old / factors`` rounded to the stored dtype; 1 where either is zero or not finite."""
    new = (old / factors - offset).to(dtype).double() + offset
    usable = (old != 0) & (new != 0) & torch.isfinite(new)
    return torch.where(usable, old / torch.where(usable, new, torch.ones_like(new)), torch.ones_like(factors))
