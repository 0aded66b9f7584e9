"""The same bytes, however many threads there are."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from tests.integration.conftest import ENVIRONMENT
from tests.small import STORY, STORY_TEXT, contents

RUN = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from bitwright.cli.main import main
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    """The story model cut down to its first block: real matrix sizes (256 x 256 to 768 x 256) and real activations."""
    folder = shutil.copytree(STORY, tmp_path_factory.mktemp("threads") / "story")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_do_not_depend_on_the_number_of_threads(dtype, one_block, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"compute_dtype: {dtype}\n")
    # Two batches: one of 2048 tokens, and a short one.
    options = ["--recipe", recipe, "--calibration", STORY_TEXT, "--samples", "5", "--length", "512"]
    found = {}
    for threads in (1, 2, 4):
        output = tmp_path / f"out{threads}"
        command = [sys.executable, "-c", RUN, threads, "quantize", one_block, "-o", output, *options]
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
        # Idle threads of OpenMP would otherwise spin on the cores that the others need.
        environment["OMP_WAIT_POLICY"] = "passive"
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found[threads] = contents(output)
    losses = [line["loss"] for line in json.loads((tmp_path / "out1" / "bitwright.json").read_text())["tensors"]]
    assert len(losses) == 7
    assert all(0 < loss < 0.2 for loss in losses)
    assert found[2] == found[1]
    assert found[4] == found[1]
