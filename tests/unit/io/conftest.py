import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(7)
    return {
        "embed": torch.randn(16, 8, generator=generator).to(torch.bfloat16),
        "half": torch.randn(3, 5, generator=generator).to(torch.float16),
        "full": torch.randn(4, 2, 3, generator=generator),
        "codes": torch.randint(0, 256, (7, 3), generator=generator, dtype=torch.uint8),
        "fp8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "fp8b": torch.randn(4, 4, generator=generator).to(torch.float8_e5m2),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def model(tmp_path, tensors) -> Path:
    """A folder with one safetensors file written by the safetensors library."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "time_step_limit": [0.0, float("inf")]}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path, tensors) -> Path:
    """The same tensors in two shards with an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:]), start=1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
