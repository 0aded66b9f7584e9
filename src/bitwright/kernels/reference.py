"""Plain torch versions of every kernel: the oracle that the fast ones are tested against."""

from __future__ import annotations

from typing import Any

import torch

from bitwright.core.method import TileSums
from bitwright.core.scheme import AffineCodec, Codec, Params, Scheme

__all__ = ["encode", "feedback_block", "tile_sums"]


def feedback_block(
    targets: torch.Tensor,
    weights: torch.Tensor,
    feedback: torch.Tensor,
    codec: Codec,
    columns: torch.Tensor,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's inner loop over one block of columns; shapes as in ``core.method.FeedbackKernel``.

    Column by column: code = nearest code of the target; error = original weight - decoded; every later target of the block
    moves by ``error * feedback[column, later]``. Where ``keep`` is true, decoded is the target in float16.
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
            index = torch.bucketize(targets[j] / scale, middles)
            decoded = codec.table[index] * scale
            code = index if codec.codes is None else codec.codes[index]
        if keep is not None:
            decoded = torch.where(keep[j], targets[j].half().float(), decoded)
        codes[j] = code.to(torch.uint8)
        errors[j] = weights[j] - decoded
        targets[j + 1 :] += feedback[j, j + 1 :, None] * errors[j]
    return codes, errors


def tile_sums(w: torch.Tensor, weights: torch.Tensor | None, scheme: Scheme, params: Params) -> TileSums | None:
    """Sums of every tile, from the scheme's own encode and decode; shapes as in ``core.method.TileKernel``."""
    rows, columns = w.shape
    if not scheme.by_rows((w.shape[0], w.shape[1])):
        return None
    scale = scheme.codec(params, (rows, columns)).scale
    span = scheme.span(columns)
    if scale.shape != (rows, columns // span):
        return None
    decoded = scheme.decode(scheme.encode(w, params), params)
    steps = (decoded.view(rows, -1, span) / scale.unsqueeze(-1)).view(rows, columns)
    importance = torch.ones(columns) if weights is None else weights.float()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * importance).view(rows, -1, span).sum(-1)

    return TileSums(total((w - decoded).square()), total(w * steps), total(steps.square()))


def encode(w: torch.Tensor, scheme: Scheme, params: Params | None, prepared: Any) -> tuple[Params, torch.Tensor] | None:
    """The scheme's own quantizer, or its encoder; shapes as in ``core.method.EncodeKernel``."""
    if params is None:
        return scheme.quantize(w, context=prepared)
    return params, scheme.encode(w, params)
