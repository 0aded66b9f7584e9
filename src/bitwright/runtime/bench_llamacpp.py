"""``bench`` in llama.cpp, through xllamacpp: one slot and one streamed request for every sequence of a batch."""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["LlamaCppModel", "libraries", "load", "spread_out"]

_CELLS = 256


class LlamaCppModel:
    """A model in as many slots as the largest batch; made anew where the number of slots changes.

    facts: what the record says about it.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._request = request
        self._slots = 0
        self._server: Any = None
        self.facts = {
            "dtype": "as stored", "device": "cpu" if request["device"] != "cuda" else "cuda", "threads": request["threads"],
            "versions": {"xllamacpp": importlib.metadata.version("xllamacpp")},
        }  # fmt: skip
        self._start(len(request["prompts"][0]))

    def _start(self, slots: int) -> None:
        if slots == self._slots:
            return
        self._server = None
        request = self._request
        each = len(request["prompts"][0][0]) + request["new_tokens"] + 8
        xllamacpp: Any = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = request["model"]
        params.n_parallel = slots
        params.n_ctx = slots * (-(-each // _CELLS) * _CELLS)
        params.n_gpu_layers = 0 if request["device"] != "cuda" else 9999
        params.warmup = False
        # Nothing of a prompt may be remembered from one repetition to the next.
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
        self._server = xllamacpp.Server(params)
        self._slots = slots

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Callable[[], float]
    ) -> tuple[tuple[float, ...], ...]:
        """See ``evaluation.speed.Engine``."""
        self._start(len(prompts))
        streams = [_Stream(list(prompt), new_tokens, clock) for prompt in prompts]
        threads = [threading.Thread(target=stream.ask, args=(self._server,)) for stream in streams]
        began = clock()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return tuple(tuple(time - began for time in stream.times()) for stream in streams)

    def reset_device_peak(self) -> None:
        """llama.cpp does not say what it holds on a GPU."""

    def device_peak(self) -> int | None:
        """None."""
        return None


class _Stream:
    """One request; notes when each piece of the answer comes, and how many tokens there were by then."""

    def __init__(self, prompt: list[int], new_tokens: int, clock: Callable[[], float]) -> None:
        self._request = {
            "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "cache_prompt": False, "timings_per_token": True,
        }  # fmt: skip
        self._wanted = new_tokens
        self._clock = clock
        self._seen: list[tuple[int, float]] = []
        self._failed: str | None = None

    def ask(self, server: Any) -> None:
        """Run the request to its end; an error is kept for ``times``."""
        try:
            server.handle_completions(self._request, self._piece)
        except Exception as error:  # of another thread: raised where the answer is asked for
            self._failed = str(error) or type(error).__name__

    def _piece(self, chunk: Any) -> bool:
        now = self._clock()
        for part in chunk if isinstance(chunk, list) else [chunk]:
            if not isinstance(part, Mapping):
                continue
            if "error" in part:
                self._failed = str(part["error"])
            count = (part.get("timings") or {}).get("predicted_n")
            if count is not None and (not self._seen or count > self._seen[-1][0]):
                self._seen.append((int(count), now))
        return False

    def times(self) -> list[float]:
        """The time of every token."""
        if self._failed is not None:
            raise RuntimeError(f"llama.cpp: {self._failed}")
        if not self._seen:
            raise RuntimeError("llama.cpp gave no tokens")
        return spread_out(self._seen, self._wanted)


def spread_out(seen: Sequence[tuple[int, float]], wanted: int) -> list[float]:
    """Times of single tokens from ``(tokens so far, time)``.

    llama.cpp holds a piece back that ends inside a character; its tokens share the time since the piece before evenly.

    >>> spread_out([(1, 1.0), (3, 2.0)], 3)
    [1.0, 1.5, 2.0]
    """
    found: list[float] = []
    for count, time in seen:
        before, last = len(found), found[-1] if found else time
        new = count - before
        found += [last + (time - last) * (i + 1) / new for i in range(new)]
    return found[:wanted]


def libraries() -> None:
    """Import what loading needs."""
    importlib.import_module("xllamacpp")


def load(request: Mapping[str, Any]) -> LlamaCppModel:
    """Load ``request["model"]``, a GGUF file."""
    return LlamaCppModel(request)
