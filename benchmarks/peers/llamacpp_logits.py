"""Runs in llama.cpp's environment: teacher forcing through llama.cpp itself, several files side by side.

    python llamacpp_logits.py TOKENS.npy OUT.json BASE.gguf OTHER.gguf ... [--threads N]

TOKENS.npy: int32 (windows, length). Each window is one batch with a fresh float32 KV cache and no flash attention. Mean KL divergence
from the first file and perplexity over the second half of every window, which is llama-perplexity's convention.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def _quiet(_level: int, _text: bytes, _data: object) -> None:
    return


class Model:
    """One loaded file."""

    def __init__(self, path: str, length: int, threads: int) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = (
            False  # repacked weights compute other sums; and its AMX code crashes on some virtual machines
        )
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = length
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = 0
        context.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """(length, vocabulary) float64 of one window."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode")
        pointer = llama_cpp.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(pointer, shape=(len(tokens), self.vocabulary)).astype(np.float64)
        llama_cpp.llama_batch_free(batch)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    windows = np.load(options.tokens)
    length = windows.shape[1]
    models = [Model(path, length, options.threads) for path in options.files]
    divergence, loss, count = np.zeros(len(models)), np.zeros(len(models)), 0
    first = length // 2
    for window in windows:
        base: Any = None
        for i, model in enumerate(models):
            found = model.log_probabilities(window)[first : length - 1]
            base = found if base is None else base
            loss[i] -= found[np.arange(len(found)), window[first + 1 :]].sum()
            divergence[i] += (np.exp(base) * (base - found)).sum()
        count += length - 1 - first
    result = {
        "tokens": count,
        "files": [
            {"file": Path(path).name, "kl_mean": float(kl / count), "perplexity": math.exp(nll / count)}
            for path, kl, nll in zip(options.files, divergence, loss, strict=True)
        ],
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
