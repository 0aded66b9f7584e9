"""A shape for a number of parameters, from models that were published.

Widths grow with the number of parameters in a way that published models agree on within some tens of percent. ``shape_for`` takes the
published shape where the number fits one within 3 %; between two of them it interpolates width and depth in the logarithm of the
number, takes heads, vocabulary and tying from the nearer one, and lets the MLP make up the rest, so that the total is what was asked for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from bitwright.advise.decoder import ModelShape, Vectors
from bitwright.errors import InputError

__all__ = ["PUBLISHED", "Published", "parse_parameters", "shape_for"]

_QKV = Vectors(qkv=True)
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model and its shape; the numbers are those of its ``config.json`` on the hub."""

    repository: str
    shape: ModelShape


def _row(
    repository: str, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, *, head_dim: int | None = None,
    tied: bool = False, vectors: Vectors | None = None,
) -> Published:  # fmt: skip
    shape = ModelShape(
        name=repository, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim or hidden // heads,
        intermediate=mlp, vocab=vocab, tied=tied, vectors=vectors or Vectors(), source=f"config.json of {repository}",
    )  # fmt: skip
    return Published(repository=repository, shape=shape)


#: Ascending by parameters.
PUBLISHED: tuple[Published, ...] = (
    _row("HuggingFaceTB/SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True),
    _row("HuggingFaceTB/SmolLM2-360M", 960, 32, 15, 5, 2560, 49152, tied=True),
    _row("Qwen/Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, tied=True, vectors=_QKV),
    _row("meta-llama/Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True),
    _row("Qwen/Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151936, tied=True, vectors=_QKV),
    _row("meta-llama/Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128256, tied=True),
    _row("mistralai/Mistral-7B-v0.3", 4096, 32, 32, 8, 14336, 32768),
    _row("meta-llama/Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256),
    _row("mistralai/Mistral-Nemo-Base-2407", 5120, 40, 32, 8, 14336, 131072, head_dim=128),
    _row("Qwen/Qwen2.5-14B", 5120, 48, 40, 8, 13824, 152064, vectors=_QKV),
    _row("mistralai/Mistral-Small-24B-Base-2501", 5120, 40, 32, 8, 32768, 131072, head_dim=128),
    _row("Qwen/Qwen2.5-32B", 5120, 64, 40, 8, 27648, 152064, vectors=_QKV),
    _row("meta-llama/Llama-3.1-70B", 8192, 80, 64, 8, 28672, 128256),
    _row("mistralai/Mistral-Large-Instruct-2407", 12288, 88, 96, 8, 28672, 32768),
    _row("meta-llama/Llama-3.1-405B", 16384, 126, 128, 8, 53248, 128256),
)
#: how near a published model counts as the one that is meant: names round to a digit or two (Llama "8B" has 8.03)
_NEAR = 0.03


def parse_parameters(text: str) -> int:
    """A number of parameters such as 70B or 360M.

    >>> parse_parameters("70B"), parse_parameters("1.5b"), parse_parameters("360M")
    (70000000000, 1500000000, 360000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not 1e6 <= value <= 1e14:
        raise InputError(f"'{text}' is not a number of parameters", mend="write it like 7B or 360M")
    return round(value)


def shape_for(parameters: int) -> ModelShape:
    """A typical dense decoder with about this many parameters; ``source`` says where it is from.

    >>> shape_for(8_000_000_000).source
    'config.json of meta-llama/Llama-3.1-8B'
    """
    if not 1e6 <= parameters <= 1e14:
        raise InputError(f"{parameters} parameters", mend="give a number between 1M and 100T")
    sizes = [(entry.shape.parameters, entry) for entry in PUBLISHED]
    near = min(sizes, key=lambda pair: abs(math.log(pair[0] / parameters)))
    if abs(near[0] / parameters - 1) <= _NEAR:
        return near[1].shape
    below = max((pair for pair in sizes if pair[0] <= parameters), default=sizes[0], key=lambda pair: pair[0])
    above = min((pair for pair in sizes if pair[0] > parameters), default=sizes[-1], key=lambda pair: pair[0])
    return _between(parameters, below[1].shape, above[1].shape, near[1].shape)


def _between(parameters: int, low: ModelShape, high: ModelShape, near: ModelShape) -> ModelShape:
    """Width and depth between two shapes (or scaled from one beyond the ends), and an MLP that makes the number right."""
    if low is high:
        # Beyond the table: width and depth both grow with the cube root.
        scale = (parameters / near.parameters) ** (1 / 3)
        hidden, layers = near.hidden * scale, near.layers * scale
        how = f"scaled from {near.name}"
    else:
        share = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
        hidden = low.hidden * (high.hidden / low.hidden) ** share
        layers = low.layers * (high.layers / low.layers) ** share
        how = f"interpolated between {low.name} and {high.name}"
    step = 256 if hidden >= 1024 else 64
    width = max(step, round(hidden / step) * step)
    kv_heads = min(near.kv_heads, max(1, width // near.head_dim))
    heads = max(1, round(width / near.head_dim / kv_heads)) * kv_heads
    # In the smallest models the vocabulary of the larger ones would leave nothing for the blocks.
    vocab = min(near.vocab, max(256, round(0.4 * parameters / width / 64) * 64))
    made = replace(
        near, name=f"about {parameters / 1e9:.3g} B", hidden=width, layers=max(1, round(layers)), heads=heads, kv_heads=kv_heads,
        intermediate=step, vocab=vocab, source=f"{how}; the MLP makes up the rest",
    )  # fmt: skip
    wanted = (parameters - made.parameters) / (made.layers * 3 * width) + step
    return replace(made, intermediate=max(step, round(wanted / step) * step))
