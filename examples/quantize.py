"""Quantize a checkpoint from Python, measure it against its source, and generate with the packed weights.

python examples/quantize.py --samples 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import bitwright

HERE = Path(__file__).parent


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """Two thirds of a text for calibration, one third for evaluation: nothing is measured on what it was fitted to."""
    content = text.read_text(encoding="utf-8")
    middle = content.find("\n", 2 * len(content) // 3)
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / "calibration.txt", folder / "evaluation.txt"
    parts[0].write_text(content[:middle], encoding="utf-8")
    parts[1].write_text(content[middle:], encoding="utf-8")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "storylm-8m")
    parser.add_argument("--text", type=Path, default=HERE / "storylm-8m-selfgen.txt")
    parser.add_argument("--output", type=Path, default=Path("out/example"))
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()

    calibration, evaluation = split(options.text, options.output)
    target = options.output / "gptq-4bit"
    try:
        result = bitwright.quantize(
            options.model,
            target,
            method="gptq",
            bits=4,
            group_size=128,
            calibration={"text": str(calibration), "samples": options.samples},
            overwrite=True,
        )
    except bitwright.BitwrightError as error:
        raise SystemExit(f"{error.message}; {error.mend}") from error
    print(f"{result.plan.weight_file_bytes} bytes, {result.plan.quantized_bits_per_weight:.3f} bits per weight")
    for note in result.notes:
        print("note:", note)

    found = bitwright.evaluate(target, against=options.model, text=evaluation, windows=8).quality
    print(f"perplexity {found.source.perplexity:.2f} -> {found.model.perplexity:.2f}, mean KL {found.kl.mean:.5f}")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = bitwright.load(target, dtype=torch.float32)
    start = tokenizer("The old house", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        tokens = model.generate(start, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main()
