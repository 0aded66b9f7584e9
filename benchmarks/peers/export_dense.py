"""Decode a peer's quantized folder to dense weights under the reference model's tensor names.

Reads the packed bytes directly, with numpy, torch and safetensors; no peer library is needed, so that a peer's files
are judged by what they say, not by what its own loader makes of them. Knows two layouts:

gptq (GPTQModel): per linear `qweight` (in·bits/32, out) int32, packed along the inputs; `qzeros` (groups,
out·bits/32) int32, packed along the outputs; `scales` (groups, out); `g_idx` (in). Both are one contiguous
little-endian bit stream (3-bit values straddle words). checkpoint_format "gptq" stores zero points less one,
"gptq_v2" as they are. w = (q - zero) · scale.

compressed-tensors "pack-quantized" (llm-compressor): `weight_packed` (out, ceil(in·bits/32)) int32, one contiguous
little-endian bit stream along the inputs, offset by 2^(bits-1); `weight_scale` (out, groups); `weight_shape`;
optional `weight_zero_point` (packed along the outputs) and `weight_g_idx`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def unpack_bits(words: torch.Tensor, *, bits: int, count: int) -> torch.Tensor:
    """The first `count` values of `bits` bits in each row of int32 words, lowest bits first: (rows, count) int64.

    >>> unpack_bits(torch.tensor([[0b10_001_010]], dtype=torch.int32), bits=3, count=3)
    tensor([[2, 1, 2]])
    >>> unpack_bits(torch.tensor([[-1, 0]], dtype=torch.int32), bits=3, count=12).tolist()[0][9:]  # 10th of 32 bits
    [7, 3, 0]
    """
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    start = torch.arange(count, dtype=torch.int64) * bits
    word, shift = start // 32, start % 32
    # A value may straddle two words; the word after the last is never needed, so any other stands in for it.
    following = (word + 1).clamp(max=words.shape[1] - 1)
    low = unsigned[:, word] >> shift
    high = torch.where(shift + bits > 32, unsigned[:, following] << (32 - shift), 0)
    return (low | high) & ((1 << bits) - 1)


def decode_gptq(parts: dict[str, torch.Tensor], *, bits: int, v1: bool) -> torch.Tensor:
    """One linear of the gptq layout: (out, in) float32."""
    scales = parts["scales"].float()
    group = parts["g_idx"].long()
    codes = unpack_bits(parts["qweight"].T.contiguous(), bits=bits, count=len(group))
    zeros = unpack_bits(parts["qzeros"], bits=bits, count=scales.shape[1])
    if v1:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return (codes - zeros[group].T).float() * scales[group].T


def decode_pack_quantized(parts: dict[str, torch.Tensor], *, bits: int) -> torch.Tensor:
    """One linear of compressed-tensors' pack-quantized layout: (out, in) float32."""
    rows, columns = (int(size) for size in parts["weight_shape"])
    scale = parts["weight_scale"].float().reshape(rows, -1)
    groups = scale.shape[1]
    group = parts["weight_g_idx"].long() if "weight_g_idx" in parts else torch.arange(columns) // (columns // groups)
    offset = 1 << (bits - 1)
    codes = unpack_bits(parts["weight_packed"], bits=bits, count=columns) - offset
    if "weight_zero_point" in parts:
        packed = parts["weight_zero_point"].T.contiguous()
        codes = codes - (unpack_bits(packed, bits=bits, count=rows) - offset).T[:, group]
    return codes.float() * scale[:, group]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, by name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            found.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return found


def dense_weights(
    stored: dict[str, torch.Tensor], names: list[str], config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, weight, was it quantized?) for every tensor of the reference model."""
    method = config["quant_method"]
    for name in names:
        if name in stored:
            yield name, stored[name], False
            continue
        stem = name.removesuffix("weight")
        parts = {key.removeprefix(stem): value for key, value in stored.items() if key.startswith(stem)}
        if method == "gptq" and "qweight" in parts:
            if config["bits"] not in (2, 3, 4, 8):
                raise SystemExit(
                    f"{name}: {config['bits']} bits are stored split by bit plane, which is not decoded here"
                )
            yield name, decode_gptq(parts, bits=config["bits"], v1=config["checkpoint_format"] == "gptq"), True
        elif method == "compressed-tensors" and "weight_packed" in parts:
            (settings,) = config["config_groups"].values()
            yield name, decode_pack_quantized(parts, bits=settings["weights"]["num_bits"]), True
        else:
            raise SystemExit(f"{name}: neither dense nor in a known packed layout; found {sorted(parts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the peer's quantized folder")
    parser.add_argument("--reference", type=Path, required=True, help="the dense model, for the names and shapes")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the decoded weights")
    arguments = parser.parse_args()

    config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    stored, reference = tensors(arguments.model), tensors(arguments.reference)
    result: dict[str, torch.Tensor] = {}
    quantized_names: list[str] = []
    changed: list[str] = []
    error = energy = 0.0
    for name, weight, quantized in dense_weights(stored, list(reference), config):
        if weight.shape != reference[name].shape:
            raise SystemExit(f"{name}: {tuple(weight.shape)} where the reference has {tuple(reference[name].shape)}")
        if quantized:
            quantized_names.append(name)
            error += float((weight - reference[name].float()).square().sum())
            energy += float(reference[name].float().square().sum())
        elif not torch.equal(weight, reference[name]):
            changed.append(name)
        result[name] = (weight.to(DTYPES[arguments.dtype]) if quantized else weight).contiguous()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(result, arguments.out, metadata={"format": "pt"})
    print(
        json.dumps(
            {
                "quantized": len(quantized_names),
                "copied": len(result) - len(quantized_names),
                "copied_but_changed": changed,
                "weight_error_relative": error / energy if energy else None,
            }
        )
    )


if __name__ == "__main__":
    main()
