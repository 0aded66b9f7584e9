"""Runs in llama.cpp's environment: asks its quantizer, by dry runs, which type it would give each tensor of each file.

python llamacpp_mixtures.py FOLDER OUT.json NAME=FTYPE ...
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path

import llama_cpp

LINE = re.compile(r"\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[[^\]]*\], type =\s*(\w+), size =.*?(?:\((\w+)\))?\s*$")


def types_of(path: Path, ftype: int, imatrix: bool) -> dict[str, str]:
    """Tensor -> type, as the log of a dry run says."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = ftype, 1, True
    if imatrix:
        data = (ctypes.c_float * 1)(1.0)
        entries = (llama_cpp.llama_model_imatrix_data * 2)()
        entries[0].name, entries[0].data, entries[0].size = b"none", data, 1
        entries[1].name = None
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(str(path).encode(), str(path.with_suffix(".out")).encode(), ctypes.byref(params)):
        return {"error": "".join(lines)[-300:]}
    found = {}
    for line in "".join(lines).splitlines():
        match = LINE.search(line)
        if match:
            found[match[1]] = (match[3] or match[2]).upper()
    return found


def main() -> None:
    folder, out, *pairs = sys.argv[1:]
    result: dict[str, dict[str, dict[str, str]]] = {}
    for path in sorted(Path(folder).glob("*.gguf")):
        result[path.stem] = {}
        for pair in pairs:
            name, number = pair.split("=")
            for imatrix in (False, True):
                result[path.stem][name + ("+imatrix" if imatrix else "")] = types_of(path, int(number), imatrix)
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
