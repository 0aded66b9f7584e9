"""Run one quantization in this process and print its peak resident memory beyond the bare interpreter with its imports, as JSON.

Started as a child by ``memory.py``; Linux only (reads /proc/self/status, resets the peak through /proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--layout", default="compressed-tensors")
    options = parser.parse_args()

    # The imports that a run makes; what they take is not the run's.
    import numba  # noqa: F401
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import bitwright.api
    import bitwright.engine.verify
    import bitwright.kernels.numba_feedback
    import bitwright.kernels.numba_tiles
    import bitwright.layouts.compressed_tensors
    import bitwright.methods.gptq
    from bitwright.engine.memory import forecast
    from bitwright.engine.plan import make_plan
    from bitwright.engine.recipe import make_recipe
    from bitwright.engine.run import open_source

    recipe = make_recipe(
        {
            "method": options.method,
            "layout": options.layout,
            "calibration": {"text": options.calibration, "samples": options.samples, "length": 512},
        }
    )
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    began = time.perf_counter()
    bitwright.api.quantize(options.model, options.output, recipe=recipe, overwrite=True, resume="never")
    seconds = time.perf_counter() - began
    peak = status("VmHWM") - before
    with open_source(options.model) as source:
        plan = make_plan(recipe, source)
    files = sum(f.stat().st_size for f in options.output.glob("*.safetensors"))
    print(
        json.dumps(
            {
                "method": options.method,
                "layers": plan.structure.block_count,
                "peak_bytes": peak,
                "imports_bytes": before,
                "forecast_bytes": forecast(plan).peak_bytes,
                "forecast_error": forecast(plan).peak_bytes / peak - 1,
                "weight_file_bytes": files,
                "planned_file_bytes": plan.weight_file_bytes,
                "seconds": seconds,
                "threads": torch.get_num_threads(),
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
