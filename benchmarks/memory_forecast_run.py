"""Load one model in this process, read a prompt, generate, and print by how much resident memory rose at most, as JSON.

Started as a child by ``memory_forecast.py``; Linux only (reads /proc/self/status, resets the peak through /proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Let VmHWM begin anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def in_transformers(options: argparse.Namespace) -> dict[str, Any]:
    """Through ``bitwright.load`` and transformers' own generate."""
    import torch
    import transformers
    from transformers import AutoConfig, GenerationConfig

    import bitwright.api
    import bitwright.kernels.numba_feedback
    import bitwright.layouts.compressed_tensors
    from bitwright.io.heap import release_free_memory

    config = AutoConfig.from_pretrained(options.model)
    # The model's code is a library too.
    getattr(transformers, config.architectures[0])
    ids = torch.randint(16, config.get_text_config().vocab_size, (options.batch, options.context - options.new_tokens))
    reset_peak()
    before = status("VmRSS")
    model = bitwright.api.load(options.model, dtype=getattr(torch, options.dtype))
    loaded, load_peak = status("VmRSS") - before, status("VmHWM") - before
    kernels: dict[str, int] = {}
    for module in model.modules():
        name = getattr(module, "kernel", None)
        if name is not None:
            kernels[name] = kernels.get(name, 0) + 1
    # What loading left in the heap depends on the order of a set's elements, and differs from process to process.
    release_free_memory()
    reset_peak()
    settings = GenerationConfig(
        do_sample=False, min_new_tokens=options.new_tokens, max_new_tokens=options.new_tokens, pad_token_id=0
    )
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    peak = status("VmHWM") - before
    return {
        "peak_bytes": peak, "loaded_bytes": loaded, "load_peak_bytes": load_peak, "process_bytes": before, "kernels": kernels,
        "generated": int(out.shape[1]) - int(ids.shape[1]),
    }  # fmt: skip


def in_llamacpp(options: argparse.Namespace) -> dict[str, Any]:
    """Through llama.cpp in this process, one slot for every sequence."""
    import threading

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_ctx = options.context * options.batch
    params.n_parallel = options.batch
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    reset_peak()
    before = status("VmRSS")
    server = xllamacpp.Server(params)
    load_peak = status("VmHWM") - before
    length = options.context - options.new_tokens
    done: list[Any] = []

    def ask(seed: int) -> None:
        ids = [16 + (31 * i + 7 * seed) % 1000 for i in range(length)]
        request = {"prompt": ids, "max_tokens": options.new_tokens, "temperature": 0, "ignore_eos": True}
        done.append(server.handle_completions(request))

    workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(options.batch)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    peak = status("VmHWM") - before
    return {
        "peak_bytes": peak, "load_peak_bytes": load_peak, "process_bytes": before,
        "generated": [one["usage"]["completion_tokens"] for one in done],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--engine", choices=("transformers", "llamacpp"), default="transformers")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    began = time.perf_counter()
    found = in_transformers(options) if options.engine == "transformers" else in_llamacpp(options)
    print(json.dumps({**found, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
