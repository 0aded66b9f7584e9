"""NF4 and FP4 quantization of one weight against bitsandbytes' CPU quantizer, and against a plain copy of the same bytes.

All contenders take turns in one process, round after round, so that a noisy machine is noisy for all; quoted are medians over the rounds of
the ratios within a round. Both quantizers end with packed bytes and magnitudes: bitwright's time is that of the kernel and of the layout's
packing. ``kernel`` is the kernel alone, one byte per code; its memory traffic (4 bytes read and 1 written per weight, and the magnitudes)
is compared with a copy that reads and writes as many bytes in all.

    python benchmarks/codebook.py --out benchmarks/results/codebook.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes.functional as peer
import numba
import torch

from bitwright.core.linalg import one_thread
from bitwright.core.quantized import QuantizedTensor
from bitwright.kernels.numba_encode import encode
from bitwright.layouts.bitsandbytes import Bitsandbytes
from bitwright.schemes.codebook import Codebook
from machine import machine

LAYOUT = Bitsandbytes()


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def contenders(w: torch.Tensor, scheme: Codebook) -> dict[str, Callable[[], Any]]:
    """Each one quantizes ``w``, or copies the bytes that the kernel moves."""
    shape = (w.shape[0], w.shape[1])
    moved = 5 * w.numel() + 4 * w.numel() // scheme.block_size
    source, target = (torch.ones(moved // 2, dtype=torch.uint8) for _ in range(2))

    def ours() -> dict[str, torch.Tensor]:
        found = encode(w, scheme, None, None)
        assert found is not None
        return LAYOUT.pack("w", QuantizedTensor(scheme, shape, found[1], found[0]))

    return {
        "bitwright": ours,
        "kernel": lambda: encode(w, scheme, None, None),
        "bitsandbytes": lambda: peer.quantize_4bit(
            w, blocksize=scheme.block_size, quant_type=scheme.book, compress_statistics=scheme.double_quant
        ),
        "copy": lambda: target.copy_(source),
    }


def same(runs: dict[str, Callable[[], Any]]) -> bool:
    """Whether both quantizers give the same packed bytes and magnitudes, with one thread: bitsandbytes' mean of the magnitudes, the offset
    of double quantization, depends on the number of threads.
    """
    stored = runs["bitwright"]()
    with one_thread():
        packed, state = runs["bitsandbytes"]()
    return torch.equal(stored["w.weight"], packed) and torch.equal(stored["w.weight.absmax"], state.absmax.view(-1))


def measure(w: torch.Tensor, scheme: Codebook, rounds: int) -> dict[str, Any]:
    runs = contenders(w, scheme)
    identical = same(runs)  # the first call also compiles
    times: dict[str, list[float]] = {name: [] for name in runs}
    loads = []
    for _ in range(rounds):
        loads.append(os.getloadavg()[0])
        for name, run in runs.items():
            times[name].append(seconds(run))

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    weights = w.numel()
    return {
        "scheme": scheme.describe(),
        "shape": list(w.shape),
        "identical_output": identical,
        "million_weights_per_second": {name: weights / statistics.median(t) / 1e6 for name, t in times.items()},
        "best_million_weights_per_second": {name: weights / min(t) / 1e6 for name, t in times.items()},
        "speed_over_bitsandbytes": ratio("bitsandbytes", "bitwright"),
        "share_of_copy_bandwidth": ratio("copy", "kernel"),
        "best_share_of_copy_bandwidth": min(times["copy"]) / min(times["kernel"]),
        "seconds": times,
        "load_average": [min(loads), max(loads)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    w = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)) * 0.02
    schemes = [Codebook(book=book, double_quant=double) for book in ("nf4", "fp4") for double in (False, True)]
    results = []
    for scheme in schemes:
        found = measure(w, scheme, options.rounds)
        print(json.dumps({key: value for key, value in found.items() if key != "seconds"}))
        results.append(found)
    about = {
        "machine": machine(),
        "bitsandbytes": version("bitsandbytes"),
        "threads": options.threads,
        "results": results,
    }
    options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
