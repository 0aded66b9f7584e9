"""What every recipe that ``bitwright recommend`` can suggest loses: the table of losses in the package.

Each candidate is quantized with the recipe that the suggested command stands for and measured with ``bitwright.evaluate`` in float32.
The figures go to ``--out``, and in short to ``src/bitwright/advise/quality.json``, from which ``recommend`` reads them.

    python benchmarks/recommend.py --model examples/storylm-8m --calibration own.txt --text heldout.txt \
        --out benchmarks/results/recommend.json [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bitwright.advise.knowledge import CANDIDATES, Candidate
from machine import machine

QUALITY = Path(__file__).parents[1] / "src" / "bitwright" / "advise" / "quality.json"


def measure(candidate: Candidate, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One line of the table."""
    import bitwright

    calibration = {"text": str(options.calibration), "samples": options.samples, "length": 512, "shuffle": False}
    recipe = candidate.recipe()
    if candidate.is_gguf:
        out = scratch / "out.gguf"
        bitwright.to_gguf(options.model, out, recipe=recipe, calibration=calibration, overwrite=True, resume="never")
        size = out.stat().st_size
    else:
        out = scratch / "out"
        made = bitwright.quantize(
            options.model, out, recipe=recipe, calibration=calibration, overwrite=True, resume="never"
        )
        size = made.plan.weight_file_bytes
    found = bitwright.evaluate(out, text=options.text, against=options.model, windows=options.windows)
    kl = found.quality.kl
    return {"name": candidate.name, "flags": candidate.flags, "bytes": size, "kl_mean": kl.mean, "kl_error": kl.error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--only", default="", help="one candidate; its line is replaced")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    known = json.loads(options.out.read_text())["results"] if options.only and options.out.exists() else []
    results = {line["name"]: line for line in known}
    with tempfile.TemporaryDirectory() as scratch:
        for candidate in CANDIDATES.values():
            if options.only not in ("", candidate.name):
                continue
            results[candidate.name] = line = measure(candidate, options, Path(scratch))
            print(f"{candidate.name:12} {line['bytes']:>12} {line['kl_mean']:.5f}", flush=True)
            write(options, [results[name] for name in CANDIDATES if name in results])


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Both files, after every line."""
    settings = {"samples": options.samples, "length": 512, "windows": options.windows, "seed": 0}
    files = {"model": options.model.name, "calibration": options.calibration.name, "text": options.text.name}
    report = {"machine": machine(), "settings": settings, "files": files, "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    origin = (
        f"mean KL divergence in nats on {options.windows} windows of 512 tokens; {options.model.name}, a model of 8 million parameters; "
        "benchmarks/results/recommend.json"
    )
    short = {"origin": origin, "kl_mean": {line["name"]: float(f"{line['kl_mean']:.3g}") for line in results}}
    QUALITY.write_text(json.dumps(short, indent=2) + "\n")


if __name__ == "__main__":
    main()
