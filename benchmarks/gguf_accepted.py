"""Damaged GGUF files that our reader accepts, given to llama.cpp in a child process: it may refuse them, it must not die.

python benchmarks/gguf_fuzz.py --count 20000 --seed 5 --accepted-to FOLDER --keep 150 --checked-only --out other.json
python benchmarks/gguf_accepted.py FOLDER --out benchmarks/results/gguf_accepted.json
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from bitwright.errors import InputError, ResourceError
from bitwright.runtime.llamacpp import LlamaCpp, LlamaOptions
from machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    counts = {"loaded": 0, "refused": 0, "died": 0}
    died: dict[str, str] = {}
    for path in sorted(options.folder.glob("*.gguf")):
        try:
            with LlamaCpp.load(path, LlamaOptions(context=64, threads=1, load_seconds=30)):
                counts["loaded"] += 1
        except InputError:
            counts["refused"] += 1
        except ResourceError as error:
            counts["died"] += 1
            died[path.name] = error.message
    report = {"machine": machine(), "xllamacpp": version("xllamacpp"), "counts": counts, "died": died}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(counts)


if __name__ == "__main__":
    main()
