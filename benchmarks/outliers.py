"""W8A8 and AWQ on a model with activation outliers: a copy into which outliers were injected that change no logit.

In every norm's output 32 channels are made 60 times as large: the norm's weight is multiplied, the columns of every linear that reads
it are divided. Edges are found by running the blocks (``bitwright.model.edges``), so that no name is assumed. The copy is float32, because
rounding to bfloat16 would change the logits.

    python benchmarks/outliers.py --model examples/storylm-8m --calibration own.txt --text heldout.txt \
        --out benchmarks/results/outliers.json [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

CHANNELS, FACTOR = 32, 60.0

W8A8 = {"method": "rtn", "bits": 8, "group_size": "channel", "layout": "native", "inputs": "int8-tensor-static"}
#: name -> recipe
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8 static": W8A8,
    "w8a8 static, smoothquant 0.5": {**W8A8, "transforms": ["smoothquant"]},
    "w8a8 static, smoothquant 0.8": {**W8A8, "transforms": [{"name": "smoothquant", "alpha": 0.8}]},
    "w8a8 static, smoothquant search": {**W8A8, "transforms": [{"name": "smoothquant", "alpha": "search"}]},
    "w8a8 static, smoothquant search, all edges": {
        **W8A8,
        "transforms": [{"name": "smoothquant", "alpha": "search", "linears": True}],
    },
    "w8a8 token": {**W8A8, "inputs": "int8-token"},
    **{
        f"{'awq + ' if awq else ''}{method} int{bits}": {
            "method": method, "bits": bits, "layout": "native", "transforms": ["awq"] if awq else [],
        }
        for bits in (4, 3)
        for method in ("search", "gptq")
        for awq in (False, True)
    },
}  # fmt: skip


def inject(model: Path, target: Path, seed: int) -> list[str]:
    """Write the copy; returns the edges that carry the outliers."""
    import torch
    from safetensors.torch import save_file

    from bitwright.engine.blockwise import cast_call
    from bitwright.engine.fold import Folder
    from bitwright.engine.rewrite import RewrittenSource
    from bitwright.io.safetensors_dir import SafetensorsDir
    from bitwright.model.blocks import BlockRunner
    from bitwright.model.edges import find_edges
    from bitwright.model.names import map_names
    from bitwright.model.skeleton import build_skeleton

    rng = torch.Generator().manual_seed(seed)
    source = SafetensorsDir.open(model)
    skeleton = build_skeleton(model)
    names = map_names(skeleton, source.tensors)
    runner = BlockRunner(skeleton, names, source, torch.float32)
    (capture,) = runner.capture([torch.randint(2, 1000, (1, 128), generator=rng)])
    copy = RewrittenSource(source, {}, frozenset(source.tensors))
    done = []
    for index, call in enumerate(capture.calls):
        block = runner.load_block(index)
        hidden, call32 = capture.hidden.float(), cast_call(call, torch.float32)
        edges, _ = find_edges(block, lambda b=block, h=hidden, c=call32: runner.run(b, h, c))
        prefix = f"{skeleton.blocks_path}.{index}."
        folder = Folder(prefix, names, source.tensors, frozenset(source.tensors), copy.read)
        for edge in edges:
            if edge.producer.norm:
                factors = torch.ones(edge.channels)
                factors[torch.randperm(edge.channels, generator=rng)[:CHANNELS]] = 1.0 / FACTOR
                copy.add(folder.fold(edge, factors))
                done.append(f"block {index}: {edge.name}")
        runner.free(block)
    target.mkdir(parents=True)
    tensors = {name: copy.read(name).float().contiguous() for name in source.tensors}
    save_file(tensors, str(target / "model.safetensors"), {"format": "pt"})
    for file in model.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))
    return done


def largest_change(model: Path, copy: Path, text: Path) -> float:
    """Largest difference of any logit between the model and its copy, relative to the largest logit, both in float32."""
    import torch

    import bitwright
    from bitwright.engine.calibration import load_tokenizer

    ids = load_tokenizer(model)(text.read_text()[:4000], add_special_tokens=False)["input_ids"][:512]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        a, b = (bitwright.load(path, dtype=torch.float32)(tokens).logits for path in (model, copy))
    return float((a - b).abs().max() / a.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument("--keep", type=Path, help="where the copy stays; a temporary folder otherwise")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import bitwright

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = options.keep or Path(scratch) / f"{options.model.name}-outliers"
        edges = inject(options.model, copy, options.seed)
        change = largest_change(options.model, copy, options.text)
        print(f"{len(edges)} norms; logits change by {change:.2e} of the largest", flush=True)
        calibration = {"text": str(options.calibration), "samples": options.samples, "length": 512, "shuffle": False}
        for model in (options.model, copy):
            for name, recipe in RECIPES.items():
                if options.only not in name:
                    continue
                out = Path(scratch) / "out"
                bitwright.quantize(model, out, calibration=calibration, overwrite=True, resume="never", **recipe)
                found = bitwright.evaluate(out, text=options.text, against=model, windows=options.windows)
                line = {"model": model.name, "recipe": name, "kl_mean": found.quality.kl.mean}
                print(json.dumps(line), flush=True)
                results.append(line)
    settings = {
        "channels": CHANNELS, "factor": FACTOR, "seed": options.seed, "samples": options.samples, "windows": options.windows,
        "calibration": options.calibration.name, "text": options.text.name,
    }  # fmt: skip
    report = {
        "machine": machine(), "settings": settings, "norms": len(edges), "relative_change_of_logits": change, "results": results
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
