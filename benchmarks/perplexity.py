"""bitwright's perplexity against transformers' documented recipe, and against llama.cpp's logits under ``llama-perplexity``'s convention.

* transformers: the loop of https://huggingface.co/docs/transformers/perplexity as it stands there, on the model that ``bitwright.load``
  gives (dense and gptq) and, for the dense one, on ``AutoModelForCausalLM`` too.
* llama.cpp: the same windows through llama.cpp (``peers/llamacpp_logits.py``), summed up as ``tools/perplexity/perplexity.cpp`` does: whole
  chunks, their first token replaced by the model's where the file asks for one, predictions of the second half. The gptq checkpoint's
  decoded weights are written as F32.

    python benchmarks/perplexity.py --model examples/storylm-8m --calibration own.txt --text heldout.txt \
        --python .venvs/llamacpp/bin/python --out benchmarks/results/perplexity.json
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitwright
from machine import machine


def documented(model: Any, ids: torch.Tensor, max_length: int, stride: int) -> float:
    """The documentation's loop, with its weights of windows."""
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    seq_len = ids.size(1)
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        num_loss_tokens = int((target_ids != -100).sum()) - target_ids.size(0)
        nll_sum += float(loss) * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return math.exp(nll_sum / n_tokens)


def llama_perplexity(python: Path, files: list[Path], windows: list[list[int]], folder: Path) -> list[float]:
    """Perplexity of every file by llama.cpp's own logits."""
    np.save(folder / "tokens.npy", np.array(windows, np.int32))
    script = Path(__file__).parent / "peers" / "llamacpp_logits.py"
    subprocess.run([python, script, folder / "tokens.npy", folder / "out.json", *files], check=True)
    return [line["perplexity"] for line in json.loads((folder / "out.json").read_text())["files"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of llama.cpp's environment")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bitwright.quantize(
            options.model, folder / "gptq", method="gptq", bits=4, layout="gptq",
            calibration={"text": str(options.calibration), "samples": 32},
        )  # fmt: skip
        bitwright.convert(folder / "gptq", folder / "decoded", layout="dense", dtype=torch.float32)
        files = {"dense": folder / "dense.gguf", "gptq": folder / "gptq.gguf", "Q4_K_M": folder / "q4.gguf"}
        bitwright.to_gguf(options.model, files["dense"], gguf={"type": "f32"})
        bitwright.to_gguf(folder / "decoded", files["gptq"], gguf={"type": "f32"})
        bitwright.to_gguf(options.model, files["Q4_K_M"], gguf={"type": "Q4_K_M"})
        # The text that holds exactly the windows, for a program that reads text.
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        ids = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        cut = ids[: options.windows * options.length + 64]
        text = folder / "text.txt"
        text.write_text(tokenizer.decode(cut), encoding="utf-8")
        stream = torch.tensor([tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]])
        stride = options.length // 2
        ours = {label: bitwright.load(path, dtype=torch.float32) for label, path in
                (("dense", options.model), ("gptq", folder / "gptq"), ("Q4_K_M", files["Q4_K_M"]))}  # fmt: skip
        theirs = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        for label, path in (("dense", options.model), ("gptq", folder / "gptq"), ("Q4_K_M", files["Q4_K_M"])):
            found = bitwright.evaluate(path, text=text, length=options.length, stride=stride).perplexity
            wanted = documented(theirs if label == "dense" else ours[label], stream, options.length, stride)
            lines.append({"model": label, "against": "transformers", "bitwright": found.perplexity, "peer": wanted})
        first = tokenizer.bos_token_id if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else None
        length = options.length
        whole = stream[0].tolist() if first is None else [first, *stream[0].tolist()]
        chunks = [whole[start : start + length] for start in range(0, options.windows * length, length)]
        if first is not None:
            chunks = [[first, *chunk[1:]] for chunk in chunks]
        wanted_of = llama_perplexity(options.python, list(files.values()), chunks, folder)
        for (label, file), wanted in zip(files.items(), wanted_of, strict=True):
            path = {"dense": options.model, "gptq": folder / "gptq", "Q4_K_M": file}[label]
            found = bitwright.evaluate(
                path, text=text, length=length, convention="llama.cpp", windows=options.windows
            ).perplexity
            lines.append({"model": label, "against": "llama.cpp", "bitwright": found.perplexity, "peer": wanted})
    for line in lines:
        line["relative_difference"] = line["bitwright"] / line["peer"] - 1
        print(json.dumps(line))
    settings = {"length": options.length, "windows": options.windows, "stride": stride, "model": options.model.name}
    settings |= {"calibration": options.calibration.name, "text": options.text.name}
    report = {
        "machine": machine(),
        "peer": "llama.cpp as vendored by llama-cpp-python 0.3.36",
        "settings": settings,
        "results": lines,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
