"""Every pair of layouts, converted: does the output decode to the source's numbers?

Models: the folder given, and two small architectures with random weights (GPT-2, whose Conv1D weights are transposed, and Mixtral, whose
experts are stored one by one). Both sides of a pair are decoded from their stored bytes by ``tests/decoders.py``, which shares no code with
bitwright. Where a pair is refused because the scales are not exact in the model's dtype, it is also converted with ``--dtype float16``
and with ``--lossy``.

    PYTHONPATH=. python benchmarks/conversions.py --model examples/storylm-8m --out benchmarks/results/conversions.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests import decoders
from tests.zoo import make

import bitwright
from bitwright.runtime.checkpoint import open_checkpoint
from machine import machine

Decoder = Callable[[decoders.Tensors, str], torch.Tensor]
V2 = {"checkpoint_format": "gptq_v2"}
BYTES = {"int8_bytes": True}
INT8 = {"bits": 8, "group_size": "channel"}
LLM_INT8 = {"scheme": "absmax-int8", "inputs": {"threshold": 6.0}}
#: form -> layout, its options, options of quantize, decoder of a stored weight
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Decoder]] = {
    "gptq": ("gptq", {}, {}, decoders.gptq),
    "gptq_v2 asymmetric": ("gptq", V2, {"symmetric": False}, partial(decoders.gptq, shift=0)),
    "gptq channel": ("gptq", {}, {"group_size": "channel"}, decoders.gptq),
    "awq": ("awq", {}, {}, decoders.awq),
    "awq asymmetric": ("awq", {}, {"symmetric": False}, decoders.awq),
    "compressed-tensors": ("compressed-tensors", {}, {}, decoders.pack_quantized),
    "compressed-tensors asymmetric": ("compressed-tensors", {}, {"symmetric": False}, decoders.pack_quantized),
    "compressed-tensors int8 packed": ("compressed-tensors", {}, INT8, partial(decoders.pack_quantized, bits=8)),
    "compressed-tensors int8": ("compressed-tensors", BYTES, INT8, decoders.int_quantized),
    "compressed-tensors int8 W8A8": ("compressed-tensors", {}, {**INT8, "inputs": {}}, decoders.int_quantized),
    "bitsandbytes int8": ("bitsandbytes", {}, LLM_INT8, decoders.bitsandbytes_int8),
    "native": ("native", {}, {"symmetric": False}, decoders.native),
    "native int8": ("native", {}, {**INT8, "scale_dtype": "float32"}, partial(decoders.native, bits=8)),
}
#: Forms that differ in options of quantize alone are one target.
TARGETS = [
    *(
        "gptq",
        "gptq_v2 asymmetric",
        "awq",
        "compressed-tensors",
        "compressed-tensors int8",
        "bitsandbytes int8",
        "native",
    ),
]


def decode(folder: Path, decoder: Decoder) -> dict[str, torch.Tensor]:
    """Every quantized weight of a folder."""
    source = open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    return {name: decoder(tensors, name) for name in source.modules}  # type: ignore[union-attr]


def decoder_of(target: str, bits: int) -> Decoder:
    """How the output's stored weights are decoded."""
    layout = FORMS[target][0]
    if layout == "gptq":
        return partial(decoders.gptq, bits=bits, shift=int("v2" not in target))
    if layout == "compressed-tensors":
        return partial(decode_compressed, bits=bits)
    return partial(decode_native, bits=bits) if layout == "native" else FORMS[target][3]


def decode_compressed(tensors: decoders.Tensors, name: str, *, bits: int) -> torch.Tensor:
    """Packed, or a byte a code."""
    packed = f"{name}.weight_packed" in tensors
    return decoders.pack_quantized(tensors, name, bits=bits) if packed else decoders.int_quantized(tensors, name)


