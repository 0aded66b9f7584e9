"""Bits under a budget against uniform recipes of the same size: mean KL divergence from the original on text that calibration never saw.

Every uniform recipe is quantized and measured; then the same bytes of its quantized layers are given as a budget, and the recipe that comes
out is quantized with the same method and measured alike. For GGUF the uniform recipes are llama.cpp's mixtures, budgets their file sizes.

    python benchmarks/budget.py --model examples/storylm-8m --calibration own.txt --text heldout.txt --out benchmarks/results/budget.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import bitwright
from machine import machine

#: bits and group sizes of uniform recipes, with the bits per weight that 16-bit scales make of them
UNIFORM = ((2, 16), (3, 128), (3, 32), (4, 128), (4, 64))
MIXTURES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")


def quality(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = bitwright.evaluate(path, against=options.model, text=options.text, windows=options.windows).quality
    return {
        "kl_mean": found.kl.mean, "kl_error": found.kl.error, "kl_99": found.kl.p99, "perplexity": found.model.perplexity,
        "perplexity_original": found.source.perplexity, "top1": found.top1,
    }  # fmt: skip


def integers(options: argparse.Namespace, folder: Path, calibration: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for bits, group_size in UNIFORM:
        common = {"layout": "native", "method": options.method, "calibration": calibration}
        out = folder / "model"
        uniform = bitwright.quantize(
            options.model, out, **common, bits=bits, group_size=group_size, overwrite=True, resume="never"
        ).plan
        size = uniform.quantized_bits_per_weight
        line = {"uniform": f"{bits} bits, groups of {group_size}", "bits_per_weight": size, **quality(out, options)}
        lines.append({**line, "kind": "uniform", "file_bytes": uniform.weight_file_bytes})
        for sensitivity in options.sensitivity:
            began = time.perf_counter()
            budget = {"bits_per_weight": size, "sensitivity": sensitivity}
            made = bitwright.allocate(options.model, **common, budget=budget)
            seconds = time.perf_counter() - began
            plan = bitwright.quantize(options.model, out, recipe=made.recipe, overwrite=True, resume="never").plan
            found = quality(out, options)
            chosen: dict[str, int] = {}
            for option in made.point.chosen.values():
                chosen[option.label] = chosen.get(option.label, 0) + 1
            lines.append(
                {
                    "kind": "budget", "sensitivity": sensitivity, "budget_of": line["uniform"], "seconds": seconds,
                    "bits_per_weight": plan.quantized_bits_per_weight, "file_bytes": plan.weight_file_bytes,
                    "predicted": made.point.loss, **found, "ratio": found["kl_mean"] / line["kl_mean"], "chosen": chosen,
                }
            )  # fmt: skip
            print(json.dumps(lines[-1]), flush=True)
    return lines


def gguf(options: argparse.Namespace, folder: Path, calibration: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    imatrix = str(folder / "imatrix.gguf")
    bitwright.collect_imatrix(
        options.model, imatrix, text=options.calibration, samples=options.samples, length=options.length
    )
    for mixture in MIXTURES:
        for method in ("rtn", "gptq"):
            out = folder / f"{mixture}-{method}.gguf"
            common = {"method": method, "calibration": calibration}
            choice = {"type": mixture, "imatrix": imatrix}
            size = bitwright.to_gguf(options.model, out, gguf=choice, **common, overwrite=True).plan.file_bytes
            line = {
                "kind": "mixture",
                "mixture": mixture,
                "method": method,
                "file_bytes": size,
                **quality(out, options),
            }
            lines.append(line)
            made = bitwright.allocate(
                options.model, layout="gguf", gguf={"imatrix": imatrix}, **common, budget={"bytes": size}
            )
            plan = bitwright.to_gguf(options.model, out, recipe=made.recipe, overwrite=True).plan
            found = quality(out, options)
            lines.append(
                {
                    "kind": "budget", "budget_of": mixture, "method": method, "file_bytes": plan.file_bytes,
                    "predicted": made.point.loss, **found, "ratio": found["kl_mean"] / line["kl_mean"],
                    "chosen": {name: option.label for name, option in made.point.chosen.items()},
                }
            )  # fmt: skip
            print(json.dumps({key: value for key, value in lines[-1].items() if key != "chosen"}), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--sensitivity", nargs="+", default=["full", "blocks", "gram"])
    parser.add_argument("--kinds", nargs="+", default=["integers", "gguf"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    calibration = {
        "text": str(options.calibration),
        "samples": options.samples,
        "length": options.length,
        "shuffle": False,
    }
    settings = {key: getattr(options, key) for key in ("method", "samples", "length", "windows")}
    settings |= {
        "model": options.model.name,
        "calibration": options.calibration.name,
        "text": options.text.name,
        "seed": 0,
    }
    report: dict[str, Any] = {"machine": machine(), "settings": settings}
    with tempfile.TemporaryDirectory() as name:
        for kind, run in (("integers", integers), ("gguf", gguf)):
            if kind in options.kinds:
                report[kind] = run(options, Path(name), calibration)
                options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
