"""What training adds: adapters, gradients, optimiser states, and the activations that backward needs.

LoRA (arXiv:2106.09685): ``A (rank, in)`` and ``B (out, rank)`` for each target. AdamW keeps two states of a parameter's own size and
dtype; the 8-bit one of bitsandbytes (arXiv:2110.02861) one byte for each and a float32 for every block of 256, but plain float32 for
tensors under 4096 elements. Activations: what one layer saves for backward is counted from its operations (``saved_per_token``);
with gradient checkpointing (arXiv:1604.06174) every layer saves its input alone, and one layer at a time is run again.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.advise.decoder import ModelShape
from bitwright.errors import InputError

__all__ = ["ALL_LINEAR", "activations", "adapter_sizes", "optimizer_bytes", "saved_per_token"]

#: peft's ``target_modules="all-linear"``: every linear of the blocks, the head not
ALL_LINEAR = ("all-linear",)
_SMALL, _BLOCK = 4096, 256


def adapter_sizes(shape: ModelShape, rank: int, targets: Sequence[str] = ALL_LINEAR) -> list[int]:
    """Elements of every adapter matrix.

    >>> small = ModelShape(name="x", hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=32)
    >>> adapter_sizes(small, 2, ("q_proj",))
    [16, 16]
    """
    if rank < 1:
        raise InputError(f"LoRA rank {rank}", mend="use 8, 16 or 64")
    every = "all-linear" in targets
    found: list[int] = []
    names = set()
    for matrix in shape.matrices:
        # transformers holds experts as plain parameters, which all-linear does not mean.
        if matrix.place in ("attention", "mlp"):
            names.add(matrix.role)
            if every or matrix.role in targets:
                found += [rank * matrix.columns, rank * matrix.rows] * matrix.count
    unknown = sorted(set(targets) - names - {"all-linear"})
    if unknown:
        raise InputError(f"no linear is called {', '.join(unknown)}", mend=f"use some of: {', '.join(sorted(names))}")
    return found


def optimizer_bytes(sizes: Sequence[int], optimizer: str, item: int) -> int:
    """Bytes of the states over tensors of these sizes. item: bytes of a parameter.

    >>> optimizer_bytes([100], "adamw", 4), optimizer_bytes([8192], "adamw8bit", 4), optimizer_bytes([100], "sgd", 4)
    (800, 16640, 0)
    """
    match optimizer:
        case "adamw":
            return 2 * item * sum(sizes)
        case "adamw8bit":
            return sum(2 * (4 * n if n < _SMALL else n + 4 * -(-n // _BLOCK)) for n in sizes)
        case "sgd":
            return 0
    raise InputError(f"optimizer '{optimizer}' is unknown", mend="use adamw, adamw8bit or sgd")


def saved_per_token(shape: ModelShape, item: int, rank: int = 0) -> int:
    """Bytes that one decoder layer of transformers keeps for backward, for each token, with SDPA attention.

    Two norms (their input in float32, and as it came and normed), q, k, v, the attention's output and its logarithmic sums, and
    four tensors of the MLP's width. With adapters (``rank``) the frozen weights need no inputs, but peft casts the input of every adapter
    to float32, once for each linear that reads it, and keeps the adapter's inner ``rank`` numbers.
    """
    hidden, wide, queries, pairs = shape.hidden, shape.widest, shape.query_width, 2 * shape.kv_heads * shape.head_dim
    mlp = 3 if shape.gated else 2
    attention = item * (queries + pairs) + 4 * shape.heads
    if not rank:
        # norms; the inputs of o_proj (the attention's output) and of the MLP's linears
        return 2 * (4 + 2 * item) * hidden + 8 + attention + item * queries + item * (mlp + 1) * wide
    readers = len([m for m in shape.matrices if m.place in ("attention", "mlp") and 0 in m.layers])
    wanted = 4 * rank * readers
    if item == 4:
        return 2 * 8 * hidden + 8 + attention + item * queries + item * (mlp + 1) * wide + wanted
    inputs = readers - 2
    casts = 4 * (inputs * hidden + queries + wide)
    return 2 * 4 * hidden + 8 + attention + item * queries + item * mlp * wide + casts + wanted


def activations(
    shape: ModelShape, *, context: int, batch: int, item: int, checkpointing: bool, rank: int, largest: int = 0
) -> tuple[int, list[str]]:  # fmt: skip
    """Peak of what is kept between forward and backward, and what was assumed."""
    if context < 1 or batch < 1:
        raise InputError(f"context {context}, batch {batch}", mend="both must be at least 1")
    tokens = context * batch
    layer = tokens * saved_per_token(shape, item, rank)
    inputs = tokens * shape.hidden * item
    # Logits as computed, and in float32: their logarithms, and two gradients.
    logits = tokens * shape.vocab * (item + 12)
    gradients = tokens * item * (3 * shape.widest + 4 * shape.hidden)
    kept = shape.layers * inputs + layer if checkpointing else shape.layers * layer
    # The loss comes after the last layer; a layer runs again when the logits are gone.
    peak = max(shape.layers * (inputs if checkpointing else layer) + logits, kept + gradients) + item * largest
    how = "every layer keeps its input and runs again" if checkpointing else "every layer keeps what backward needs"
    said = [
        f"activations: {how}, logits of all {tokens} tokens in float32, attention without a matrix of scores (SDPA)"
    ]
    if largest:
        said.append(f"the largest quantized matrix is decoded while it is used: {item * largest / 1e6:.0f} MB")
    return peak, said
