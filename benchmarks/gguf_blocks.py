"""GGUF block types: our quantizers against ggml's own, one thread each, in one process.

ggml's is ``ggml_quantize_chunk`` of ``libggml-base.so``, which llama-quantize calls; llama-cpp-python builds it natively and carries it.
Both take turns, round after round, so that a noisy machine is noisy for both; quoted are medians over the rounds, the speed-up being the
median of the ratios within a round. Before that, bytes are compared on gaussian, heavy-tailed, sparse and badly scaled rows.

    python benchmarks/gguf_blocks.py --library PATH/libggml-base.so --out benchmarks/results/gguf_blocks.json
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from bitwright.blocks import codec
from bitwright.blocks.types import TYPES, named
from machine import machine

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
#: A turn of the slower one takes about as long.
TURN_SECONDS = 1.0


class Peer:
    """ggml's quantizers."""

    def __init__(self, library: Path) -> None:
        self.run = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self.run.restype = ctypes.c_size_t
        self.run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(self, x: Floats, name: str, weights: Floats | None) -> Bytes:
        block = named(name)
        out = np.zeros((x.shape[0], block.row_bytes(x.shape[1])), np.uint8)
        given = None if weights is None else weights.ctypes.data
        self.run(block.number, x.ctypes.data, out.ctypes.data, 0, x.shape[0], x.shape[1], given)
        return out


def hostile(columns: int) -> Floats:
    """Rows that are gaussian, heavy-tailed, sparse, badly scaled from group to group, of few values, one-sided, tiny, zero."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, columns))
    x[8:16] = rng.standard_t(1.5, (8, columns)).clip(-1e4, 1e4)
    x[16:24] *= rng.random((8, columns)) < 0.05
    x[24:32] *= np.repeat(10.0 ** rng.integers(-6, 4, (8, columns // 16)), 16, axis=1)
    x[32:40] = rng.integers(-4, 5, (8, columns)) * 0.5
    x[40:48] = -np.abs(x[40:48]) - 1
    x[48:56] *= 1e-12
    x[56:60] = 0
    return x.astype(np.float32)


def importance(columns: int, kind: str) -> Floats:
    rng = np.random.default_rng(2)
    values = rng.random(columns) + 0.1
    if kind == "hostile":
        values = np.exp(rng.standard_normal(columns) * 3) * (rng.random(columns) < 0.8)
    return values.astype(np.float32)


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def exists(name: str) -> bool:
    """True where this type's family can quantize it."""
    try:
        return name in importlib.import_module(f"bitwright.blocks.{codec._FAMILY[name]}").QUANTIZE
    except (KeyError, ImportError):
        return False


def measure(peer: Peer, name: str, weighted: bool, columns: int, most_rows: int, rounds: int) -> dict[str, Any]:
    given = importance(columns, "hostile") if weighted else None
    x = hostile(columns)
    compile_seconds = seconds(lambda: codec.quantize(x, name, given))
    same = bool((codec.quantize(x, name, given) == peer.quantize(x, name, given)).all())
    given = importance(columns, "plain") if weighted else None
    x = np.random.default_rng(0).standard_normal((64, columns)).astype(np.float32)
    rate = x.size / seconds(lambda: peer.quantize(x, name, given))
    rows = int(min(max(TURN_SECONDS * rate / columns, 64), most_rows))
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    same = same and bool((codec.quantize(x, name, given) == peer.quantize(x, name, given)).all())
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: codec.quantize(x, name, given)))
        theirs.append(seconds(lambda: peer.quantize(x, name, given)))
    return {
        "type": name,
        "weighted": weighted,
        "same_bytes": same,
        "rows": rows,
        "bitwright_mweights_per_s": round(x.size / statistics.median(ours) / 1e6, 1),
        "ggml_mweights_per_s": round(x.size / statistics.median(theirs) / 1e6, 1),
        "speedup": round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 2),
        "first_call_seconds": round(compile_seconds, 2),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="libggml-base.so")
    parser.add_argument("--types", nargs="*", help="default: every type there is a quantizer for")
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4096, help="at most; fewer for slow types")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    numba.set_num_threads(1)
    peer = Peer(args.library)
    found = []
    for name in args.types or [n for n in TYPES if TYPES[n].blocked and exists(n)]:
        for weighted in (True,) if named(name).wants_weights else (False, True):
            one = measure(peer, named(name).name, weighted, args.columns, args.rows, args.rounds)
            found.append(one)
            print(
                f"{one['type']:8} {'weighted' if weighted else '':9} {one['bitwright_mweights_per_s']:8.1f} against "
                f"{one['ggml_mweights_per_s']:7.1f} M weights/s: {one['speedup']:6.2f} x, "
                f"{'same bytes' if one['same_bytes'] else 'OTHER BYTES'}",
                flush=True,
            )
    if args.out is not None:
        result = {"machine": machine(), "columns": args.columns, "rounds": args.rounds, "threads": 1, "types": found}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if not all(one["same_bytes"] for one in found):
        raise SystemExit("some bytes differ from ggml's")


if __name__ == "__main__":
    main()
