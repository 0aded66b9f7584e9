"""Make ``act_order.safetensors``: two linears quantized by GPTQModel with act-order, and the weights that it decodes them to.

Runs in GPTQModel's environment (``.venvs/gptqmodel``, see tests/interop/venvs.py) on a model folder with a tokenizer:

    python make_act_order.py MODEL OUT.safetensors
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def main() -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    source, out = sys.argv[1], Path(sys.argv[2])
    generator = torch.Generator().manual_seed(0)
    # Few distinct tokens: inputs then differ in size from column to column, and the order of columns is not the identity.
    windows = torch.randint(0, 24, (16, 64), generator=generator).tolist()
    config = QuantizeConfig(bits=4, group_size=16, sym=True, desc_act=True, act_group_aware=False)
    with tempfile.TemporaryDirectory() as folder:
        model = GPTQModel.load(source, config, device="cpu")
        model.quantize([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
        model.save(folder)
        written = load_file(Path(folder) / "model.safetensors")
        described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND("gptq_torch"), dtype=torch.float16)
        tensors = {}
        for name in MODULES:
            module = loaded.model.get_submodule(name)
            weight = module.dequantize_weight().reshape(module.in_features, module.out_features).T.contiguous()
            tensors[f"decoded:{name}"] = weight
            tensors |= {key: value for key, value in written.items() if key.startswith(name + ".")}
    keys = (
        "quant_method",
        "bits",
        "group_size",
        "desc_act",
        "sym",
        "checkpoint_format",
        "format",
        "pack_dtype",
        "meta",
    )
    described = {key: described[key] for key in keys if key in described}
    described["meta"] = {"quantizer": described["meta"]["quantizer"]}
    save_file(tensors, out, metadata={"config": json.dumps(described), "gptqmodel": version("gptqmodel")})


if __name__ == "__main__":
    main()
