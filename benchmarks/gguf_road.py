"""From a checkpoint folder to a Q4_K_M file: bitwright in one step, and llama.cpp's converter and quantizer one after the other.

Wall time, processor time and peak resident memory of every process, in turn, several rounds. The two files must hold the same bytes.

    python benchmarks/synthetic.py SYNTHETIC --tokenizer examples/storylm-8m
    python benchmarks/gguf_road.py --model SYNTHETIC --python .venvs/llamacpp/bin/python --llamacpp LLAMA_CPP_SOURCE \
        --out benchmarks/results/gguf_road.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitwright.gguf.mixture import MIXTURES
from gguf_quality import PEERS, different
from machine import machine


def timed(command: list[Any], environment: dict[str, str] | None = None) -> dict[str, float]:
    """One process: seconds, processor seconds, peak resident bytes."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[1]} failed with status {status}")
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": float(usage.ru_maxrss * 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of llama.cpp's environment")
    parser.add_argument("--llamacpp", type=Path, required=True, help="llama.cpp's source folder, for its converter")
    parser.add_argument(
        "--pre", default="gpt-2", help="the model's pre-tokenizer, where the converter does not know it"
    )
    parser.add_argument("--middle", default="f16", help="what the converter writes: f16, bf16 or f32")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    rounds: dict[str, list[dict[str, float]]] = {"bitwright": [], "convert_hf_to_gguf": [], "llama-quantize": []}
    with tempfile.TemporaryDirectory(dir=options.model.parent) as name:
        folder = Path(name)
        ours, middle, theirs = (folder / f"{part}.gguf" for part in ("ours", "f16", "theirs"))
        for number in range(options.rounds):
            for path in (ours, middle, theirs):
                path.unlink(missing_ok=True)
            command = [sys.executable, "-m", "bitwright", "quantize", options.model, "-o", ours, "--type", options.type]
            rounds["bitwright"].append(timed(command, threads))
            command = [sys.executable, PEERS / "llamacpp_convert.py", options.llamacpp, options.pre, options.model]
            command += ["--outfile", middle, "--outtype", options.middle]
            rounds["convert_hf_to_gguf"].append(timed(command, threads))
            command = [options.python, PEERS / "llamacpp_quantize.py", middle, theirs, MIXTURES[options.type].number]
            rounds["llama-quantize"].append(timed([*command, "--threads", options.threads]))
            print(number, {key: round(found[-1]["seconds"], 1) for key, found in rounds.items()}, flush=True)
        differing = different(ours, theirs)
        sizes = {path.name: path.stat().st_size for path in (ours, middle, theirs)}
    median = {key: statistics.median(line["seconds"] for line in found) for key, found in rounds.items()}
    peak = {key: max(line["peak_bytes"] for line in found) for key, found in rounds.items()}
    report = {
        "machine": machine(), "peer": "llama-cpp-python 0.3.36",
        "settings": {"model": options.model.name, "type": options.type, "threads": options.threads, "rounds": options.rounds},
        "median_seconds": median,
        "ratio": (median["convert_hf_to_gguf"] + median["llama-quantize"]) / median["bitwright"],
        "peak_bytes": peak, "different_tensors": differing, "file_bytes": sizes, "rounds": rounds,
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(
        json.dumps(
            {key: report[key] for key in ("median_seconds", "ratio", "peak_bytes", "different_tensors")}, indent=2
        )
    )


if __name__ == "__main__":
    main()
