"""What each part of bitwright's GPTQ is worth: the mean KL divergence from the dense model, part by part.

Every row of the table is one whole run of ``bitwright.quantize`` followed by ``bitwright.evaluate``: the model's block linears become
symmetric integers in groups, embeddings and head stay as they are. A configuration should win on every calibration text and every
evaluation text; one that wins only where both are alike has learnt the text.

    python benchmarks/gptq_study.py --model MODEL --calibration selfgen.txt wikitext2-valid.txt \\
        --text heldout.txt wikitext2-test.txt --out benchmarks/results/gptq_study.json

Rows that the JSON file holds already are not run again, so an interrupted study continues where it stopped. The seconds mean little
where the machine was busy with other work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import bitwright
from bitwright.engine.run import versions

#: name -> fields of the recipe. "full" has every option written out, so that a change of defaults changes no row.
PLAIN = {"act_order": True, "clip": "minmax", "correct_drift": False, "damping": 0.05}
FULL = {"act_order": True, "clip": "search", "correct_drift": True, "damping": 0.1}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq plain": {"method_options": PLAIN},
    "gptq plain, damping 0.15": {"method_options": PLAIN | {"damping": 0.15}},
    "gptq + search": {"method_options": PLAIN | {"clip": "search"}},
    "gptq + drift": {"method_options": PLAIN | {"correct_drift": True}},
    "gptq + search + drift": {"method_options": FULL | {"damping": 0.05}},
    "gptq full": {"method_options": FULL},
    "gptq full, damping 0.01": {"method_options": FULL | {"damping": 0.01}},
    "gptq full, damping 0.15": {"method_options": FULL | {"damping": 0.15}},
    "gptq full, damping 0.4": {"method_options": FULL | {"damping": 0.4}},
    "gptq full, plain order": {"method_options": FULL | {"act_order": False}},
    "gptq full, bfloat16 activations": {"method_options": FULL, "compute_dtype": "bfloat16"},
}


def run(
    configuration: dict[str, Any], calibration: Path, bits: int, options: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Quantize once; mean KL by text, and the seconds that quantizing took."""
    values: dict[str, Any] = {
        "method": "gptq",
        "bits": bits,
        "group_size": options.group_size,
        "symmetric": True,
        "scale_dtype": "float16",
        "layout": options.layout,
        "compute_dtype": "float32",
        "calibration": {
            "text": str(calibration), "samples": options.samples, "length": options.length, "shuffle": False,
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        began = time.perf_counter()
        bitwright.quantize(options.model, output, resume="never", **(values | configuration))
        seconds = time.perf_counter() - began
        divergences = {}
        for text in options.text:
            found = bitwright.evaluate(
                output, text=text, against=options.model, length=options.length, windows=options.windows
            )
            divergences[text.name] = found.quality.kl.mean
    return divergences, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="calibration texts, UTF-8")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="evaluation texts, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, and to continue")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), help="these configurations (default: all)")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows, the first of the text")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows, the first of the text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--layout", default="gptq", help="a layout that stores every bit width asked for")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    keys = ("group_size", "samples", "windows", "length", "layout")
    settings = {key: getattr(options, key) for key in keys}
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise SystemExit(f"{options.out} holds rows of other settings: {before['settings']}")
        rows = before["rows"]
    done = {(row["configuration"], row["calibration"], row["bits"]) for row in rows}
    for name in options.only or CONFIGURATIONS:
        configuration = CONFIGURATIONS[name]
        for calibration in options.calibration:
            for bits in options.bits:
                if (name, calibration.name, bits) in done:
                    continue
                divergences, seconds = run(configuration, calibration, bits, options)
                rows.append(
                    {"configuration": name, "calibration": calibration.name, "bits": bits, "kl": divergences,
                     "seconds": round(seconds, 1), "threads": options.threads, "options": configuration}
                )  # fmt: skip
                shown = "  ".join(f"{text} {value:.5f}" for text, value in divergences.items())
                print(f"{name:34} {calibration.name:22} {bits} bits  {shown}  {seconds:.0f} s", flush=True)
                whole = {"model": options.model.name, "settings": settings, "versions": versions(), "rows": rows}
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
