"""Skeletons of models on which mixtures are compared with llama.cpp's: header and tensor table, no data worth reading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitwright.blocks.types import TYPES
from bitwright.gguf.mixture import Facts, by_layer
from bitwright.io.gguf_values import GgufValue, boolean, f32, f32s, i32s, string, strings, u32
from bitwright.io.gguf_writer import GgufEntry, GgufWriter, plan_gguf

__all__ = ["SKELETONS", "Skeleton"]


@dataclass(frozen=True)
class Skeleton:
    """One model of an architecture that llama.cpp knows."""

    name: str
    architecture: str = "llama"
    blocks: int = 8
    heads: int = 8
    kv_heads: int = 8
    width: int = 256
    experts: int = 0
    tied: bool = False

    @property
    def facts(self) -> Facts:
        return Facts(
            architecture=self.architecture,
            blocks=self.blocks,
            heads=self.heads,
            kv_heads=self.kv_heads,
            experts=self.experts,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, rows first."""
        w, kv = self.width, self.width // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, w), "output_norm.weight": (w,)}
        if not self.tied:
            found["output.weight"] = (64, w)
        for i in range(self.blocks):
            block: dict[str, tuple[int, ...]] = {"attn_norm.weight": (w,), "ffn_norm.weight": (w,)}
            if self.architecture == "falcon":
                block |= {"attn_qkv.weight": (w + 2 * kv, w)}
            else:
                block |= {"attn_q.weight": (w, w), "attn_k.weight": (kv, w), "attn_v.weight": (kv, w)}
            block["attn_output.weight"] = (w, w)
            if self.experts:
                block["ffn_gate_inp.weight"] = (self.experts, w)
                block |= {f"ffn_{part}_exps.weight": (self.experts, w, w) for part in ("gate", "up", "down")}
            elif self.architecture == "falcon":
                block |= {f"ffn_{part}.weight": (w, w) for part in ("up", "down")}
            else:
                block |= {f"ffn_{part}.weight": (w, w) for part in ("gate", "up", "down")}
            found |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
        return {name: found[name] for name in sorted(found, key=by_layer)}

    def write(self, folder: Path) -> Path:
        """The skeleton as a file of zeros."""
        a = self.architecture
        values: dict[str, GgufValue] = {
            "general.architecture": string(a),
            f"{a}.block_count": u32(self.blocks),
            f"{a}.context_length": u32(128),
            f"{a}.embedding_length": u32(self.width),
            f"{a}.feed_forward_length": u32(self.width),
            f"{a}.attention.head_count": u32(self.heads),
            f"{a}.attention.head_count_kv": u32(self.kv_heads),
            f"{a}.attention.layer_norm_rms_epsilon": f32(1e-5),
            f"{a}.attention.layer_norm_epsilon": f32(1e-5),
            f"{a}.rope.dimension_count": u32(self.width // self.heads),
            "tokenizer.ggml.model": string("llama"),
            "tokenizer.ggml.tokens": strings([f"t{i}" for i in range(64)]),
            "tokenizer.ggml.scores": f32s([0.0] * 64),
            "tokenizer.ggml.token_type": i32s([1] * 64),
            "tokenizer.ggml.add_bos_token": boolean(False),
        }
        if self.experts:
            values[f"{a}.expert_count"] = u32(self.experts)
            values[f"{a}.expert_used_count"] = u32(2)
        plain = {
            name: TYPES["F32" if len(shape) == 1 or "gate_inp" in name else "F16"]
            for name, shape in self.shapes().items()
        }
        entries = [GgufEntry(name, shape, plain[name]) for name, shape in self.shapes().items()]
        with GgufWriter(folder, plan_gguf(values, entries, stem=self.name)) as writer:
            writer.sync()
        return folder / f"{self.name}.gguf"


SKELETONS = (
    *(Skeleton(f"llama-{n}-{kv}", blocks=n, kv_heads=kv) for n in (8, 32, 80) for kv in (8, 2)),
    Skeleton("llama-tied", tied=True, kv_heads=4),
    Skeleton("llama-narrow", width=288),
    Skeleton("llama-odd", width=264),
    Skeleton("mixtral", blocks=32, kv_heads=2, experts=8),
    Skeleton("moe-4", blocks=12, kv_heads=4, experts=4),
    Skeleton("falcon", "falcon", blocks=32, kv_heads=1),
    Skeleton("qwen2-80", "qwen2", blocks=80, kv_heads=4),
)
