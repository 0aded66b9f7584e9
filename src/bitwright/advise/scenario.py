"""What somebody wants to do with a model, on which machine: the question that ``advise.recommend`` answers."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.advise.engines import Hardware, engine
from bitwright.errors import InputError

__all__ = ["TASKS", "Scenario", "memory_engine"]

#: task -> in words
TASKS = {
    "chat": "conversation and general text",
    "code": "programs and structured output",
    "long-context": "long documents",
    "arithmetic": "numbers and chains of steps",
    "embedding": "vectors of texts",
    "batch-serving": "many requests at a time",
    "finetune": "training LoRA adapters on the quantized model",
}
#: From this batch on products, not the reading of weights, take the time (NVIDIA Model Optimizer's guide says 16 and more).
LARGE_BATCH = 16
#: No quantized file runs in vLLM on older GPUs (``engines.yaml``).
_VLLM_FROM = 7.5
_GB = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """memory: bytes of the device that the model runs on. engine: None for any. context: tokens of a sequence. batch: sequences at a
    time. kv: format of the KV cache, None for 16 bits.
    """

    hardware: Hardware
    memory: int
    task: str = "chat"
    engine: str | None = None
    context: int = 8192
    batch: int = 1
    kv: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"task '{self.task}' is unknown", mend=f"use one of: {', '.join(TASKS)}")
        if self.context < 1 or self.batch < 1:
            raise InputError(f"context {self.context}, batch {self.batch}", mend="both must be at least 1")
        if self.memory < 100_000_000:
            raise InputError(f"{self.memory} bytes of memory hold no model", mend="write it like 24GB")
        if self.engine is not None:
            name = engine(self.engine).name
            if self.task == "finetune" and name not in ("peft", "transformers"):
                raise InputError(f"adapters are not trained in {self.engine}", mend="drop --engine: peft does it")
            if name == "peft" and self.task != "finetune":
                raise InputError("peft trains adapters", mend="use --finetune, or another --engine")

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines in question, the likeliest first."""
        if self.task == "finetune":
            return ("peft",)
        if self.engine is not None:
            return (engine(self.engine).name,)
        if self.hardware.capability is None:
            return ("llamacpp",)
        if self.hardware.capability < _VLLM_FROM:
            return ("llamacpp",)
        return ("vllm",) if self.is_large_batch else ("vllm", "llamacpp")

    @property
    def is_large_batch(self) -> bool:
        """Arithmetic, not memory, is what limits the speed."""
        return self.batch >= LARGE_BATCH or self.task == "batch-serving"

    @property
    def is_exact(self) -> bool:
        """Small errors add up or show: one wrong digit, one wrong bracket, a passage that is not found."""
        return self.task in ("arithmetic", "code", "long-context", "embedding")

    def reserve(self, name: str) -> tuple[int, str]:
        """Bytes that are left to others, and why."""
        if self.hardware.is_cpu:
            return min(2 * _GB, self.memory // 4), "for the system and other programs"
        if memory_engine(name) == "vllm":
            return self.memory // 10, "a tenth, near what vLLM leaves free by itself"
        return min(_GB, self.memory // 10), "for the display and other programs"

    def budget(self, name: str) -> int:
        """Bytes that an engine may take."""
        return self.memory - self.reserve(name)[0]


def memory_engine(name: str) -> str:
    """The engine whose memory is forecast in this one's place: those that share its way of holding a model.

    >>> memory_engine("ollama"), memory_engine("peft")
    ('llamacpp', 'transformers')
    """
    return {"ollama": "llamacpp", "llamacpp": "llamacpp", "vllm": "vllm", "sglang": "vllm"}.get(name, "transformers")
