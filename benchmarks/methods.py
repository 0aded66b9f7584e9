"""Every method and scheme on one model: size, KL divergence and perplexity, by the same evaluator.

Each recipe is quantized with ``bitwright.quantize`` and measured with ``bitwright.evaluate`` (float32 activations, so that only the
quantization differs; inputs are rounded where the recipe rounds them).

    python benchmarks/methods.py --model examples/storylm-8m --calibration own.txt --text heldout.txt \
        --out benchmarks/results/methods.json [--only PREFIX]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

NATIVE = {"layout": "native"}


def _with(**options: Any) -> dict[str, Any]:
    return {**NATIVE, **options}


#: name -> recipe fields
RECIPES: dict[str, dict[str, Any]] = {
    **{f"rtn int{bits} g128": _with(method="rtn", bits=bits) for bits in (8, 4, 3)},
    **{f"search int{bits} g128": _with(method="search", bits=bits) for bits in (4, 3)},
    **{f"awq + search int{bits} g128": _with(method="search", bits=bits, transforms=["awq"]) for bits in (4, 3)},
    **{f"gptq int{bits} g128": _with(method="gptq", bits=bits) for bits in (4, 3)},
    **{f"awq + gptq int{bits} g128": _with(method="gptq", bits=bits, transforms=["awq"]) for bits in (4, 3)},
    "gptq int2 g32": _with(method="gptq", bits=2, group_size=32),
    "rotate + gptq int2 g32": _with(method="gptq", bits=2, group_size=32, transforms=["rotate"]),
    "auto int4 g128": _with(method="auto", bits=4),
    **{
        f"rtn {book}{' double' if double else ''}": _with(
            method="rtn", scheme="codebook", scheme_options={"book": book, "double_quant": double}
        )
        for book, double in (("nf4", False), ("nf4", True), ("fp4", False))
    },
    "gptq nf4": _with(method="gptq", scheme="codebook", scheme_options={"book": "nf4"}),
    "search kmeans 4 bit": _with(method="search", scheme="codebook", scheme_options={"book": "kmeans"}, bits=4),
    "rtn fp8 e4m3 channel": _with(method="rtn", scheme="float8", group_size="channel"),
    "rtn fp8 e4m3 128x128": _with(method="rtn", scheme="float8", group_size="block"),
    "gptq fp8 e4m3 channel": _with(method="gptq", scheme="float8", group_size="channel"),
    **{
        f"{method} {element}": _with(method=method, scheme="microscaling", scheme_options={"element": element})
        for element in ("mxfp8", "mxfp4", "nvfp4")
        for method in ("rtn", "gptq")
    },
    "w8a8 int8 token": _with(method="rtn", bits=8, group_size="channel", inputs="int8-token"),
    "w8a8 int8 tensor static": _with(method="rtn", bits=8, group_size="channel", inputs="int8-tensor-static"),
    "smoothquant + w8a8 int8 tensor static": _with(
        method="rtn", bits=8, group_size="channel", inputs="int8-tensor-static", transforms=["smoothquant"]
    ),
    "llm.int8": _with(method="rtn", scheme="absmax-int8", inputs={"threshold": 6.0}),
    "spqr": _with(method="spqr", scheme="bilevel"),
    "rtn ternary g32": _with(method="rtn", scheme="ternary", group_size=32),
    "gptq ternary g32": _with(method="gptq", scheme="ternary", group_size=32),
    "rotate + gptq ternary g32": _with(method="gptq", scheme="ternary", group_size=32, transforms=["rotate"]),
    "gptq binary g32": _with(method="gptq", scheme="binary", group_size=32),
}


def measure(name: str, recipe: dict[str, Any], options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One line of the table."""
    import bitwright

    calibration = {"text": str(options.calibration), "samples": options.samples, "length": 512, "shuffle": False}
    out = scratch / "out"
    made = bitwright.quantize(options.model, out, calibration=calibration, overwrite=True, resume="never", **recipe)
    found = bitwright.evaluate(out, text=options.text, against=options.model, windows=options.windows)
    return {
        "name": name,
        "recipe": recipe,
        "bits_per_weight": made.plan.quantized_bits_per_weight,
        "kl_mean": found.quality.kl.mean,
        "perplexity": found.quality.model.perplexity,
        "perplexity_original": found.quality.source.perplexity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    files = {"model": options.model.name, "calibration": options.calibration.name, "text": options.text.name}
    settings = {"samples": options.samples, "length": 512, "windows": options.windows, "seed": 0}
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in RECIPES.items():
            if options.only in name:
                results.append(measure(name, recipe, options, Path(scratch)))
                line = results[-1]
                print(f"{name:40} {line['bits_per_weight']:7.3f} {line['kl_mean']:.5f}", flush=True)
                report = {"machine": machine(), "settings": settings, "files": files, "results": results}
                options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
