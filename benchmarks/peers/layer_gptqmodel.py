"""Time GPTQModel's GPTQ of one linear layer on a given Gram matrix.

What is timed is `GPTQ.quantize()` whole: activation ordering, damping, Cholesky and inverse, scales, the column loop.
The Hessian is injected as GPTQModel itself would have left it (2/tokens · sum of x xᵀ, float32), which makes its own
collection of inputs a no-op. Settings are its defaults (see quantize_gptqmodel.py).
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # see quantize_gptqmodel.py

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from peer_io import layer_arguments, read_layer, report_layer, time_layer


def main() -> None:
    arguments = layer_arguments(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    weight, gram, tokens = read_layer(arguments.layer)
    rows, columns = weight.shape
    config = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size, offload_to_disk=False)

    def run() -> tuple[torch.Tensor, dict[str, float]]:
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight.clone()
        task = GPTQ(linear, config)
        task.quantizer.configure(perchannel=True)
        task.H = gram * (2.0 / tokens)
        task.nsamples = tokens
        started, cpu_started = time.perf_counter(), time.process_time()
        quantized, *_ = task.quantize()
        ended, cpu_ended = time.perf_counter(), time.process_time()
        return quantized.detach().clone(), {"total": ended - started, "cpu": cpu_ended - cpu_started}

    quantized, timing = time_layer(run, repeats=arguments.repeats)
    report_layer(
        arguments,
        peer="gptqmodel",
        packages=["gptqmodel", "torch"],
        settings={
            name: getattr(config, name) for name in ("sym", "desc_act", "act_group_aware", "damp_percent", "mse")
        },
        weight=weight,
        gram=gram,
        tokens=tokens,
        quantized=quantized,
        timing=timing,
    )


if __name__ == "__main__":
    main()
