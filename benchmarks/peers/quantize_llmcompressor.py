"""Quantize a whole model with llm-compressor's GPTQ: symmetric, grouped, on fixed calibration windows.

Runs in llm-compressor's own environment (see README.md). Every Linear but lm_head is quantized; only the number
format is set. Everything else is llm-compressor 0.14's default: dampening_frac=0.01, block_size=128,
actorder="static" (columns are visited by falling Hessian diagonal, scales belong to the plain groups), and the
default weight observer.
"""

from __future__ import annotations

import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from peer_io import emit, quantize_arguments, token_windows, versions
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    arguments = quantize_arguments(__doc__).parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = token_windows(tokenizer, arguments.text, count=arguments.samples, length=arguments.length)
    calibration = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    # One group of settings for every bit width: the named preset schemes ("W4A16") have none for 3 bits.
    number = QuantizationArgs(
        num_bits=arguments.bits, type="int", symmetric=True, strategy="group", group_size=arguments.group_size
    )
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=number)}, ignore=["lm_head"]
    )
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=calibration,
        recipe=recipe,
        max_seq_length=arguments.length,
        num_calibration_samples=arguments.samples,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(arguments.out, save_compressed=True)
    tokenizer.save_pretrained(arguments.out)
    resolved = recipe.resolved_config.config_groups["group_0"].weights
    emit(
        {
            "peer": "llmcompressor",
            "versions": versions(["llmcompressor", "compressed-tensors", "torch", "transformers"]),
            "settings": {
                "dampening_frac": recipe.dampening_frac,
                "block_size": recipe.block_size,
                "weights": resolved.model_dump(mode="json", exclude_none=True) if resolved is not None else None,
            },
            "calibration": {"file": arguments.text.name, "windows": arguments.samples, "length": arguments.length},
            "seconds_quantize": seconds,
            "bytes": sum(file.stat().st_size for file in arguments.out.glob("*.safetensors")),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
