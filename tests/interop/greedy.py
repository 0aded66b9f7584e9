"""Does another engine choose the tokens that bitwright's own runtime would choose?

The engine generates greedily; bitwright is fed the same tokens, so one near-tie does not change everything after it. Where the two
best logits are more than ``GAP`` apart the choice must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import bitwright

#: In bfloat16 logits of 8 to 16 are 1/16 apart; two engines that sum in different orders differ by a few such steps.
GAP = 0.25


@dataclass(frozen=True)
class Agreement:
    """positions: tokens generated; compared: those whose two best logits are more than GAP apart; different: of these, where the
    engine chose another one; ties: positions not compared where it did; worst: how far its choice was below the best, at most."""

    positions: int
    compared: int
    different: int
    ties: int
    worst: float
    logits: torch.Tensor

    def __str__(self) -> str:
        rest = f"{self.ties} of {self.positions - self.compared} near-ties fell otherwise, at most {self.worst:.3f} below the best"
        return f"{self.compared} of {self.positions} positions compared, {self.different} different; {rest}"


def agreement(
    folder: Path, prompts: list[list[int]], tokens: list[list[int]], dtype: torch.dtype, kernel: str = "auto"
) -> Agreement:
    """``prompts`` and ``tokens``: lists of one length each. kernel: that of ``bitwright.load``."""
    model = bitwright.load(folder, dtype=dtype, kernel=kernel)
    chosen = torch.tensor(tokens)
    ids, start = torch.cat([torch.tensor(prompts), chosen], dim=1), len(prompts[0])
    with torch.no_grad():
        logits = torch.cat([model(part, use_cache=False).logits[:, start - 1 : -1].float() for part in ids.split(8)])
    best = logits.topk(2, dim=-1)
    clear = best.values[..., 0] - best.values[..., 1] > GAP
    other = best.indices[..., 0] != chosen
    below = best.values[..., 0] - logits.gather(-1, chosen[..., None])[..., 0]
    counts = [int(part.sum()) for part in (clear, clear & other, ~clear & other)]
    return Agreement(chosen.numel(), *counts, float(below.max()), logits)
