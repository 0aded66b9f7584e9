"""The child process of ``runtime.bench``: loads one model in one engine, generates, and writes down when each token came.

One JSON request on standard input; JSON lines as answers: ``loaded``, then ``batch`` for every batch size, then ``done``, or ``error``.
Whatever libraries print goes to standard error. When standard input ends, the parent is gone, and the child ends itself.

This file is also run by interpreters that have no bitwright (vLLM's own environment), so it imports none of it at the top.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["main", "peak_resident", "reset_peak"]


def main() -> int:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")

    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    request = json.loads(line)
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        _answer(request, say)
    except BaseException as error:  # whatever an engine raises is the answer
        say({"error": _words(error)})
        return 0
    say({"done": True})
    # Engines leave threads and native state behind whose destructors have crashed; everything is said.
    os._exit(0)


def _follow_parent() -> None:
    """End with the parent: it holds the other end of standard input as long as it lives."""
    sys.stdin.buffer.read()
    os._exit(1)


def _answer(request: dict[str, Any], say: Any) -> None:
    engine = request["engine"]
    module = _beside("bench_vllm") if engine == "vllm" else importlib.import_module(f"bitwright.runtime.bench_{engine}")
    # Importing is no part of loading a model.
    module.libraries()
    began = time.perf_counter()
    model = module.load(request)
    say({"loaded": {"milliseconds": 1000 * (time.perf_counter() - began), **model.facts}})
    for prompts in request["prompts"]:
        gc.collect()
        reset_peak()
        model.reset_device_peak()
        for _ in range(request["warmup"]):
            model.generate(prompts, request["new_tokens"], time.perf_counter)
        runs = [
            model.generate(prompts, request["new_tokens"], time.perf_counter) for _ in range(request["repetitions"])
        ]
        found = {"size": len(prompts), "arrivals": runs, "resident": peak_resident(), "device": model.device_peak()}
        say({"batch": found})


def _beside(name: str) -> Any:
    """A module of this folder, by its file: the package it belongs to may not be installed here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _words(error: BaseException) -> str:
    """An error in words: ours with its mend, others with their kind."""
    message = getattr(error, "message", None)
    if isinstance(message, str):
        mend = getattr(error, "mend", None)
        return f"{message} ({mend})" if mend else message
    return f"{type(error).__name__}: {error}"


def reset_peak() -> None:
    """Let the peak of resident memory begin anew, where the system can (Linux); else it is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_resident() -> int:
    """Peak of resident memory in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
