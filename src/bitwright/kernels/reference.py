"""Plain torch versions of every kernel: the oracle that the fast ones are tested against."""

from __future__ import annotations

import torch

from bitwright.core.method import TileSums
from bitwright.core.scheme import AffineCodec, Codec, Params, Scheme

__all__ = ["feedback_block", "tile_sums"]


def feedback_block(
    targets: torch.Tensor, weights: torch.Tensor, feedback: torch.Tensor, codec: Codec, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's inner loop over one block of columns; shapes as in ``core.method.FeedbackKernel``.

    Column by column: code = nearest code of the target; error = original weight - decoded; every later target of the block
    moves by ``error * feedback[column, later]``.
    """
    targets = targets.clone()
    block, rows = targets.shape
    codes = torch.empty(block, rows, dtype=torch.uint8)
    errors = torch.empty(block, rows)
    for j in range(block):
        tile = int(codec.tile[columns[j]])
        scale = codec.scale[:, tile]
        if isinstance(codec, AffineCodec):
            zero = codec.zero[:, tile]
            code = torch.round(targets[j] / scale + zero).clamp_(codec.low, codec.high)
            decoded = (code - zero) * scale
        else:
            middles = (codec.table[1:] + codec.table[:-1]) / 2
            code = torch.bucketize(targets[j] / scale, middles).float()
            decoded = codec.table[code.long()] * scale
        codes[j] = code.to(torch.uint8)
        errors[j] = weights[j] - decoded
        targets[j + 1 :] += feedback[j, j + 1 :, None] * errors[j]
    return codes, errors


def tile_sums(w: torch.Tensor, weights: torch.Tensor | None, scheme: Scheme, params: Params) -> TileSums | None:
    """Sums of every tile, from the scheme's own encode and decode; shapes as in ``core.method.TileKernel``."""
    if scheme.tile.rows != 1 or "scale" not in params:
        return None
    rows, columns = w.shape
    span = scheme.span(columns)
    decoded = scheme.decode(scheme.encode(w, params), params)
    steps = (decoded.view(rows, -1, span) / params["scale"].float().unsqueeze(-1)).round().view(rows, columns)
    importance = torch.ones(columns) if weights is None else weights.float()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * importance).view(rows, -1, span).sum(-1)

    return TileSums(total((w - decoded).square()), total(w * steps), total(steps.square()))
