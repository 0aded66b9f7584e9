"""KL divergence of LLM.int8, NF4 and FP4: bitwright's files against bitsandbytes' own quantization, same evaluator, same windows.

bitsandbytes quantizes while transformers loads the dense model (``BitsAndBytesConfig``); bitwright writes a native checkpoint. Both run
in the model's own dtype, because bitsandbytes' products do.

    python benchmarks/bitsandbytes_quality.py --model examples/storylm-8m --text heldout.txt \
        --out benchmarks/results/bitsandbytes_quality.json

Needs bitsandbytes and accelerate. ``--model`` may be repeated, for example with the copy that ``outliers.py`` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import machine

#: name -> (fields of BitsAndBytesConfig, fields of bitwright's recipe)
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llm.int8": (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0},
        {"scheme": "absmax-int8", "inputs": {"threshold": 6.0}},
    ),
    "int8, no outliers": (
        {"load_in_8bit": True, "llm_int8_threshold": 0.0},
        {"scheme": "absmax-int8", "inputs": {}},
    ),
    "nf4": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"scheme": "codebook", "scheme_options": {"book": "nf4"}},
    ),
    "nf4 double": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"scheme": "codebook", "scheme_options": {"book": "nf4", "double_quant": True}},
    ),
    "fp4": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"scheme": "codebook", "scheme_options": {"book": "fp4"}},
    ),
}


def logits_of(model: Any) -> Callable[..., Any]:
    """tokens -> float32 logits."""
    import torch

    def run(tokens: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits.float()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    import bitwright
    from bitwright.evaluation.quality import quality
    from bitwright.evaluation.windows import make_windows

    results = []
    for path in options.model:
        ids = AutoTokenizer.from_pretrained(path)(options.text.read_text(), add_special_tokens=False, verbose=False)
        windows = make_windows(ids["input_ids"], length=512, stride=None, limit=options.windows)
        source = logits_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
        dtype = AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype
        for name, (theirs, ours) in PAIRS.items():
            config = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **theirs)
            peer = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype).eval()
            kl_peer = quality(logits_of(peer), windows, source).kl.mean
            del peer
            with tempfile.TemporaryDirectory() as scratch:
                bitwright.quantize(path, Path(scratch) / "out", method="rtn", layout="native", **ours)
                mine = bitwright.load(Path(scratch) / "out", dtype=dtype)
            kl = quality(logits_of(mine), windows, source).kl.mean
            line = {"model": path.name, "name": name, "bitwright": kl, "bitsandbytes": kl_peer, "ratio": kl / kl_peer}
            print(json.dumps(line), flush=True)
            results.append(line)
    settings = {"windows": options.windows, "length": 512, "text": options.text.name, "dtype": str(dtype)}
    versions = {name: version(name) for name in ("bitsandbytes", "transformers", "accelerate")}
    report = {"machine": machine(), "versions": versions, "settings": settings, "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