def decode_native(tensors: decoders.Tensors, name: str, *, bits: int) -> torch.Tensor:
    """Affine schemes, and int8 with row maxima."""
    if f"{name}.weight.absmax" not in tensors:
        return decoders.native(tensors, name, bits=bits)
    codes = decoders.fields(tensors[f"{name}.weight.codes"], 8)[:, : int(tensors[f"{name}.weight.shape"][1])]
    return (codes - 128).float() * (tensors[f"{name}.weight.absmax"].float().reshape(-1, 1) / 127)


def attempt(
    source: Path, before: dict[str, torch.Tensor], target: str, bits: int, out: Path, **extra: Any
) -> dict[str, Any]:
    """One conversion: modules compared and those that differ, or the refusal."""
    layout, options, *_ = FORMS[target]
    try:
        result = bitwright.convert(source, out, layout=layout, layout_options=options, overwrite=True, **extra)
    except bitwright.PlanError as error:
        return {"outcome": "refused", "reason": error.message.split(": ", 1)[-1]}
    after = decode(out, decoder_of(target, bits))
    assert before.keys() == after.keys()
    differ = sum(not torch.equal(before[name], after[name]) for name in before)
    outcome = "exact" if not differ else "rounded" if result.plan.rounding else "WRONG"
    return {"outcome": outcome, "modules": len(before), "mismatches": differ, "largest_rounding": result.plan.rounding}


def pairs(name: str, model: Path, group_size: int, work: Path) -> list[dict[str, Any]]:
    """Every form of one model into every target."""
    found = []
    for form, (layout, options, how, decoder) in FORMS.items():
        source = work / "source"
        shutil.rmtree(source, ignore_errors=True)
        recipe = {"group_size": group_size, "bits": 4, **how}
        if "scheme" in how:
            recipe = dict(how)
        bitwright.quantize(model, source, method="rtn", layout=layout, layout_options=options, **recipe)
        bits = 8 if "int8" in form else 4
        before = decode(source, decoder)
        for target in TARGETS:
            if target == "compressed-tensors int8" and bits != 8:
                continue  # codes of fewer bits are packed all the same
            line = {"model": name, "from": form, "to": target}
            outcome = attempt(source, before, target, bits, work / "out")
            found.append(line | outcome)
            if "not exact" in outcome.get("reason", ""):
                half = attempt(source, before, target, bits, work / "out", dtype=torch.float16)
                found.append(line | {"with": "--dtype float16"} | half)
                found.append(
                    line | {"with": "--lossy"} | attempt(source, before, target, bits, work / "out", lossy=True)
                )
        dense = bitwright.convert(source, work / "dense", layout="dense", dtype=torch.float32, overwrite=True)
        stored = load_file(work / "dense" / "model.safetensors")
        turned = model_type(model) == "gpt2"
        wrong = [m for m, w in before.items() if not torch.equal(stored[f"{m}.weight"], w.T if turned else w)]
        line = {
            "model": name,
            "from": form,
            "to": "dense",
            "with": "--dtype float32",
            "outcome": "exact" if not wrong else "WRONG",
        }
        found.append(line | {"modules": len(dense.plan.modules), "mismatches": len(wrong)})
    return found


def model_type(model: Path) -> str:
    return str(json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=128, help="of --model; the small ones have groups of 32")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found += pairs(options.model.name, options.model, options.group_size, work)
        for name in ("gpt2", "mixtral"):
            found += pairs(f"random {name}", make(name, work / name), 32, work)
    counts = Counter(line["outcome"] for line in found)
    compared = sum(line.get("modules", 0) for line in found if line["outcome"] == "exact")
    summary = {
        "conversions": dict(counts),
        "modules_compared_where_exact": compared,
        "mismatches_where_exact": sum(line["mismatches"] for line in found if line["outcome"] == "exact"),
    }
    document = {"machine": machine(), "group_size": options.group_size, "summary": summary, "pairs": found}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    assert not counts["WRONG"]


if __name__ == "__main__":
    main()
