"""Whole files against llama.cpp's own quantizer: the same types, the same bytes; and what it makes of the files that we write."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.interop.venvs import python
from tests.mixture_models import SKELETONS

import bitwright
from bitwright.gguf.mixture import MIXTURES
from bitwright.io.gguf_file import GgufFile

pytestmark = pytest.mark.interop
HERE = Path(__file__).parent
PEERS = HERE.parents[1] / "benchmarks" / "peers"
MODEL = Path("examples/storylm-8m")


def run(*arguments: Any) -> None:
    subprocess.run([str(python("llamacpp")), *map(str, arguments)], check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model in F32, and an importance matrix of some of its text."""
    folder = tmp_path_factory.mktemp("base")
    text = folder / "text.txt"
    text.write_text(Path("examples/storylm-8m-selfgen.txt").read_text()[:60_000])
    bitwright.to_gguf(MODEL, folder / "f32.gguf", gguf={"type": "f32"})
    matrix = bitwright.collect_imatrix(MODEL, folder / "imatrix.gguf", text=text, samples=16, length=256)
    np.savez(folder / "imatrix.npz", **{name: sums.weights().reshape(-1) for name, sums in matrix.entries.items()})
    return folder / "f32.gguf", folder / "imatrix.gguf"


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("kind", [name for name in MIXTURES if name not in ("F32", "F16", "BF16", "MXFP4_MOE")])
def test_files_hold_the_types_and_bytes_of_llama_quantize(
    kind: str, weighted: bool, base: tuple[Path, Path], tmp_path: Path
) -> None:
    if not weighted and kind in (
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ1_S",
        "IQ1_M",
        "IQ3_XXS",
        "IQ2_M",
        "Q2_K_S",
        "IQ3_XS",
    ):
        pytest.skip("llama.cpp wants an importance matrix for it")
    source, matrix = base
    extra = [matrix.with_suffix(".npz")] if weighted else []
    run(PEERS / "llamacpp_quantize.py", source, tmp_path / "theirs.gguf", MIXTURES[kind].number, *extra)
    choice = {"type": kind, **({"imatrix": str(matrix)} if weighted else {})}
    bitwright.to_gguf(MODEL, tmp_path / "ours.gguf", gguf=choice)
    with GgufFile.open(tmp_path / "ours.gguf") as ours, GgufFile.open(tmp_path / "theirs.gguf") as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        types = {name: (tensor.block.name, theirs.tensors[name].block.name) for name, tensor in ours.tensors.items()}
        assert not {name: pair for name, pair in types.items() if pair[0] != pair[1]}
        assert not [name for name in ours.tensors if not np.array_equal(ours.raw(name), theirs.raw(name))]


def test_the_stored_types_of_the_mixtures_are_still_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for skeleton in SKELETONS:
        skeleton.write(folder)
    run(
        HERE / "llamacpp_mixtures.py",
        folder,
        tmp_path / "out.json",
        *(f"{m.name}={m.number}" for m in MIXTURES.values()),
    )
    found = json.loads((tmp_path / "out.json").read_text())
    stored = json.loads(gzip.decompress((HERE.parent / "data" / "llamacpp_mixtures.json.gz").read_bytes()))["models"]
    for name, mixtures in found.items():
        for mix, types in mixtures.items():
            runs = [kind for kind, count in stored[name][mix] for _ in range(count)]
            assert list(types.values()) == runs, (name, mix)
