"""Quantize a model with GPTQModel: 4 bits, symmetric, groups of 128, method GPTQ. Runs in GPTQModel's environment.

--awq: method AWQ in its GEMM form.
--act-order: columns are visited by falling Hessian diagonal and grouped in that order, so that ``g_idx`` is arbitrary (desc_act).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

# Read when gptqmodel is imported. Without it a machine of two cores gets one worker, and quantizing waits on itself.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON file: lists of token ids to calibrate on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--awq", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()

    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=arguments.bits,
        group_size=128,
        sym=not arguments.asymmetric,
        desc_act=arguments.act_order,
        **({"method": "awq", "format": "gemm"} if arguments.awq else {"act_group_aware": not arguments.act_order}),
    )
    windows = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    model = GPTQModel.load(str(arguments.model), config, device="cpu")
    model.quantize([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
    model.save(str(arguments.out))
    if config.offload_to_disk_path:  # GPTQModel leaves its offload folder behind
        shutil.rmtree(config.offload_to_disk_path, ignore_errors=True)
    arguments.json.write_text(json.dumps({"gptqmodel": version("gptqmodel")}), encoding="utf-8")


if __name__ == "__main__":
    main()
