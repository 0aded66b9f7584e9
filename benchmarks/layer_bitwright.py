"""Time bitwright's GPTQ of one linear layer on a given Gram matrix, with the defaults of the method.

Timed is ``Gptq.quantize``: the search of the scales, ordering, damping, factorization, the column loop and the estimate of the
loss. There is no drift to correct: a single layer has no layers before it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numba
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from peer_io import layer_arguments, read_layer, report_layer, time_layer

from bitwright.core.method import Context
from bitwright.core.stats import Gram
from bitwright.kernels.numba_feedback import feedback_block
from bitwright.kernels.numba_tiles import tile_sums
from bitwright.methods.gptq import Gptq
from bitwright.schemes.affine import Affine


def main() -> None:
    arguments = layer_arguments(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(arguments.threads)
    weight, matrix, tokens = read_layer(arguments.layer)
    gram = Gram(weight.shape[1])
    gram.matrix, gram.count = matrix, tokens
    method = Gptq()
    scheme = Affine(bits=arguments.bits, group_size=arguments.group_size)
    context = Context(feedback=feedback_block, tile_sums=tile_sums)

    def run() -> tuple[torch.Tensor, dict[str, float]]:
        started, cpu_started = time.perf_counter(), time.process_time()
        outcome = method.quantize(weight, {"gram": gram}, scheme, context)
        ended, cpu_ended = time.perf_counter(), time.process_time()
        return outcome.tensor.decode(), {"total": ended - started, "cpu": cpu_ended - cpu_started}

    quantized, timing = time_layer(run, repeats=arguments.repeats)
    report_layer(
        arguments,
        peer="bitwright",
        packages=["bitwright", "torch", "numba"],
        settings=dict(vars(method)),
        weight=weight,
        gram=matrix,
        tokens=tokens,
        quantized=quantized,
        timing=timing,
    )


if __name__ == "__main__":
    main()
