"""GPTQ of a whole model against llm-compressor and GPTQModel: same bits, group size and calibration windows, one evaluator.

Every contender gets the first ``--samples`` consecutive windows of the calibration text; what it writes is decoded to dense weights
and measured by ``peers/eval_dense.py`` (float32, mean KL divergence from the original over the first ``--windows`` windows).

    python benchmarks/quality.py --model examples/storylm-8m --calibration own.txt --calibration foreign.txt --text heldout.txt \
        --gptqmodel VENV --llmcompressor VENV --out benchmarks/results/quality.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

HERE = Path(__file__).parent
PEERS = HERE / "peers"


def run(command: list[str]) -> str:
    """Standard output of a command; stops with its error where it fails."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def ours(options: argparse.Namespace, method: str, bits: int, text: Path, out: Path) -> None:
    """Quantize with bitwright and write the decoded weights."""
    import torch
    from safetensors.torch import save_file

    import bitwright
    from bitwright.runtime.checkpoint import open_checkpoint

    folder = out.with_suffix("")
    calibration = {"text": str(text), "samples": options.samples, "length": options.length, "shuffle": False}
    bitwright.quantize(
        options.model, folder, method=method, bits=bits, group_size=options.group_size, layout="gptq",
        calibration=calibration, overwrite=True, resume="never",
    )  # fmt: skip
    source = open_checkpoint(folder)
    tensors = {name: source.read(name).to(torch.float32).contiguous() for name in source.tensors}
    save_file(tensors, str(out))


def peer(options: argparse.Namespace, name: str, venv: Path, bits: int, text: Path, out: Path) -> None:
    """Quantize with a peer in its own environment and decode what it wrote."""
    folder = out.with_suffix("")
    command = [str(venv / "bin/python"), str(PEERS / f"quantize_{name}.py"), "--model", str(options.model)]
    command += ["--text", str(text), "--out", str(folder), "--bits", str(bits), "--group-size", str(options.group_size)]
    run([*command, "--samples", str(options.samples), "--length", str(options.length)])
    export = [sys.executable, str(PEERS / "export_dense.py"), "--model", str(folder)]
    run([*export, "--reference", str(options.model), "--out", str(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, action="append", required=True, help="calibration text; repeatable")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--gptqmodel", type=Path)
    parser.add_argument("--llmcompressor", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    venvs = {"gptqmodel": options.gptqmodel, "llmcompressor": options.llmcompressor}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for text in options.calibration:
            for bits in options.bits:
                names = ["rtn", "search", "gptq", *(name for name, venv in venvs.items() if venv)]
                for name in names:
                    if name == "rtn" and text != options.calibration[0]:
                        continue
                    out = Path(scratch) / f"{name}-{bits}-{text.stem}.safetensors"
                    began = time.perf_counter()
                    venv = venvs.get(name)
                    if venv is None:
                        ours(options, name, bits, text, out)
                    else:
                        peer(options, name, venv, bits, text, out)
                    seconds = time.perf_counter() - began
                    evaluate = [sys.executable, str(PEERS / "eval_dense.py"), "--model", str(options.model)]
                    evaluate += ["--weights", str(out), "--text", str(options.text)]
                    report = json.loads(run([*evaluate, "--windows", str(options.windows)]).strip().splitlines()[-1])
                    line = {
                        "contender": name if venv else f"bitwright {name}",
                        "bits": bits,
                        "calibration": text.name,
                        "kl": report["kl"],
                        "perplexity": report["perplexity"],
                        "perplexity_float": report["perplexity_float"],
                        "seconds": seconds,
                    }
                    print(json.dumps(line), flush=True)
                    results.append(line)
    settings = {
        "samples": options.samples,
        "length": options.length,
        "group_size": options.group_size,
        "symmetric": True,
    }
    report = {"machine": machine(), "settings": settings, "text": options.text.name, "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
