"""A Llama in float64, written out with explicit names: what the references of transforms calibrate and measure with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

#: ``(name of a linear, its input) -> its output``
Project = Callable[[str, torch.Tensor], torch.Tensor]


def truncated(source: Path, folder: Path, blocks: int) -> Path:
    """The first blocks of a stored Llama as a model of its own."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    tensors = load_file(source / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.") or int(n.split(".")[2]) < blocks}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Llama:
    """weights: tensors under their names on disk, float64; changed in place by the references."""

    def __init__(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        config = json.loads((folder / "config.json").read_text())
        stored = weights if weights is not None else load_file(folder / "model.safetensors")
        self.weights = {name: value.double() for name, value in stored.items()}
        self.blocks, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.groups, self.width = config["num_key_value_heads"], config["head_dim"]
        self.eps, self.theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[name + ".weight"].T

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[name + ".weight"]

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of ``(tokens, heads, width)``."""
        half = self.width // 2
        angle = torch.outer(
            torch.arange(len(x), dtype=torch.float64), self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        )
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def attention(self, i: int, x: torch.Tensor, project: Project) -> torch.Tensor:
        """``x (tokens, hidden)`` after the norm, one sequence."""
        lead, tokens = f"model.layers.{i}.self_attn.", len(x)
        q = self.rotated(project(lead + "q_proj", x).view(tokens, self.heads, self.width))
        k = self.rotated(project(lead + "k_proj", x).view(tokens, self.groups, self.width))
        v = project(lead + "v_proj", x).view(tokens, self.groups, self.width)
        out = torch.zeros(tokens, self.heads, self.width, dtype=torch.float64)
        later = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), 1)
        for head in range(self.heads):
            group = head // (self.heads // self.groups)
            scores = (q[:, head] @ k[:, group].T / self.width**0.5).masked_fill(later, -torch.inf)
            out[:, head] = scores.softmax(-1) @ v[:, group]
        return project(lead + "o_proj", out.view(tokens, -1))

    def mlp(self, i: int, x: torch.Tensor, project: Project) -> torch.Tensor:
        lead = f"model.layers.{i}.mlp."
        gate = torch.nn.functional.silu(project(lead + "gate_proj", x))
        return project(lead + "down_proj", gate * project(lead + "up_proj", x))

    def block(self, i: int, x: torch.Tensor, project: Project | None = None) -> torch.Tensor:
        project = project or self.project
        lead = f"model.layers.{i}."
        x = x + self.attention(i, self.norm(lead + "input_layernorm", x), project)
        return x + self.mlp(i, self.norm(lead + "post_attention_layernorm", x), project)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.weights["model.embed_tokens.weight"][tokens]

    def log_probabilities(self, tokens: torch.Tensor, project: Project | None = None) -> torch.Tensor:
        """``(tokens, vocabulary)`` for one sequence ``(tokens,)``."""
        x = self.embed(tokens)
        for i in range(self.blocks):
            x = self.block(i, x, project)
        return (self.norm("model.norm", x) @ self.weights["model.embed_tokens.weight"].T).log_softmax(-1)

    def linears(self, i: int) -> list[str]:
        names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        return [f"model.layers.{i}.{name}" for name in names]


def divergence(reference: Llama, other: Llama, windows: torch.Tensor, project: Project | None = None) -> float:
    """Mean KL(reference || other) in nats per token over ``windows (count, tokens)``."""
    total = 0.0
    for tokens in windows:
        a, b = reference.log_probabilities(tokens), other.log_probabilities(tokens, project)
        total += float((a.exp() * (a - b)).sum(-1).mean())
    return total / len(windows)
