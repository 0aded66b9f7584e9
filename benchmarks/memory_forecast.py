"""Peak memory of serving, forecast by ``bitwright memory`` and measured, for random models of several shapes.

Each measurement is a process of its own (``memory_forecast_run.py``): its peak of resident memory while it reads a prompt and answers,
less what it had just before loading. The forecast that it is compared with leaves the same out (its constant for the process). What glibc's
heap keeps differs from process to process; each is measured several times, and the median counts.

    python benchmarks/memory_forecast.py --tokenizer examples/storylm-8m --scratch /data --out benchmarks/results/memory_forecast.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bitwright.advise.activations import PROCESS_BYTES
from bitwright.advise.memory import forecast_serving
from bitwright.advise.stored import stored_weights
from machine import machine
from random_model import write_random

HERE = Path(__file__).parent
REPEATS = 3
#: recipe -> options of ``bitwright quantize``; dense: the checkpoint itself
RECIPES = {
    "dense": None,
    "int4": ["--method", "rtn", "--bits", "4", "--group-size", "128", "--layout", "compressed-tensors"],
    "nf4": ["--recipe", "nf4"],
    "Q4_K_M": ["--layout", "gguf", "--type", "Q4_K_M"],
    "Q8_0": ["--layout", "gguf", "--type", "Q8_0"],
}
#: model, recipe, context, batch
RUNS = (
    ("llama-0.25b", "dense", 2048, 1), ("llama-0.25b", "int4", 2048, 1), ("llama-0.25b", "int4", 512, 4),
    ("llama-0.25b", "Q4_K_M", 2048, 1), ("llama-0.25b", "Q8_0", 1024, 4),
    ("gemma3-0.27b", "dense", 2048, 1), ("gemma3-0.27b", "int4", 2048, 1), ("gemma3-0.27b", "Q4_K_M", 4096, 1),
    ("qwen3-0.6b", "dense", 1024, 1), ("qwen3-0.6b", "nf4", 512, 1), ("qwen3-0.6b", "Q4_K_M", 2048, 1),
    ("llama-1.1b", "dense", 1024, 1), ("llama-1.1b", "int4", 1024, 1), ("llama-1.1b", "Q4_K_M", 2048, 1),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", help="MODEL/RECIPE; repeatable. Others stay as --out has them.")
    options = parser.parse_args()
    runs = [run for run in RUNS if not options.only or f"{run[0]}/{run[1]}" in options.only]
    results: list[dict[str, Any]] = []
    for name in dict.fromkeys(run[0] for run in runs):
        folder = options.scratch / name
        write_random(name, folder, options.tokenizer)
        for recipe in dict.fromkeys(run[1] for run in runs if run[0] == name):
            model = make(folder, recipe)
            for _, _, context, batch in (run for run in runs if run[:2] == (name, recipe)):
                line = {"model": name, "recipe": recipe, **one(model, context, batch)}
                print(json.dumps({key: line[key] for key in line if key != "parts"}), flush=True)
                results.append(line)
            if recipe != "dense":
                shutil.rmtree(model) if model.is_dir() else model.unlink()
        shutil.rmtree(folder)
    if options.only and options.out.is_file():
        before = json.loads(options.out.read_text())["results"]
        results += [line for line in before if f"{line['model']}/{line['recipe']}" not in options.only]
    order = [run[:2] for run in RUNS]
    results.sort(key=lambda line: (order.index((line["model"], line["recipe"])), line["batch"]))
    worst = max(abs(line["error"]) for line in results)
    found = {"machine": machine(), "threads": 1, "repeats": REPEATS, "largest_error": worst, "results": results}
    options.out.write_text(json.dumps(found, indent=2) + "\n")


def make(folder: Path, recipe: str) -> Path:
    """The quantized checkpoint beside ``folder``."""
    options = RECIPES[recipe]
    if options is None:
        return folder
    output = folder.with_name(f"{folder.name}-{recipe}" + (".gguf" if "gguf" in options else ""))
    command = [sys.executable, "-m", "bitwright", "quantize", str(folder), "-o", str(output), *options]
    subprocess.run(command, check=True, capture_output=True)
    return output


def one(model: Path, context: int, batch: int) -> dict[str, Any]:
    """Forecast and measurement of one model at one context."""
    engine = "llamacpp" if model.suffix == ".gguf" else "transformers"
    known = stored_weights(model)
    kv = "fp16" if engine == "llamacpp" else "bf16"
    expected = forecast_serving(
        known.shape, weight_bytes=known.weights, context=context, batch=batch, kv=kv, engine=engine, dtype=known.dtype
    )
    command = [sys.executable, str(HERE / "memory_forecast_run.py"), str(model), "--engine", engine]
    command += ["--context", str(context), "--batch", str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    runs = []
    for _ in range(REPEATS):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    runs.sort(key=lambda run: run["peak_bytes"])
    measured = runs[len(runs) // 2]
    wanted = expected.total_bytes - PROCESS_BYTES[engine]
    return {
        "engine": engine, "context": context, "batch": batch, "parameters": known.shape.parameters, "weight_bytes": known.weights.total,
        "forecast_bytes": wanted, "measured_bytes": measured["peak_bytes"], "error": wanted / measured["peak_bytes"] - 1,
        "all_measured_bytes": [run["peak_bytes"] for run in runs], "process_bytes": measured["process_bytes"],
        "load_peak_bytes": [run["load_peak_bytes"] for run in runs],
        "kernels": measured.get("kernels"), "parts": dict(expected.parts),
    }  # fmt: skip


if __name__ == "__main__":
    main()
