"""Quantize a whole model with GPTQModel's GPTQ: symmetric, grouped, on fixed calibration windows.

Runs in GPTQModel's own environment (see README.md). Only bits and group size are set; everything else is
GPTQModel 7.7's default: act_group_aware=True (groups and the columns inside each are visited by falling Hessian
diagonal, the stored order stays plain), desc_act=False, sym=True, damp_percent=0.05 raised by
damp_auto_increment=0.01 where Cholesky fails, true_sequential=True, mse=0.0 (scales from minimum and maximum),
format "gptq" (the v1 checkpoint layout, whose stored zero points are one less than the real ones).
"""

from __future__ import annotations

import os
import shutil
import time

# Read when gptqmodel is imported. A machine of two cores gets one worker by default, with which the import fails:
# "Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1".
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from peer_io import emit, quantize_arguments, token_windows, versions
from transformers import AutoTokenizer


def main() -> None:
    arguments = quantize_arguments(__doc__).parse_args()
    torch.manual_seed(arguments.seed)
    windows = token_windows(
        AutoTokenizer.from_pretrained(arguments.model), arguments.text, count=arguments.samples, length=arguments.length
    )
    config = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size)
    model = GPTQModel.load(str(arguments.model), config, device="cpu")
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    started = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    seconds = time.perf_counter() - started
    model.save(str(arguments.out))
    if config.offload_to_disk_path:  # GPTQModel leaves its offload folder behind
        shutil.rmtree(config.offload_to_disk_path, ignore_errors=True)
    emit(
        {
            "peer": "gptqmodel",
            "versions": versions(["gptqmodel", "torch", "transformers"]),
            "settings": {
                name: getattr(config, name)
                for name in (
                    "bits",
                    "group_size",
                    "sym",
                    "desc_act",
                    "act_group_aware",
                    "damp_percent",
                    "damp_auto_increment",
                    "mse",
                    "true_sequential",
                )
            },
            "calibration": {"file": arguments.text.name, "windows": arguments.samples, "length": arguments.length},
            "seconds_quantize": seconds,
            "bytes": sum(file.stat().st_size for file in arguments.out.glob("*.safetensors")),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
