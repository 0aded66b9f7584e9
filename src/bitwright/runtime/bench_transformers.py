"""``bench`` in transformers: greedy decoding by explicit steps over its KV cache, so that every token has a time of its own."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitwright.evaluation.speed import Arrivals, Stepped

__all__ = ["TransformersModel", "libraries", "load"]


class TransformersModel:
    """A model that ``bitwright.load`` gave, on a device. facts: what the record says about it."""

    def __init__(self, model: Any, device: torch.device, threads: int) -> None:
        self._model = model
        self._device = device
        # Only the last position's logits are wanted, where the class can leave out the others.
        lean = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if lean else {}
        self._cache: Any = None
        self._tokens = torch.empty(0)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.facts = {
            "dtype": str(dtype).removeprefix("torch."), "device": str(device), "threads": threads,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitwright")},
        }  # fmt: skip

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Callable[[], float]) -> Arrivals:
        """See ``evaluation.speed.Engine``."""
        with torch.inference_mode():
            found = Stepped(self).generate(prompts, new_tokens, clock)
        self._cache = None
        return found

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """The prompts, and the first token of each."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        self._run(torch.tensor(prompts, device=self._device))

    def step(self) -> None:
        """One more token."""
        self._run(self._tokens)

    def _run(self, ids: torch.Tensor) -> None:
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._options)
        self._tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        if self._device.type == "cuda":
            # Kernels run on; the token is there when they are done.
            torch.cuda.synchronize(self._device)

    def reset_device_peak(self) -> None:
        """Let the device's peak begin anew."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def device_peak(self) -> int | None:
        """Peak of memory that torch holds on the device; None on a CPU."""
        return int(torch.cuda.max_memory_allocated(self._device)) if self._device.type == "cuda" else None


def libraries() -> None:
    """Import what loading needs."""
    for name in (
        "transformers.models.auto.modeling_auto",
        "transformers.modeling_utils",
        "bitwright.api",
        "bitwright.runtime.load",
    ):
        importlib.import_module(name)


def load(request: Mapping[str, Any]) -> TransformersModel:
    """Load ``request["model"]``. device: auto, cpu or cuda; kernel: as for ``bitwright.load``."""
    from bitwright.api import load as load_model

    wanted = request["device"]
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"]) if request.get("dtype") else None
    # Packed products are those of the CPU.
    kernel = "auto" if device.type == "cpu" else "reference"
    model = load_model(Path(request["model"]), dtype=dtype, kernel=kernel).to(device)
    return TransformersModel(model, device, request["threads"])
