"""Load checkpoints in GPTQModel on the CPU: its own decoded weights, greedy continuations and logits along them.

Runs in GPTQModel's environment; it does not import bitwright. JSON: by folder name the kernels and the continuations, or
``{"refused": message}``. For each folder a file ``<tensors>/<folder name>.safetensors``: ``weight:<module>`` [out, in] as GPTQModel
dequantizes it, and ``logits`` float32 ``[prompts, tokens, vocabulary]``, those that chose the tokens.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def dequantized(module: Any) -> torch.Tensor:
    """Ŵ ``[out, in]`` as the module decodes it for its product."""
    if hasattr(module, "dequantize_weight"):
        weight: torch.Tensor = module.dequantize_weight()
    else:  # AwqTorchLinear
        weight = module._dequantize_weight_for_inference(module.scales, dtype=module.scales.dtype)
    return weight.reshape(module.in_features, module.out_features).T.contiguous()


@torch.inference_mode()
def greedy(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Continuations, and the logits that chose them."""
    ids, cache, logits, chosen = prompts, None, [], []
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[:, -1].float())
        ids = logits[-1].argmax(-1, keepdim=True)
        chosen.append(ids)
    return torch.cat(chosen, dim=1), torch.stack(logits, dim=1)


def examine(arguments: argparse.Namespace, folder: Path, prompts: torch.Tensor) -> dict[str, Any]:
    """What GPTQModel makes of one folder; its tensors go to a file."""
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, arguments.dtype)
    try:
        if arguments.backend == "transformers":
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, device_map="cpu").eval()
        else:
            model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND(arguments.backend), dtype=dtype).model
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    tensors = {}
    if arguments.backend != "transformers":  # whose kernels have no decoder of their own
        tensors = {f"weight:{name}": dequantized(module) for name, module in modules.items()}
    tokens, tensors["logits"] = greedy(model, prompts, arguments.tokens)
    save_file(tensors, arguments.tensors / f"{folder.name}.safetensors")
    return {"kernels": sorted({type(module).__name__ for module in modules.values()}), "tokens": tokens.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON file: lists of token ids, all of one length")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate after each prompt")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument(
        "--backend", default="gptq_torch", help="gptqmodel.BACKEND, or transformers: its from_pretrained"
    )
    parser.add_argument("--tensors", type=Path, required=True, help="folder")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    prompts = torch.tensor(json.loads(arguments.prompts.read_text(encoding="utf-8")))
    found = {
        "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        "models": {folder.name: examine(arguments, folder, prompts) for folder in arguments.models},
    }
    arguments.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
