"""How much memory a model takes while it runs or is trained, part by part, from sizes alone.

``forecast_serving`` and ``forecast_training`` add up what ``advise`` counts elsewhere (weights, KV cache, activations) and say in
sentences what they assumed. ``benchmarks/memory_forecast.py`` compares them with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitwright.advise import activations, training
from bitwright.advise.decoder import ModelShape
from bitwright.advise.kv_cache import kv_cache_bytes, kv_cache_note
from bitwright.advise.weights import WeightBytes
from bitwright.errors import InputError

__all__ = ["MemoryForecast", "forecast_serving", "forecast_training"]

_ITEM = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Bytes, part by part. weights: codes and everything plain inside the blocks; scales: scales, zero points, padding.

    activations: the largest intermediate results that are alive at a time, weights that are decoded while they are used among them;
    adapters, gradients, optimizer: of training; overhead: the process and its libraries. assumptions: in sentences.
    """

    weights: int = 0
    scales: int = 0
    embeddings: int = 0
    head: int = 0
    kv_cache: int = 0
    activations: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    overhead: int = 0
    assumptions: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return sum(value for _, value in self.parts)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of every part, in this order."""
        return tuple((field.name, getattr(self, field.name)) for field in fields(self) if field.name != "assumptions")

    def fits(self, limit: int) -> bool:
        """True where the total is at most ``limit`` bytes."""
        return self.total_bytes <= limit

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "assumptions": list(self.assumptions), "total_bytes": self.total_bytes}


def forecast_serving(
    shape: ModelShape,
    *,
    weight_bytes: WeightBytes | int,
    context: int = 8192,
    batch: int = 1,
    kv: str = "bf16",
    engine: str = "transformers",
    dtype: str = "bfloat16",
    device: str = "cpu",
    all_logits: bool = False,
) -> MemoryForecast:
    """Peak memory while ``batch`` sequences of ``context`` tokens are read and continued.

    weight_bytes: from ``advise.weights.weight_bytes`` or ``advise.stored``; a plain number where only the sum is known. kv: format of
    the KV cache, one that the engine has. dtype: of the activations. device: a GPU adds its context, a CPU the process. all_logits:
    logits of every position are wanted (evaluation), not of the last alone (generation).
    """
    found = _weights(weight_bytes)
    cache = kv_cache_bytes(shape, context=context, batch=batch, kv=kv, engine=engine)
    item = _item(dtype)
    peak, why = activations.serving(
        shape, context=context, batch=batch, engine=engine, item=item, weights=found, all_logits=all_logits, device=device
    )  # fmt: skip
    overhead, constant = activations.overhead(engine, device, shape.vocab)
    if engine == "llamacpp" and device == "cpu" and found.repacked:
        overhead += found.repacked
        why.append(
            f"llama.cpp keeps a second copy of {found.repacked / 1e6:.0f} MB of weights, in the order its CPU code reads"
        )
    return MemoryForecast(
        weights=found.weights, scales=found.scales, embeddings=found.embeddings, head=found.head, kv_cache=cache, activations=peak,
        overhead=overhead, assumptions=_said(
            shape, found, [kv_cache_note(shape, context=context, engine=engine), *why, constant]
        ),
    )  # fmt: skip


def forecast_training(
    shape: ModelShape,
    *,
    weight_bytes: WeightBytes | int,
    context: int = 2048,
    batch: int = 1,
    finetune: str = "lora",
    lora_rank: int = 16,
    lora_targets: Sequence[str] = training.ALL_LINEAR,
    optimizer: str = "adamw",
    checkpointing: bool = True,
    dtype: str = "bfloat16",
    device: str = "cuda",
) -> MemoryForecast:
    """Peak memory of one training step over ``batch`` sequences of ``context`` tokens in transformers (and peft).

    weight_bytes: of the frozen model for ``lora`` (plain) and ``qlora`` (NF4, ``weight_bytes(shape, layout="bitsandbytes")``), of the
    trained one for ``full``; parameters that are trained are held in float32 for LoRA, as peft does, and in ``dtype`` otherwise.
    lora_targets: roles of the linears with adapters. checkpointing: gradient checkpointing, one layer at a time.
    """
    if finetune not in ("lora", "qlora", "full"):
        raise InputError(f"finetune '{finetune}' is unknown", mend="use lora, qlora or full")
    found = _weights(weight_bytes)
    item = _item(dtype)
    said = []
    if finetune == "full":
        trained, adapters = shape.parameters, 0
        gradients = trained * item
        states = training.optimizer_bytes([trained], optimizer, item)
        said.append(f"every parameter is trained; gradients and {optimizer} states in {dtype}")
    else:
        sizes = training.adapter_sizes(shape, lora_rank, lora_targets)
        adapters = 4 * sum(sizes)
        gradients = 4 * sum(sizes)
        states = training.optimizer_bytes(sizes, optimizer, 4)
        said.append(
            f"LoRA of rank {lora_rank} on {', '.join(lora_targets)}: {sum(sizes):,} trained parameters in float32"
        )
    peak, why = training.activations(
        shape, context=context, batch=batch, item=item, checkpointing=checkpointing, rank=0 if finetune == "full" else lora_rank,
        largest=found.largest,
    )  # fmt: skip
    overhead, constant = activations.overhead("transformers", device, shape.vocab)
    return MemoryForecast(
        weights=found.weights, scales=found.scales, embeddings=found.embeddings, head=found.head, activations=peak, adapters=adapters,
        gradients=gradients, optimizer=states, overhead=overhead, assumptions=_said(shape, found, [*said, *why, constant]),
    )  # fmt: skip


def _weights(given: WeightBytes | int) -> WeightBytes:
    return given if isinstance(given, WeightBytes) else WeightBytes(weights=given, scales=0, embeddings=0, head=0)


def _item(dtype: str) -> int:
    if dtype not in _ITEM:
        raise InputError(f"dtype '{dtype}' is unknown", mend="use bfloat16, float16 or float32")
    return _ITEM[dtype]


def _said(shape: ModelShape, weights: WeightBytes, more: Sequence[str]) -> tuple[str, ...]:
    """What was assumed, beginning with the shape."""
    sizes = (
        f"shape: {shape.layers} layers, width {shape.hidden}, {shape.heads} heads ({shape.kv_heads} of keys), MLP {shape.intermediate}, "
        f"vocabulary {shape.vocab}, {'tied' if shape.tied else 'untied'} head, {shape.parameters:,} parameters"
    )
    lines = [f"{sizes} ({shape.source})" if shape.source else sizes]
    if weights.recipe:
        lines.append(f"weights: {weights.recipe}")
    return (*lines, *(line for line in more if line))
