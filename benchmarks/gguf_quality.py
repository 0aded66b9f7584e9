"""GGUF files by bitwright and by llama.cpp's own quantizer, judged on logits that llama.cpp itself computes.

The model is written as F32. llama.cpp quantizes that file, with and without an importance matrix of the calibration text; bitwright
does the same from the checkpoint, and with GPTQ onto the same grids. Both get the same types tensor by tensor. Mean KL divergence from
the F32 file over the second half of each window (``peers/llamacpp_logits.py``), and how many tensors differ in any byte.

    python benchmarks/gguf_quality.py --model examples/storylm-8m --calibration own.txt --text heldout.txt \
        --python .venvs/llamacpp/bin/python --out benchmarks/results/gguf_quality.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import bitwright
from bitwright.gguf.mixture import MIXTURES
from bitwright.io.gguf_file import GgufFile
from machine import machine

PEERS = Path(__file__).parent / "peers"


def different(one: Path, two: Path) -> int:
    """Tensors that differ in type or in any byte."""
    with GgufFile.open(one) as a, GgufFile.open(two) as b:
        return sum(
            a.tensors[name].block != b.tensors[name].block or not np.array_equal(a.raw(name), b.raw(name))
            for name in a.tensors
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of llama.cpp's environment")
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS", "Q4_0"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    calibration = {"text": str(options.calibration), "samples": options.samples, "length": 512, "shuffle": False}
    ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), add_special_tokens=False)["input_ids"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "tokens.npy", np.array(ids[: options.windows * 512], np.int32).reshape(-1, 512))
        base = bitwright.to_gguf(options.model, folder / "f32.gguf", gguf={"type": "f32"}).output
        matrix = bitwright.collect_imatrix(
            options.model, folder / "imatrix.gguf", text=options.calibration, samples=options.samples, length=512
        )
        np.savez(folder / "imatrix.npz", **{key: sums.weights().reshape(-1) for key, sums in matrix.entries.items()})
        files: dict[str, dict[str, Any]] = {}
        for kind in options.types:
            number = str(MIXTURES[kind].number)
            for weighted in (False, True):
                label = f"{kind}{' imatrix' if weighted else ''}"
                theirs = folder / f"{label} llama.cpp.gguf".replace(" ", "-")
                extra = [str(folder / "imatrix.npz")] if weighted else []
                subprocess.run(
                    [options.python, PEERS / "llamacpp_quantize.py", base, theirs, number, *extra],
                    check=True, capture_output=True,
                )  # fmt: skip
                choice = {"type": kind, **({"imatrix": str(folder / "imatrix.gguf")} if weighted else {})}
                ours = folder / f"{label} bitwright.gguf".replace(" ", "-")
                made = bitwright.to_gguf(options.model, ours, gguf=choice)
                files[theirs.name] = {"type": kind, "made_by": "llama.cpp", "imatrix": weighted}
                files[ours.name] = {
                    "type": kind, "made_by": "bitwright rtn", "imatrix": weighted, "different_tensors": different(ours, theirs),
                    "bits_per_weight": made.plan.bits_per_weight,
                }  # fmt: skip
            ours = folder / f"{kind}-bitwright-gptq.gguf"
            choice = {"type": kind, "imatrix": str(folder / "imatrix.gguf")}
            bitwright.to_gguf(options.model, ours, method="gptq", gguf=choice, calibration=calibration)
            files[ours.name] = {"type": kind, "made_by": "bitwright gptq", "imatrix": True}
            print(kind, flush=True)
        subprocess.run(
            [options.python, PEERS / "llamacpp_logits.py", folder / "tokens.npy", folder / "out.json", base,
             *(folder / name for name in files), "--threads", str(options.threads)],
            check=True,
        )  # fmt: skip
        found = json.loads((folder / "out.json").read_text())
    for line in found["files"][1:]:
        files[line["file"]] |= {"kl_mean": line["kl_mean"], "perplexity": line["perplexity"]}
    settings = {
        "samples": options.samples,
        "length": 512,
        "windows": options.windows,
        "predictions": found["tokens"],
        "seed": 0,
    }
    report = {
        "machine": machine(), "peer": "llama-cpp-python 0.3.36", "settings": settings,
        "files": {"model": options.model.name, "calibration": options.calibration.name, "text": options.text.name},
        "perplexity_f32": found["files"][0]["perplexity"], "results": list(files.values()),
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for line in files.values():
        print(f"{line['type']:8} {line['made_by']:16} {line['imatrix']!s:6} {line['kl_mean']:.6f}")


if __name__ == "__main__":
    main()
