"""Bytes of the cache of keys and values, by engine.

    sum over layers of  batch x tokens(layer) x row(layer)

row: ``2 x kv_heads x head_dim`` numbers with grouped-query attention (arXiv:2305.13245), ``kv_rank + rope_dim`` with latent attention
(arXiv:2405.04434, section 2.1.2), in the cache's number format. tokens: the context, or what a layer with a sliding window keeps:

* transformers (``cache_utils.py``): ``window - 1`` in a DynamicCache, ``min(window, length)`` in a StaticCache;
* llama.cpp (``llama-kv-cache-iswa.cpp``): contexts are rounded up to 256; windows to ``window + ubatch``, rounded likewise;
* vLLM: pages of 16 tokens; a windowed layer keeps ``window - 1`` tokens and one step's, in whole pages and one more.
"""

from __future__ import annotations

from typing import Literal, get_args

from bitwright.advise.decoder import ModelShape
from bitwright.errors import InputError

__all__ = [
    "UBATCH",
    "VLLM_STEP",
    "Engine",
    "Kv",
    "check_kv",
    "kv_cache_bytes",
    "kv_cache_note",
    "llamacpp_cells",
    "row_bytes",
]

Kv = Literal["fp32", "fp16", "bf16", "fp8", "int8", "q8_0", "q4_0"]
Engine = Literal["transformers", "llamacpp", "vllm"]

#: format -> bytes of a block, numbers in a block
_FORMATS: dict[str, tuple[int, int]] = {
    "fp32": (4, 1), "fp16": (2, 1), "bf16": (2, 1), "fp8": (1, 1), "int8": (1, 1), "q8_0": (34, 32), "q4_0": (18, 32),
}  # fmt: skip
#: engine -> formats of which its cache can be
_KNOWN: dict[str, tuple[str, ...]] = {
    "transformers": ("fp32", "fp16", "bf16", "fp8"),
    "llamacpp": ("fp32", "fp16", "bf16", "q8_0", "q4_0"),
    "vllm": ("fp32", "fp16", "bf16", "fp8", "int8"),
}
#: llama.cpp rounds caches up to this many tokens (``llama-context.cpp``)
_CELLS = 256
#: tokens of one step of llama.cpp, its default ``-ub``
UBATCH = 512
#: tokens of a page of vLLM on a GPU, and of one of its steps: the default of its server on GPUs under 70 GiB
PAGE, VLLM_STEP = 16, 2048


def kv_cache_bytes(
    shape: ModelShape, *, context: int, batch: int = 1, kv: str = "bf16", engine: str = "transformers", static: bool = False
) -> int:  # fmt: skip
    """Bytes of the cache that holds ``context`` tokens of each of ``batch`` sequences.

    static: transformers' StaticCache in place of its DynamicCache. InputError where the engine has no cache of this format.

    >>> from bitwright.advise.published import shape_for
    >>> kv_cache_bytes(shape_for(8_000_000_000), context=8192) // 2**20
    1024
    """
    check_kv(kv, engine)
    if context < 1 or batch < 1:
        raise InputError(f"context {context}, batch {batch}", mend="both must be at least 1")
    total = sum(
        batch * _tokens(shape.window(layer), context, batch, engine, static) * row_bytes(shape, layer, kv)
        for layer in range(shape.layers)
    )
    if shape.copies_kv and engine == "transformers":
        total *= shape.heads // shape.kv_heads
    # One float32 scale for the keys and one for the values of a layer.
    return total + (8 * shape.layers if kv in ("fp8", "int8") else 0)


def check_kv(kv: str, engine: str) -> None:
    """InputError where the engine is unknown, or its cache cannot be in this format."""
    if engine not in get_args(Engine):
        raise InputError(f"engine '{engine}' is unknown", mend=f"use one of: {', '.join(get_args(Engine))}")
    if kv not in _FORMATS:
        raise InputError(f"KV cache format '{kv}' is unknown", mend=f"use one of: {', '.join(_FORMATS)}")
    if kv not in _KNOWN[engine]:
        raise InputError(f"{engine} has no {kv} KV cache", mend=f"it has {', '.join(_KNOWN[engine])}")


def row_bytes(shape: ModelShape, layer: int, kv: str) -> int:
    """Bytes of one token in one layer. InputError where blocks of the format do not divide a row.

    Keys and values are rows of their own; latent attention has one row.
    """
    size, values = _FORMATS[kv]
    elements = shape.kv_elements(layer)
    rows = 1 if shape.latent is not None else 2
    if (elements // rows) % values:
        raise InputError(
            f"a row of {elements // rows} numbers does not divide into blocks of {values}",
            mend="use an fp16 cache for this model",
        )
    return elements // values * size


def kv_cache_note(shape: ModelShape, *, context: int, engine: str) -> str:
    """What was assumed of the cache, in a sentence."""
    if shape.latent is not None:
        return f"latent attention: {shape.kv_elements(0)} numbers for each token and layer, in place of keys and values"
    near = sum(1 for window in shape.windows if window is not None and window < context)
    each = (
        f"{shape.kv_heads} of {shape.heads} heads are cached"
        if shape.kv_heads < shape.heads
        else "every head is cached"
    )
    if not near:
        return f"KV cache: {each}, {context} tokens in all {shape.layers} layers"
    width = min(window for window in shape.windows if window is not None)
    return f"KV cache: {each}; {near} of {shape.layers} layers keep a window of {width} tokens, as {engine} does"


def llamacpp_cells(window: int | None, context: int) -> int:
    """Tokens for which llama.cpp's cache of a layer has room.

    >>> llamacpp_cells(None, 1000), llamacpp_cells(512, 8192)
    (1024, 1024)
    """
    whole = _up(context, _CELLS)
    return whole if window is None else min(whole, _up(window + UBATCH, _CELLS))


def _tokens(window: int | None, context: int, batch: int, engine: str, static: bool) -> int:
    """Tokens that a layer keeps of each sequence."""
    if engine == "llamacpp":
        return llamacpp_cells(window, context)
    if engine == "vllm":
        whole = _up(context, PAGE)
        if window is None:
            return whole
        step = max(1, VLLM_STEP // batch)
        return min(whole, _up(window - 1 + step, PAGE) + PAGE)
    if window is None:
        return context
    return min(context, window if static else max(1, window - 1))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
