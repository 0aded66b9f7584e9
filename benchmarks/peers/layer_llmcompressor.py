"""Time llm-compressor's GPTQ of one linear layer on a given Gram matrix.

What is timed is the weight observer (the scales; "observer" in the report) and `quantize_weight` (activation
ordering, damping, Cholesky and inverse, the column loop): what GPTQModifier does to a layer once its Hessian is
there. The Hessian is given as llm-compressor would have it (2/samples · sum of x xᵀ, float32; the factor changes
nothing, for damping is relative). Settings are its defaults (see quantize_llmcompressor.py).
"""

from __future__ import annotations

import time

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from peer_io import layer_arguments, read_layer, report_layer, time_layer


def main() -> None:
    arguments = layer_arguments(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    weight, gram, tokens = read_layer(arguments.layer)
    rows, columns = weight.shape
    number = QuantizationArgs(
        num_bits=arguments.bits,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=arguments.group_size,
        actorder=ActivationOrdering.STATIC,
        observer="memoryless_minmax",
    )
    module = torch.nn.Linear(columns, rows, bias=False)
    module.weight.data = weight

    @torch.no_grad()
    def run() -> tuple[torch.Tensor, dict[str, float]]:
        working_weight, hessian = weight.clone().unsqueeze(0), (gram * (2.0 / tokens)).unsqueeze(0)
        started, cpu_started = time.perf_counter(), time.process_time()
        observer = Observer.load_from_registry(number.observer, base_name="weight", args=number, module=module)
        observer(module.weight)
        ranges = observer.get_qparams()
        observed = time.perf_counter()
        quantized, _, fell_back = quantize_weight(
            weights=working_weight,
            hessians=hessian,
            scale=ranges["scale"].unsqueeze(0),
            zero_point=ranges["zero_point"].unsqueeze(0),
            global_scale=None,
            quant_args=number,
        )
        ended, cpu_ended = time.perf_counter(), time.process_time()
        if bool(fell_back.any()):
            raise SystemExit("the Hessian was not positive definite: llm-compressor fell back to rounding")
        parts = {
            "total": ended - started,
            "observer": observed - started,
            "quantize_weight": ended - observed,
            "cpu": cpu_ended - cpu_started,
        }
        return quantized[0], parts

    quantized, timing = time_layer(run, repeats=arguments.repeats)
    report_layer(
        arguments,
        peer="llmcompressor",
        packages=["llmcompressor", "compressed-tensors", "torch"],
        settings={"actorder": "static", "observer": number.observer, "percdamp": 0.01, "blocksize": 128},
        weight=weight,
        gram=gram,
        tokens=tokens,
        quantized=quantized,
        timing=timing,
    )


if __name__ == "__main__":
    main()
