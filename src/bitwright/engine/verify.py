"""Verification: what was written is opened anew and must decode to what was computed, before anything is published."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bitwright.engine.blockwise import cast_call
from bitwright.engine.calibration import CalibrationTokens
from bitwright.engine.inputs import InputSchemes, quantized_inputs
from bitwright.engine.journal import Commit
from bitwright.engine.plan import Plan
from bitwright.engine.tensors import CHUNK_ELEMENTS, bytes_of, decoded_hash
from bitwright.errors import BitwrightError, VerifyError
from bitwright.io.heap import release_free_memory
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.model.blocks import BlockRunner
from bitwright.model.names import NameMap, map_names
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint

__all__ = ["verify"]


def verify(
    folder: Path,
    plan: Plan,
    commits: Sequence[Commit],
    tokens: CalibrationTokens | None,
    activations: torch.Tensor | None,
) -> None:
    """Re-open ``folder`` and compare with the run that wrote it.

    Every tensor's hash, and for calibrated runs the activations of one batch after the last block. Raises VerifyError naming
    the first tensor that differs; nothing is published then.
    """
    mend = "run it again; if it repeats, the disk or the memory is faulty"
    try:
        opened = open_checkpoint(folder)
    except BitwrightError as error:
        raise VerifyError(f"what was written cannot be opened: {error.message}", mend=mend) from error
    if not isinstance(opened, DecodedSource):
        raise VerifyError("what was written is not marked as quantized", mend="report this")
    hashes: Mapping[str, str] = {name: value for commit in commits for name, value in commit.hashes.items()}
    for entry in plan.entries:
        if entry.action == "drop":
            continue
        expected = hashes.get(entry.tensor)
        if entry.action == "quantize":
            assert entry.unit is not None
            if entry.unit.name not in opened.modules:
                raise VerifyError(f"{entry.unit.name} should be quantized in the output but is not", mend=mend)
            found = decoded_hash(opened.quantized(entry.unit.name))
        else:
            found = _raw_hash(opened.stored, entry.tensor)
        release_free_memory()
        if expected != found:
            raise VerifyError(f"{entry.tensor}: what was written differs from what was computed", mend=mend)
    for name in plan.extra_tensors:
        if hashes.get(name) != _raw_hash(opened.stored, name):
            raise VerifyError(f"{name}: what was written differs from what was computed", mend=mend)
    if tokens is not None and activations is not None:
        _verify_activations(opened, plan, commits, tokens, activations, mend)
    opened.stored.close()


def _raw_hash(stored: SafetensorsDir, name: str) -> str:
    digest = hashlib.sha256()
    spec = stored.tensors[name]
    if not spec.shape or spec.nbytes <= CHUNK_ELEMENTS:
        digest.update(bytes_of(stored.read(name)))
        return digest.hexdigest()
    rows = max(1, CHUNK_ELEMENTS * spec.shape[0] // spec.nbytes)
    for start in range(0, spec.shape[0], rows):
        digest.update(bytes_of(stored.read(name, (start, min(start + rows, spec.shape[0])))))
    return digest.hexdigest()


def _verify_activations(
    opened: DecodedSource,
    plan: Plan,
    commits: Sequence[Commit],
    tokens: CalibrationTokens,
    expected: torch.Tensor,
    mend: str,
) -> None:
    """Run calibration batch 0 through the written blocks, in the dtypes that the run used."""
    assert plan.skeleton is not None
    names = map_names(plan.skeleton, opened.tensors)
    runner = BlockRunner(plan.skeleton, names, opened, plan.compute_dtype)
    (capture,) = runner.capture(tokens.batches[:1])
    hidden = capture.hidden
    dtypes = {commit.step: commit.dtype for commit in commits}
    for index in range(plan.structure.block_count):
        dtype = getattr(torch, dtypes[index + 1].removeprefix("torch."))
        runner.dtype = dtype
        block = runner.load_block(index)
        prefix = f"{plan.skeleton.blocks_path}.{index}."
        with quantized_inputs(block, _input_schemes(opened, names, prefix)):
            hidden = runner.run(block, hidden.to(dtype), cast_call(capture.calls[index], dtype))
        runner.free(block)
    if not torch.equal(hidden, expected):
        difference = float((hidden.float() - expected.float()).abs().max())
        raise VerifyError(
            f"the written model computes other activations than the run did (largest difference {difference:.3g})",
            mend=mend,
        )


def _input_schemes(opened: DecodedSource, names: NameMap, prefix: str) -> InputSchemes:
    """How the inputs of one block's matrices are quantized, from what was written."""
    found: InputSchemes = {}
    for module, (scheme, _) in opened.modules.items():
        place = names.places.get(module + ".weight")
        if scheme.inputs is None or place is None or not place.parameter.startswith(prefix):
            continue
        slot = (place.parameter.removeprefix(prefix), place.expert)
        found[slot] = (scheme.inputs, opened.quantized(module).inputs)
    return found
