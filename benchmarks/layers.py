"""GPTQ of one layer against llm-compressor and GPTQModel: same Gram matrix, same bits, same threads, in one run.

The three are started in turn, several rounds, so that a noisy machine is noisy for all; quoted are medians and their ratios.

    python benchmarks/layers.py --gptqmodel VENV --llmcompressor VENV --out benchmarks/results/layers.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

HERE = Path(__file__).parent


def once(python: Path | str, script: Path, layer: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One start of one contender: its report."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": str(options.threads)}
    environment |= {"NUMBA_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    command = [str(python), str(script), "--layer", str(layer), "--bits", str(options.bits)]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptqmodel", type=Path, help="virtual environment with GPTQModel")
    parser.add_argument("--llmcompressor", type=Path, help="virtual environment with llm-compressor")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    contenders: dict[str, tuple[Path | str, Path]] = {"bitwright": (sys.executable, HERE / "layer_bitwright.py")}
    if options.gptqmodel:
        contenders["gptqmodel"] = (options.gptqmodel / "bin/python", HERE / "peers" / "layer_gptqmodel.py")
    if options.llmcompressor:
        contenders["llmcompressor"] = (options.llmcompressor / "bin/python", HERE / "peers" / "layer_llmcompressor.py")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            layer = Path(folder) / f"{size}.npz"
            make = [sys.executable, str(HERE / "peers" / "make_layer.py"), "--rows", str(size), "--columns", str(size)]
            subprocess.run([*make, "--out", str(layer)], check=True)
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
            for _ in range(options.rounds):
                for name, (python, script) in contenders.items():
                    found[name].append(once(python, script, layer, options))
            line: dict[str, Any] = {"size": size, "contenders": {}}
            for name, reports in found.items():
                seconds = [s for report in reports for s in report["seconds"]]
                line["contenders"][name] = {
                    "seconds_median": statistics.median(seconds),
                    "seconds": seconds,
                    "proxy_loss_relative": reports[0]["proxy_loss_relative"],
                    "settings": reports[0]["settings"],
                    "versions": reports[0]["versions"],
                    "load_average": [report["load_average"] for report in reports],
                }
            ours = line["contenders"]["bitwright"]
            line["ratios"] = {
                name: {
                    "seconds": ours["seconds_median"] / other["seconds_median"],
                    "proxy_loss": ours["proxy_loss_relative"] / other["proxy_loss_relative"],
                }
                for name, other in line["contenders"].items()
                if name != "bitwright"
            }
            print(json.dumps({"size": size, "ratios": line["ratios"], "ours": ours["seconds_median"]}))
            results.append(line)
    options.out.write_text(
        json.dumps({"machine": machine(), "threads": options.threads, "results": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
