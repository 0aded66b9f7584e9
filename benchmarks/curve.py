"""Quality against bits, from 8 down to 1.58: GPTQ on integers and on ternary weights, plain and after rotation.

Every point is a whole run of bitwright, measured with its own evaluator: mean KL divergence from the original and perplexity over the
first ``--windows`` windows of the text, in float32. ``stored_bits`` counts codes and parameters of the quantized layers; ``file_bytes``
is the whole checkpoint, in which rotation unties the output head from the embeddings.

    python benchmarks/curve.py --model examples/storylm-8m --calibration own.txt --text heldout.txt --out benchmarks/results/curve.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import bitwright
from machine import machine

#: Below this many bits points are measured after rotation too.
ROTATED_BELOW = 5
BITS = (8, 6, 5, 4, 3, 2)
TERNARY = 3


def points(group_sizes: list[int], seeds: int) -> list[dict[str, Any]]:
    """Recipe options of every point; rotation draws random signs, so it is measured under several seeds."""
    found: list[dict[str, Any]] = []
    schemes: list[dict[str, Any]] = [{"bits": bits} for bits in BITS]
    for scheme in [*schemes, {"scheme": "ternary"}]:
        for group_size in group_sizes:
            plain = {**scheme, "group_size": group_size, "transforms": []}
            found.append(plain)
            if scheme.get("bits", 0) < ROTATED_BELOW:
                found += [{**plain, "transforms": ["rotate"], "seed": seed} for seed in range(seeds)]
    return found


def measure(options: argparse.Namespace, point: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One line of the result."""
    calibration = {
        "text": str(options.calibration),
        "samples": options.samples,
        "length": options.length,
        "shuffle": False,
    }
    began = time.perf_counter()
    result = bitwright.quantize(
        options.model,
        folder,
        method="gptq",
        layout="native",
        calibration=calibration,
        overwrite=True,
        resume="never",
        **point,
    )
    seconds = time.perf_counter() - began
    found = bitwright.evaluate(folder, against=options.model, text=options.text, windows=options.windows)
    return {
        "scheme": point.get("scheme", "affine"),
        "code_bits": point.get("bits", math.log2(TERNARY)),
        "group_size": point["group_size"],
        "transforms": point["transforms"],
        "seed": point.get("seed", 0),
        "stored_bits": result.plan.quantized_bits_per_weight,
        "file_bytes": result.plan.weight_file_bytes,
        "kl": found.quality.kl.mean,
        "top1": found.quality.top1,
        "perplexity": found.perplexity.perplexity,
        "perplexity_float": found.quality.source.perplexity,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="calibration text")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--seeds", type=int, default=1, help="how many random rotations")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = {key: getattr(options, key) for key in ("samples", "length", "windows", "seeds")}
    settings |= {"model": options.model.name, "calibration": options.calibration.name, "text": options.text.name}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "results": []}
    with tempfile.TemporaryDirectory() as scratch:
        for point in points(options.group_size, options.seeds):
            report["results"].append(measure(options, point, Path(scratch) / "model"))
            print(json.dumps(report["results"][-1]), flush=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
