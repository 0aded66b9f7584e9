"""Quantize a model with llm-compressor and decode the file with what it brings along. Runs in llm-compressor's environment.

Folders ``<out>/<recipe>`` hold the checkpoints; ``<out>/<recipe>.safetensors`` the weights ``<module>.weight`` as transformers and
compressed-tensors decode them in the dtype given.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: recipe -> weight settings, of GPTQ ("gptq") or round-to-nearest
RECIPES: dict[str, dict[str, Any]] = {
    "gptq-4-symmetric": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128},
    "rtn-4-asymmetric": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 128},
    "rtn-8-channel": {"num_bits": 8, "symmetric": True, "strategy": "channel"},
}


def quantize(recipe: str, arguments: argparse.Namespace, windows: list[list[int]]) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    modifier = GPTQModifier if recipe.startswith("gptq") else QuantizationModifier
    group = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **RECIPES[recipe]))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    rows = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=modifier(config_groups={"group_0": group}, ignore=["lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )
    model.save_pretrained(arguments.out / recipe, save_compressed=True)


@torch.inference_mode()
def decode(recipe: str, arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # Symmetric files are decoded by the first forward pass; asymmetric ones load in the other mode alone.
    options = {} if RECIPES[recipe]["symmetric"] else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        arguments.out / recipe, dtype=getattr(torch, arguments.dtype), **options
    )
    model(input_ids=torch.tensor([[1, 2, 3]]))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = {f"{n}.weight": m.weight.detach().clone() for n, m in linears.items() if n != "lm_head"}
    save_file(weights, arguments.out / f"{recipe}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON file: lists of token ids to calibrate on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", choices=sorted(RECIPES), nargs="+", default=sorted(RECIPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    windows = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    for recipe in arguments.recipes:
        quantize(recipe, arguments, windows)
        decode(recipe, arguments)
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    arguments.json.write_text(json.dumps({name: version(name) for name in names}), encoding="utf-8")


if __name__ == "__main__":
    main()
