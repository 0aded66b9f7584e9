"""What every catalogued transform of block scope must do. A new file in ``transforms`` is picked up here by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.zoo import ZOO, make

from bitwright import catalog
from bitwright.core.transform import BlockTransform
from bitwright.engine.blockwise import cast_call
from bitwright.engine.collect import Batch
from bitwright.engine.plan import make_plan
from bitwright.engine.progress import Silent
from bitwright.engine.recipe import make_recipe
from bitwright.engine.rewrite import RewrittenSource
from bitwright.engine.run import open_source
from bitwright.engine.transforming import BlockTransforms, Samples
from bitwright.model.blocks import BlockRunner
from bitwright.runtime.load import load_model

#: Options worth trying; a transform that is not listed is tried with its defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "awq": [{"grid": 4}],
    "smoothquant": [{}, {"alpha": 0.8, "linears": True}, {"alpha": "search", "grid": 4}],
}
#: their biases are stored in 16 bits, and rounded again when they are divided
BIASED = {"qwen2", "gpt2", "opt", "gpt_neox", "falcon"}
W8A8 = {"bits": 8, "group_size": "channel", "inputs": {"strategy": "tensor", "dynamic": False}}


def block_transforms() -> list[tuple[str, dict[str, Any]]]:
    names = [n for n in catalog.names("transforms") if catalog.load("transforms", n).scope == "block"]
    return [(name, options) for name in names for options in OPTIONS.get(name, [{}])]


transforms = pytest.mark.parametrize(("name", "options"), block_transforms(), ids=str)


def rewritten_tensors(folder, transform, **recipe):
    """Every tensor of a checkpoint as the transform rewrites it, and how many were changed."""
    values = {"method": "rtn", "layout": "native", "transforms": [transform], "compute_dtype": "float32", **recipe}
    rng = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 256, (4, 32), generator=rng) for _ in range(2)]
    with open_source(folder) as source:
        plan = make_plan(make_recipe(values), source)
        runner = BlockRunner(plan.skeleton, plan.names, source, torch.float32)
        captures = runner.capture((*batches, batches[0][:1]))
        hidden = [capture.hidden for capture in captures]
        rewritten = RewrittenSource(source, {}, frozenset(entry.tensor for entry in plan.quantized))
        work = BlockTransforms(plan, runner, Silent(), 1 << 30)
        for index in range(plan.structure.block_count):
            calls = [cast_call(capture.calls[index], torch.float32) for capture in captures]
            entries = [e for e in plan.entries if plan.structure.block_of.get(e.tensor) == index]
            block = runner.load_block(index)
            after = [runner.run(block, x, call) for x, call in zip(hidden, calls, strict=True)]
            inputs = [Batch(x, call) for x, call in zip(hidden, calls, strict=True)]
            samples = Samples(inputs[-1], inputs[0])
            work.apply(index, block, rewritten, entries, lambda inputs=inputs: inputs[:-1], samples)
            runner.free(block)
            hidden = after
        tensors = {name: rewritten.read(name).float().contiguous() for name in source.tensors}
        moved = [n for n in tensors if not torch.equal(tensors[n], source.read(n).float())]
    return tensors, moved


def logits_of(folder, tokens):
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32)(input_ids=tokens, use_cache=False).logits


def written(source, tensors, folder):
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=list(ZOO))
def model(request, tmp_path_factory):
    """The same weights, stored in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("transforms")
    return {
        dtype: make(request.param, folder / str(dtype), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }, request.param


@transforms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_the_unquantized_model_stay(dtype, name, options, model, tmp_path):
    """In bfloat16 too: what rounding a norm loses, the matrices behind it take up."""
    folders, architecture = model
    tensors, moved = rewritten_tensors(folders[dtype], {"name": name, "options": options}, **W8A8)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    expected = logits_of(folders[dtype], tokens)
    found = logits_of(written(folders[dtype], tensors, tmp_path / "out"), tokens)
    exact = dtype == torch.float32 or architecture not in BIASED
    tolerance = 1e-4 if exact else 1e-2
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert len(moved) >= 3, "it had nothing to do"


@transforms
def test_options_are_frozen_and_it_needs_known_statistics(name, options):
    from bitwright.core.stats import SIMPLE

    plugin = catalog.load("transforms", name)
    transform = plugin(**options)
    assert isinstance(transform, BlockTransform)
    assert transform.name == name
    assert transform == plugin(**options)
    assert transform.needs
    assert transform.needs <= {"gram", *SIMPLE}
    with pytest.raises((AttributeError, TypeError)):
        transform.name = "other"
