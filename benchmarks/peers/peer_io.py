"""What the peer scripts share: calibration windows, one layer's problem, the proxy loss and JSON output.

It imports only what every peer's environment has (torch, numpy, transformers), so that one file serves all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


def token_windows(tokenizer: Any, text_file: Path, *, count: int, length: int) -> list[list[int]]:
    """The first `count` consecutive, non-overlapping windows of `length` tokens; no special tokens are added."""
    tokens: list[int] = tokenizer(text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(tokens) < count * length:
        raise SystemExit(f"{text_file} holds {len(tokens)} tokens; {count} windows of {length} need {count * length}")
    return [tokens[start : start + length] for start in range(0, count * length, length)]


def quantize_arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line that the two whole-model quantizers have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the quantized model to")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128, help="input columns that share one scale")
    parser.add_argument("--samples", type=int, default=64, help="number of calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser


def layer_arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line that the two one-layer timers have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layer", type=Path, required=True, help=".npz or .pt with W, H and tokens (see make_layer.py)"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, after one warm-up run")
    parser.add_argument("--out", type=Path, help=".npy to write the dequantized weight to, (out, in) float32")
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser


def read_layer(path: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """W (out, in) float32, H (in, in) float32 = sum of x xᵀ over the tokens, and the number of tokens."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            weight, gram = torch.from_numpy(archive["W"]), torch.from_numpy(archive["H"])
            return weight.float(), gram.float(), int(archive["tokens"])
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return stored["W"].float(), stored["H"].float(), int(stored["tokens"])


def proxy_loss(weight: torch.Tensor, quantized: torch.Tensor, gram: torch.Tensor) -> float:
    """tr((W-Q) H (W-Q)ᵀ) in float64: the squared error of the layer's output, summed over the calibration tokens."""
    error = (weight - quantized).double()
    return float(((error @ gram.double()) * error).sum())


def time_layer(
    run: Callable[[], tuple[torch.Tensor, dict[str, float]]], *, repeats: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Warm up once, then time `repeats` runs.

    `run` times itself (it must leave the copying of its inputs out) and returns the dequantized weight and
    {part of the work: seconds}, of which "total" is the whole and "cpu" the processor time of all threads.
    """
    run()
    timings: list[dict[str, float]] = []
    for _ in range(repeats):
        quantized, seconds = run()
        timings.append(seconds)
    totals = [timing["total"] for timing in timings]
    return quantized, {
        "seconds": totals,
        "seconds_median": statistics.median(totals),
        "seconds_min": min(totals),
        "cpu_seconds_min": min(timing["cpu"] for timing in timings),
        "seconds_parts": timings,
    }


def report_layer(
    arguments: argparse.Namespace,
    *,
    peer: str,
    packages: list[str],
    settings: dict[str, Any],
    weight: torch.Tensor,
    gram: torch.Tensor,
    tokens: int,
    quantized: torch.Tensor,
    timing: dict[str, Any],
) -> None:
    """Write the dequantized weight and print the report of one timed layer."""
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        np.save(arguments.out, quantized.float().numpy())
    loss = proxy_loss(weight, quantized.float(), gram)
    energy = proxy_loss(weight, torch.zeros_like(weight), gram)
    emit(
        {
            "peer": peer,
            "versions": versions(packages),
            "settings": settings,
            "shape": list(weight.shape),
            "tokens": tokens,
            "bits": arguments.bits,
            "group_size": arguments.group_size,
            "threads": arguments.threads,
            "load_average": os.getloadavg()[0],  # above `threads`: others had the cores too, and wall time misleads
            "proxy_loss": loss,
            "proxy_loss_relative": loss / energy,
            **timing,
        },
        arguments.json,
    )


def versions(packages: list[str]) -> dict[str, str]:
    """Installed versions, by distribution name."""
    return {package: metadata.version(package) for package in packages}


def emit(report: dict[str, Any], path: Path | None) -> None:
    """Print the report as one line of JSON, the last on standard output, and write it to `path` where one is given."""
    report = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **report}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.flush()
    print(json.dumps(report), flush=True)
