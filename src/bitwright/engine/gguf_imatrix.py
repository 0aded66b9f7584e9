"""Collect an importance matrix: E[x²] of what every linear reads, by the engine's own walk through the blocks, under GGUF's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bitwright.engine.progress import Progress, Silent
from bitwright.engine.run import open_source
from bitwright.engine.watch import watching
from bitwright.errors import InputError
from bitwright.gguf.export import describe
from bitwright.gguf.imatrix import ImportanceMatrix, Sums

__all__ = ["collect_imatrix"]


class _Squares:
    """Sum of x² over tokens, ``(columns,)`` float64, and their count."""

    def __init__(self, columns: int) -> None:
        self.sums = torch.zeros(columns, dtype=torch.float64)
        self.count = 0
        self.finite = True

    def update(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        added = rows.square().sum(0, dtype=torch.float64)
        self.finite = self.finite and bool(torch.isfinite(added).all())
        self.sums += added
        self.count += len(rows)


def collect_imatrix(
    model: Path,
    *,
    text: str | Path | None = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    shuffle: bool = True,
    max_memory_bytes: int | None = None,
    pre: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """The importance matrix of the checkpoint folder ``model``.

    text: a file as for calibration; None: the model's own samples. samples sequences of ``length`` tokens are read; shuffle: a seeded
    choice among all of the text's windows, else the first ones. Raises InputError for models whose blocks transformers cannot run.
    """
    progress = progress or Silent()
    seen: dict[str, _Squares] = {}
    with watching(
        model, _Squares, text=text, samples=samples, length=length, seed=seed, max_memory_bytes=max_memory_bytes,
        progress=progress, stacks=False, shuffle=shuffle, allow_pickle=allow_pickle,
    ) as watch:  # fmt: skip
        for _, watched in watch.run():
            for found in watched:
                seen |= {unit.name: found.probe for unit in found.units}
    with open_source(model, allow_pickle=allow_pickle) as source:
        export = describe(source, pre=pre)
    entries: dict[str, Sums] = {}
    for road in export.roads:
        if road.role != "matrix" or not road.pieces:
            continue
        modules = [piece.tensor.removesuffix(".weight") for piece in road.pieces]
        probes = [seen.get(module) for module in modules]
        if all(probe is None for probe in probes):
            continue
        # Pieces of one matrix (q, k, v) read the same input; those of a stack are experts, some of which no token may have reached.
        own = probes if len(road.shape) == 3 else probes[:1]
        squares = np.zeros((len(own), road.columns), np.float32)
        counts = np.zeros(len(own), np.float32)
        for i, probe in enumerate(own):
            if probe is not None:
                squares[i], counts[i] = probe.sums.numpy(), probe.count
        entries[road.name] = Sums(squares, counts)
    if not entries:
        raise InputError("no linear layer of the blocks is stored in GGUF", mend="report this model")
    origin = Path(watch.tokens.origin).name
    return ImportanceMatrix(entries, (origin,), watch.tokens.sequences, length, origin)
