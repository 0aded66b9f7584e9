"""How size and quality move with the number of bits: one model, one method, several widths, one table.

python examples/compare_bits.py --samples 8 --windows 8
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import bitwright

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "storylm-8m")
    parser.add_argument("--text", type=Path, default=HERE / "storylm-8m-selfgen.txt")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()

    content = options.text.read_text(encoding="utf-8")
    middle = content.find("\n", 2 * len(content) // 3)
    print("bits  bits/weight         bytes  perplexity   mean KL  top-1 equal")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
        calibration.write_text(content[:middle], encoding="utf-8")
        evaluation.write_text(content[middle:], encoding="utf-8")
        # The native layout stores every width; compressed-tensors takes 2, 4 and 8 bits, gptq 2, 3, 4 and 8.
        recipe = bitwright.Recipe(
            method=options.method,
            group_size=options.group_size,
            layout="native",
            calibration={"text": str(calibration), "samples": options.samples},
        )
        for bits in options.bits:
            target = folder / f"{bits}-bit"
            plan = bitwright.quantize(options.model, target, recipe=recipe, bits=bits).plan
            found = bitwright.evaluate(target, against=options.model, text=evaluation, windows=options.windows).quality
            print(
                f"{bits:4}  {plan.quantized_bits_per_weight:11.3f}  {plan.weight_file_bytes:12}"
                f"  {found.model.perplexity:10.2f}  {found.kl.mean:8.5f}  {100 * found.top1:9.2f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
