"""SmoothQuant with static per-tensor inputs as the paper describes it, in plain float64 over a Llama (arXiv:2211.10438, section 4)."""

from __future__ import annotations

import torch

from tests.reference_llama import Llama

#: norm -> the linears that read it
READERS = {
    "input_layernorm": [f"self_attn.{part}_proj" for part in "qkv"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}


def absmax(model: Llama, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Largest magnitude of every input column of every linear: name -> ``(in,)``."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, x: torch.Tensor) -> torch.Tensor:
        now = x.abs().amax(0)
        found[name] = torch.maximum(found[name], now) if name in found else now
        return model.project(name, x)

    for tokens in windows:
        model.log_probabilities(tokens, note)
    return found


def factors(model: Llama, largest: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """Equation 4 for every norm that feeds linears: name of the norm -> ``(hidden,)``."""
    result = {}
    for i in range(model.blocks):
        lead = f"model.layers.{i}."
        for norm, readers in READERS.items():
            x = largest[lead + readers[0]]
            w = torch.stack([model.weights[f"{lead}{reader}.weight"].abs().amax(0) for reader in readers]).amax(0)
            result[lead + norm] = x**alpha / w ** (1 - alpha)
    return result


def smooth(model: Llama, scales: dict[str, torch.Tensor]) -> None:
    """Divide the norms and multiply the columns of what they feed, in place."""
    for norm, scale in scales.items():
        lead, _, leaf = norm.rpartition(".")
        model.weights[f"{norm}.weight"] = model.weights[f"{norm}.weight"] / scale
        for reader in READERS[leaf]:
            model.weights[f"{lead}.{reader}.weight"] = model.weights[f"{lead}.{reader}.weight"] * scale


def quantize_weights(model: Llama) -> None:
    """int8 per output channel, symmetric, in place."""
    for i in range(model.blocks):
        for name in model.linears(i):
            w = model.weights[f"{name}.weight"]
            scale = w.abs().amax(1, keepdim=True) / 127
            model.weights[f"{name}.weight"] = (w / scale).round().clamp(-128, 127) * scale


def static_inputs(model: Llama, scales: dict[str, float]):
    """A projection whose inputs are rounded to int8 with one measured scale a layer."""

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return model.project(name, (x / scales[name]).round().clamp(-128, 127) * scales[name])

    return project
