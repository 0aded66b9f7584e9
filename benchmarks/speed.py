"""Speed of one model in several layouts and engines on this machine, by ``bitwright bench``, as ratios to the original in transformers.

Every variant is measured in turns with the others (``--rounds``), each time in a process of its own, and the median over the rounds of each
figure counts; the load of the machine before each measurement stands beside it.

    python benchmarks/speed.py --model storylm-8m=/data/storylm-8m --random llama-0.25b --tokenizer /data/storylm-8m --scratch /data \\
        --out benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitwright.evaluation.record import Speed
from bitwright.runtime.bench import BenchOptions, bench
from machine import machine
from random_model import write_random

#: variant -> options of ``bitwright quantize`` (None: the original), dtype of activations
VARIANTS: dict[str, tuple[list[str] | None, str | None]] = {
    "bfloat16": (None, None),
    "float32": (None, "float32"),
    "int4 g128, compressed-tensors": (["--method", "rtn", "--layout", "compressed-tensors"], None),
    "int8 per channel, compressed-tensors": (["--method", "rtn", "--bits", "8", "--group-size", "channel"], None),
    "w8a8, compressed-tensors": (
        ["--method", "rtn", "--bits", "8", "--group-size", "channel", "--inputs", "int8-token"],
        None,
    ),
    "int4 g128 with zero points, awq": (["--method", "rtn", "--asymmetric", "--layout", "awq"], None),
    "nf4, bitsandbytes": (["--recipe", "nf4"], None),
    "BF16, GGUF": (["--layout", "gguf", "--type", "BF16"], None),
    "Q8_0, GGUF": (["--layout", "gguf", "--type", "Q8_0"], None),
    "Q4_K_M, GGUF": (["--layout", "gguf", "--type", "Q4_K_M"], None),
}
FIGURES = (
    "time_to_first_token_ms", "prompt_tokens_per_s", "new_tokens_per_s", "inter_token_p50_ms", "inter_token_p99_ms",
    "peak_resident_bytes",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--random", action="append", default=[], metavar="NAME", help="a model of random_model.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--vllm-python", type=Path, default=None)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked: dict[str, Any] = {
        "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "batch": tuple(options.batch or (1,)),
        "repetitions": options.repetitions, "warmup": 1, "device": "cpu", "threads": options.threads, "vllm_python": options.vllm_python,
    }  # fmt: skip
    results = []
    for text in options.model + options.random:
        name, _, folder = text.partition("=")
        scratch = options.scratch / f"speed-{name}"
        scratch.mkdir(parents=True)
        source = Path(folder) if folder else write_random(name, scratch / "model", options.tokenizer)
        results.append({"model": name, "variants": measure(source, scratch, asked, options.rounds)})
        shutil.rmtree(scratch)
    asked.pop("vllm_python")
    found = {"machine": machine(), "options": asked, "rounds": options.rounds, "results": results}
    options.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(source: Path, scratch: Path, asked: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """All variants of one model, turn by turn."""
    made: dict[str, Path] = {}
    for name, (flags, _) in VARIANTS.items():
        if flags is None:
            made[name] = source
            continue
        made[name] = scratch / (
            "out-" + "".join(c if c.isalnum() else "-" for c in name) + (".gguf" if "gguf" in flags else "")
        )
        command = [sys.executable, "-m", "bitwright", "quantize", str(source), "-o", str(made[name]), *flags]
        subprocess.run(command, check=True, capture_output=True)
    seen: dict[tuple[str, str, int], list[tuple[Speed, float]]] = {}
    for _ in range(rounds):
        for name, path in made.items():
            load = os.getloadavg()[0]
            for speed in bench(path, BenchOptions(**asked, dtype=VARIANTS[name][1]), name=name):
                seen.setdefault((name, speed.engine, speed.batch), []).append((speed, load))
    lines = [line(key, runs) for key, runs in seen.items()]
    for one in lines:
        base = next(
            x for x in lines if (x["variant"], x["engine"], x["batch"]) == ("bfloat16", "transformers", one["batch"])
        )
        if one["new_tokens_per_s"] and base["new_tokens_per_s"]:
            one["ratio"] = {figure: one[figure] / base[figure] for figure in FIGURES}
        print(
            json.dumps({k: one[k] for k in ("variant", "engine", "batch", "new_tokens_per_s", "prompt_tokens_per_s")}),
            flush=True,
        )
    return lines


def line(key: tuple[str, str, int], runs: list[tuple[Speed, float]]) -> dict[str, Any]:
    """Medians over the rounds of one variant."""
    found: dict[str, Any] = {"variant": key[0], "engine": key[1], "batch": key[2], "note": runs[0][0].note}
    for figure in FIGURES:
        values = [asdict(speed)[figure] for speed, _ in runs if speed.note is None]
        plain = [value["median"] if isinstance(value, dict) else value for value in values]
        found[figure] = statistics.median(plain) if plain else None
        found[f"{figure}_rounds"] = plain
    return {**found, "load_before": [load for _, load in runs], "versions": runs[0][0].versions}


if __name__ == "__main__":
    main()
