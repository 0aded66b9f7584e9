"""Runs in llama.cpp's environment: quantize one file with llama.cpp's own quantizer.

    python llamacpp_quantize.py IN.gguf OUT.gguf FTYPE_NUMBER [IMATRIX.npz] [--threads N]

IMATRIX.npz: tensor name -> float32 mean squares of its inputs. Prints the seconds that the quantizer took.
"""

from __future__ import annotations

import argparse
import ctypes
import time

import llama_cpp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("ftype", type=int)
    parser.add_argument("imatrix", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = options.ftype, options.threads
    if options.imatrix:
        data = {name: np.ascontiguousarray(value, np.float32) for name, value in np.load(options.imatrix).items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(data) + 1))()
        for entry, (name, value) in zip(entries, data.items(), strict=False):
            entry.name = name.encode()
            entry.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = value.size
        params.imatrix = entries
    began = time.perf_counter()
    if llama_cpp.llama_model_quantize(options.source.encode(), options.target.encode(), ctypes.byref(params)):
        raise SystemExit("llama.cpp's quantizer failed")
    print(f"{time.perf_counter() - began:.3f}")


if __name__ == "__main__":
    main()
