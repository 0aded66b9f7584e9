"""Every architecture in llama.cpp: the logits of an F32 GGUF file against transformers' in float32."""

import json

import numpy as np
import pytest
import torch
from tests.gguf_zoo import MODELS, make, mean_divergence, relative_error, write_gguf
from tests.interop.venvs import run

TOKENS = [(7 * place * place + 3 * place + 11) % 256 for place in range(24)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All models in one call of llama.cpp: name -> (llama.cpp's rows, the folder)."""
    base = tmp_path_factory.mktemp("models")
    jobs, folders = [], {}
    for name in MODELS:
        folder = folders[name] = make(name, base / name)
        gguf = base / f"{name}.gguf"
        write_gguf(folder, gguf)
        jobs.append(
            {"gguf": str(gguf), "tokens": TOKENS, "npy": str(base / f"{name}.npy"), "embeddings": name == "bert"}
        )
    job = base / "job.json"
    job.write_text(json.dumps(jobs))
    run("llamacpp", "llamacpp_run.py", job)
    return {name: (np.load(base / f"{name}.npy"), folders[name]) for name in MODELS}


def expected(folder, tokens, name):
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.tensor([tokens]))
    return (out.last_hidden_state if name == "bert" else out.logits)[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_llamacpp_computes_what_transformers_does(name, results, report):
    found, folder = results[name]
    wanted = expected(folder, TOKENS, name)
    error = relative_error(found, wanted)
    divergence = mean_divergence(found, wanted) if name != "bert" else 0.0
    report(f"KL {divergence:.2e}, relative error {error:.2e}")
    assert found.std() > 1e-3
    assert error < 1e-2
    assert divergence < 1e-5
