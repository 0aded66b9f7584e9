"""Peak resident memory of quantization, measured and forecast, for several checkpoints and methods.

Each run is a process of its own (``memory_run.py``), whose peak is counted from after its imports.

    python benchmarks/synthetic.py /data/llama-22 --layers 22 --tokenizer examples/storylm-8m
    python benchmarks/memory.py --run rtn /data/llama-22 --run gptq /data/llama-22 --calibration text.txt --out memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, action="append", metavar=("METHOD", "MODEL"), required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results = []
    for method, model in options.run:
        with tempfile.TemporaryDirectory(dir=Path(model).resolve().parent) as scratch:
            command = [sys.executable, str(HERE / "memory_run.py"), model, f"{scratch}/out", "--method", method]
            command += ["--calibration", str(options.calibration), "--samples", str(options.samples)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        line = {"model": Path(model).name, **json.loads(done.stdout.strip().splitlines()[-1])}
        print(json.dumps(line), flush=True)
        results.append(line)
    options.out.write_text(
        json.dumps({"machine": machine(), "samples": options.samples, "results": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
