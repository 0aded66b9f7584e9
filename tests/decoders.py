"""What stored tensors mean, written out from each format's specification with none of bitwright's code: decoders for tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def fields(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """``(n, words)`` int32 to ``(n, words * 32 / bits)``, least significant field first; bits divide 32."""
    shifts = torch.arange(0, 32, bits)
    return ((words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def gptq(tensors: Tensors, name: str, *, bits: int = 4, shift: int = 1) -> torch.Tensor:
    """shift: 1 in v1 files, 0 in gptq_v2."""
    codes = fields(tensors[f"{name}.qweight"].T, bits)
    zero = fields(tensors[f"{name}.qzeros"], bits).T + shift
    index, scale = tensors[f"{name}.g_idx"].long(), tensors[f"{name}.scales"].float().T
    return (codes - zero[:, index]).float() * scale[:, index]


def awq(tensors: Tensors, name: str) -> torch.Tensor:
    def columns(words: torch.Tensor) -> torch.Tensor:
        plain = fields(words)
        out = torch.empty_like(plain)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, column::8] = plain[:, nibble::8]
        return out

    codes, zero, scale = (
        columns(tensors[f"{name}.qweight"]),
        columns(tensors[f"{name}.qzeros"]),
        tensors[f"{name}.scales"],
    )
    repeat = len(codes) // len(scale)
    return ((codes - zero.repeat_interleave(repeat, 0)).float() * scale.float().repeat_interleave(repeat, 0)).T


def pack_quantized(tensors: Tensors, name: str, *, bits: int = 4) -> torch.Tensor:
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = fields(tensors[f"{name}.weight_packed"], bits)[:, :columns] - 2 ** (bits - 1)
    scale = tensors[f"{name}.weight_scale"].float()
    zero = torch.zeros(scale.shape, dtype=torch.int64)
    if f"{name}.weight_zero_point" in tensors:
        zero = fields(tensors[f"{name}.weight_zero_point"].T, bits).T[:rows] - 2 ** (bits - 1)
    repeat = columns // scale.shape[1]
    return (codes - zero.repeat_interleave(repeat, 1)).float() * scale.repeat_interleave(repeat, 1)


def int_quantized(tensors: Tensors, name: str) -> torch.Tensor:
    return tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].float()


def bitsandbytes_int8(tensors: Tensors, name: str) -> torch.Tensor:
    return tensors[f"{name}.weight"].float() * (tensors[f"{name}.SCB"].float().unsqueeze(1) / 127)


def native(tensors: Tensors, name: str, *, bits: int = 4) -> torch.Tensor:
    """Affine schemes alone."""
    rows, columns = tensors[f"{name}.weight.shape"].tolist()
    codes = fields(tensors[f"{name}.weight.codes"], bits)[:, :columns]
    scale = tensors[f"{name}.weight.scale"].float().expand(rows, -1)
    zero = tensors.get(f"{name}.weight.zero", torch.full((1, 1), 2 ** (bits - 1))).long().expand(scale.shape)
    repeat = columns // scale.shape[1]
    return (codes - zero.repeat_interleave(repeat, 1)).float() * scale.repeat_interleave(repeat, 1)
