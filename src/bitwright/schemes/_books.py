"""Code books: NF4, FP4, the signed 8-bit dynamic map, and tables fitted to a weight.

NF4: quantiles of the normal distribution, an exact zero, ends at -1 and 1 (arXiv:2305.14314, appendix E). FP4: one sign bit, three bits for
0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 (bitsandbytes; not the E2M1 of the microscaling formats). Dynamic map: 1 to 64 linear steps in each of
seven decades, both signs, 0 and 1 (arXiv:1511.04561; arXiv:2110.02861, section 2.1). All values are those that bitsandbytes 0.50 stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

__all__ = ["FINE", "FP4", "FP4_ORDER", "NF4", "dynamic_codes", "dynamic_map", "fit_table", "middles"]

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_FP4_HALF = (0.0, 0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0)
#: Ascending, zero twice.
FP4 = (*(-value for value in reversed(_FP4_HALF[1:])), 0.0, *_FP4_HALF)
#: The index that bitsandbytes gives to each entry of ``FP4``. Index 8, the second zero, is what its CPU quantizer takes for small
#: positive values.
FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

#: bitsandbytes' CPU quantizer of 8 bits rounds to this many numbers from -1 to 1 before it takes the nearest entry of the map, so that
#: a value near a border, or smaller than half a step of this grid, may get a neighbour.
FINE = 65536
#: A sample of this many values decides a fitted table.
_SAMPLE = 1 << 18
_ROUNDS = 300


def middles(table: torch.Tensor) -> torch.Tensor:
    """``(levels - 1,)``: the borders between neighbours; a value on a border belongs to the lower one.

    >>> middles(torch.tensor([-1.0, 0.0, 0.5])).tolist()
    [-0.5, 0.25]
    """
    return (table[1:] + table[:-1]) / 2


@cache
def dynamic_map() -> torch.Tensor:
    """The signed 8-bit dynamic map: ``(256,)`` float32, ascending.

    >>> [round(float(dynamic_map()[i]), 8) for i in (0, 127, 128, 255)]
    [-0.99296874, 0.0, 5.5e-07, 1.0]
    """
    values = [0.0, 1.0]
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2**decade + 1)
        # The product of a Python float and a float32 tensor: bitsandbytes' values to the last bit.
        steps = (10 ** (decade - 6) * ((borders[:-1] + borders[1:]) / 2.0)).tolist()
        values += [*steps, *(-step for step in steps)]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def dynamic_codes() -> torch.Tensor:
    """The code of each of ``FINE`` evenly spaced numbers from -1 to 1, both included: ``(FINE,)`` uint8."""
    grid = torch.arange(FINE, dtype=torch.float32) * (2.0 / (FINE - 1)) - 1
    return torch.bucketize(grid, middles(dynamic_map()), out_int32=True).to(torch.uint8)


def fit_table(tensors: Sequence[torch.Tensor], block_size: int, levels: int) -> torch.Tensor:
    """The table of ``levels`` values that best stands for ``w / absmax`` of these weights: ``(levels,)`` float32, strictly ascending.

    Lloyd's algorithm (IEEE Trans. Inf. Theory 28, 1982, p. 129) in one dimension, from quantiles, over evenly spaced blocks. Every value
    weighs absmax², so that the squared error of the weights themselves is minimised. Nothing is random.
    """
    values, weights = _sample(tensors, block_size)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)])
    moment = torch.cat([torch.zeros(1, dtype=torch.float64), (weights * values).cumsum(0)])
    if not float(total[-1]) > 0:
        return torch.linspace(-1, 1, levels)
    shares = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * total[-1]
    table = values[torch.searchsorted(total[1:], shares).clamp_max(len(values) - 1)]
    for _ in range(_ROUNDS):
        cuts = torch.searchsorted(values, middles(table), right=True)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([len(values)])])
        mass = total[edges].diff()
        moved = torch.where(mass > 0, moment[edges].diff() / mass.clamp_min(1e-300), table)
        if float((moved - table).abs().max()) < 1e-7:
            break
        table = moved.sort().values
    return _distinct(table.float(), levels)


def _sample(tensors: Sequence[torch.Tensor], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted values of ``w / absmax`` and their weights absmax², float64; of evenly spaced blocks."""
    values, weights = [], []
    for w in tensors:
        flat = w.reshape(-1)
        short = -len(flat) % block_size
        blocks = (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, block_size)
        step = -(-blocks.numel() * len(tensors) // _SAMPLE)
        blocks = blocks[::step].double()
        absmax = blocks.abs().amax(1, keepdim=True)
        values.append((blocks / absmax.clamp_min(1e-38)).view(-1))
        weights.append(absmax.square().expand_as(blocks).reshape(-1))
    joined, order = torch.cat(values).sort()
    return joined, torch.cat(weights)[order]


def _distinct(table: torch.Tensor, levels: int) -> torch.Tensor:
    """The table with repeated values replaced by unused ones of an even grid: kernels need it strictly ascending."""
    table = torch.unique(table)
    if len(table) < levels:
        spare = torch.linspace(-1, 1, 4 * levels + 1)
        spare = spare[(spare[:, None] - table).abs().amin(1) > 1e-3]
        chosen = torch.linspace(0, len(spare) - 1, levels - len(table)).round().long()
        table = torch.cat([table, spare[chosen]]).sort().values
    return table
