"""The child process of ``runtime.llamacpp``: loads a model with xllamacpp and answers JSON lines on standard input.

Whatever llama.cpp prints goes to standard error; standard output carries answers alone.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from typing import Any

__all__ = ["main"]


def main() -> int:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")

    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    stop = threading.Event()

    def listen() -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if message.get("stop"):
                stop.set()
            else:
                requests.put(message)
        stop.set()
        requests.put(None)

    threading.Thread(target=listen, daemon=True).start()
    first = requests.get()
    if first is None:
        return 0
    try:
        server = _load(first["load"], first["options"])
    except Exception as error:
        # Whatever the binding raises for a file that it does not take is the answer.
        say({"error": str(error) or type(error).__name__, "loading": True})
        return 0
    say({"loaded": True})
    while (message := requests.get()) is not None:
        stop.clear()
        _answer(server, message, say, stop)
    return 0


def _load(path: str, options: Mapping[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = options["context"]
    params.n_gpu_layers = options["gpu_layers"]
    params.n_parallel = 1
    params.warmup = False
    if options["threads"]:
        params.cpuparams.n_threads = options["threads"]
        params.cpuparams_batch.n_threads = options["threads"]
    if options["embeddings"]:
        params.embedding = True
        params.n_batch = params.n_ubatch = options["context"]
        if not options["pooled"]:
            # The file says nothing of it: a text's vector is then the mean over its tokens.
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return xllamacpp.Server(params)


def _answer(server: Any, message: Mapping[str, Any], say: Any, stop: threading.Event) -> None:
    request = message["request"]
    handle = {
        "complete": server.handle_completions,
        "chat": server.handle_chat_completions,
        "embed": server.handle_embeddings,
    }[message["ask"]]
    failed: list[str] = []

    def piece(chunk: Any) -> bool:
        """Pass a piece on; True stops the generation."""
        for part in chunk if isinstance(chunk, list) else [chunk]:
            if isinstance(part, Mapping) and "error" in part:
                failed.append(_text(part["error"]))
            else:
                say({"answer": part})
        return stop.is_set()

    try:
        if request.get("stream"):
            handle(request, piece)
        else:
            piece(handle(request))
    except Exception as error:
        failed.append(str(error) or type(error).__name__)
    say({"error": failed[0]} if failed else {"done": True})


def _text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, Mapping) else str(error)


if __name__ == "__main__":
    sys.exit(main())
