"""SpQR against GPTQ at the same honest size: mean KL divergence from the dense model over the bits that lie on the disk.

Every row is one whole run of ``bitwright.quantize`` into the native layout followed by ``bitwright.evaluate``. Bits per weight are
measured: all tensors of the quantized linears (codes, parameters of both levels, outliers with their columns and row starts), without
the 16 bytes that name a weight's shape, over the number of weights.

    python benchmarks/spqr.py --model MODEL --calibration selfgen.txt --text heldout.txt --out benchmarks/results/spqr.json

Rows that the JSON file holds already are not run again. Seconds mean little where the machine was busy with other work.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import bitwright
from machine import machine

AFFINE = {"scheme": "affine", "bits": 3, "scale_dtype": "float16"}


def bilevel(group: int, rows: int, outliers: float, *, bits: int = 3, codes: int = 3) -> dict[str, Any]:
    """Fields of a recipe. rows: rows that share a second level; codes: bits of a scale's and of a zero point's code."""
    options = {"super_group": rows, "scale_bits": codes, "zero_bits": codes, "outliers": outliers}
    method = "spqr" if outliers else "gptq"
    return {"method": method, "scheme": "bilevel", "bits": bits, "group_size": group, "scheme_options": options}


#: name -> fields of the recipe
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gptq int3 sym g32": {"method": "gptq", **AFFINE, "group_size": 32, "symmetric": True},
    "gptq int3 asym g64": {"method": "gptq", **AFFINE, "group_size": 64, "symmetric": False},
    "gptq bilevel g16x64": bilevel(16, 64, 0.0),
    "gptq bilevel g16x32": bilevel(16, 32, 0.0),
    "spqr g32x32, 0.45 %": bilevel(32, 32, 0.45),
    "spqr g32x64, 0.54 %": bilevel(32, 64, 0.54),
    "spqr g64x16, 0.75 %": bilevel(64, 16, 0.75),
    "spqr g16x64, 2-bit scales, 0.25 %": bilevel(16, 64, 0.25, codes=2),
    "spqr int2 g16x64, 3 %": bilevel(16, 64, 3.0, bits=2),
    "spqr g16x16, 1 % (the paper's)": bilevel(16, 16, 1.0),
}


def bits_per_weight(folder: Path) -> float:
    """Stored bits of all quantized linears, without shapes, over their weights."""
    bits = weights = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as stored:
            names = list(stored.keys())
            linears = {name.removesuffix(".weight.shape") for name in names if name.endswith(".weight.shape")}
            for name in names:
                if name.partition(".weight.")[0] not in linears:
                    continue
                tensor = stored.get_tensor(name)
                if name.endswith(".weight.shape"):
                    weights += math.prod(tensor.tolist())
                else:
                    bits += 8 * tensor.nbytes
    return bits / weights


def run(configuration: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Quantize once; measured bits, mean KL by text, and seconds."""
    calibration = {
        "text": str(options.calibration), "samples": options.samples, "length": options.length, "shuffle": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "model"
        began = time.perf_counter()
        bitwright.quantize(
            options.model, output, resume="never", layout="native", compute_dtype="float32", calibration=calibration,
            **configuration,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        divergences = {}
        for text in options.text:
            found = bitwright.evaluate(
                output, text=text, against=options.model, length=options.length, windows=options.windows
            )
            divergences[text.name] = found.quality.kl.mean
        return {"bits_per_weight": bits_per_weight(output), "kl": divergences, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="evaluation texts, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, and to continue")
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), help="these configurations (default: all)")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows, the first of the text")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows, the first of the text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    settings = {key: getattr(options, key) for key in ("samples", "windows", "length")}
    settings["calibration"] = options.calibration.name
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise SystemExit(f"{options.out} holds rows of other settings: {before['settings']}")
        rows = before["rows"]
    done = {row["configuration"] for row in rows}
    for name in options.only or CONFIGURATIONS:
        if name in done:
            continue
        found = run(CONFIGURATIONS[name], options)
        rows.append({"configuration": name, **found, "options": CONFIGURATIONS[name]})
        shown = "  ".join(f"{text} {value:.5f}" for text, value in found["kl"].items())
        print(f"{name:36} {found['bits_per_weight']:.3f} bits  {shown}  {found['seconds']:.0f} s", flush=True)
        whole = {"model": options.model.name, "machine": machine(), "settings": settings, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
