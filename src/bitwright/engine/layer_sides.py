"""The two models whose blocks are compared layer by layer, each of them a checkpoint folder of any layout or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitwright.core.source import Source
from bitwright.core.transform import ModelTransform
from bitwright.engine.recipe import Recipe, make_plugin, make_recipe
from bitwright.engine.rotating import rotated_source
from bitwright.engine.run import open_source
from bitwright.errors import InputError
from bitwright.gguf.to_hf import HfView
from bitwright.io.gguf_check import check_hyperparameters
from bitwright.io.gguf_file import GgufFile
from bitwright.io.model_files import refuse_remote_code
from bitwright.io.strict import load_json
from bitwright.io.text import printable
from bitwright.model.blocks import BlockRunner
from bitwright.model.names import NameMap, Place, map_names
from bitwright.model.skeleton import Skeleton, build_skeleton
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint
from bitwright.runtime.gguf_model import gguf_folder

__all__ = ["Side", "Stored", "open_pair"]


@dataclass(frozen=True)
class Stored:
    """What a weight is stored as. scheme: in words; quantized: False for 16 and 32-bit floats; inputs: they are rounded too."""

    scheme: str
    quantized: bool
    inputs: bool = False


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models. folder: where its config and tokenizer are. stored: by place in memory. Blocks run in float32."""

    path: Path
    folder: Path
    source: Source
    skeleton: Skeleton
    names: NameMap
    runner: BlockRunner
    stored: Mapping[Place, Stored]

    def parameter(self, name: str) -> torch.Tensor | None:
        """A parameter outside the blocks in float32, through its tie where it has one; None where there is none."""
        origin = self.origin(name)
        if origin is None:
            return None
        return self.names.load(origin, self.source.read, self.skeleton.model)[origin].float()

    def origin(self, name: str) -> str | None:
        """The parameter that is loaded for ``name``: itself, or what it is tied to."""
        found = name if name in self.names.parameters else self.skeleton.tied.get(name, name)
        return found if found in self.names.parameters else None


@contextmanager
def open_pair(source: Path, model: Path) -> Iterator[tuple[Side, Side, Recipe | None]]:
    """``source`` and ``model``, and the part of the recipe that says how the model was transformed, where it says so.

    Where the whole model was rotated before it was quantized, the source is rotated alike: it computes the same, and only then can
    its weights be compared. Raises InputError where the two are not one architecture.
    """
    with ExitStack() as stack:
        reference = _opened(stack, source, dense=True)
        candidate = _opened(stack, model, dense=False)
        transforms = _transforms(model)
        for choice in transforms.transforms if transforms is not None else ():
            transform = make_plugin("transforms", choice)
            if isinstance(transform, ModelTransform):
                assert transforms is not None
                reference = _rotated(reference, transform, transforms.seed)
        _check_alike(reference, candidate)
        yield reference, candidate, transforms


def _opened(stack: ExitStack, path: Path, *, dense: bool) -> Side:
    if path.is_file():
        file = stack.enter_context(GgufFile.open(path))
        check_hyperparameters(file)
        view = HfView(file, dtype=torch.float32)
        kinds = {name: view.block_type(name) for name in view.tensors}
        stored = {name: Stored(kind.name, kind.blocked) for name, kind in kinds.items()}
        return _side(path, stack.enter_context(gguf_folder(path)), view, stored)
    if dense:
        plain = stack.enter_context(open_source(path))
        return _side(path, path, plain, {})
    opened = open_checkpoint(path)
    stack.enter_context(opened.stored if isinstance(opened, DecodedSource) else opened)
    refuse_remote_code(opened.config, path)
    schemes = {}
    if isinstance(opened, DecodedSource):
        for module, (scheme, _) in opened.modules.items():
            schemes[module + ".weight"] = Stored(scheme.describe_all(), True, scheme.inputs is not None)
    return _side(path, path, opened, schemes)


def _side(path: Path, folder: Path, source: Source, stored: Mapping[str, Stored], *, untied: bool = False) -> Side:
    skeleton = build_skeleton(folder, dtype=torch.float32, untied=untied)
    names = map_names(skeleton, source.tensors)
    kinds = {
        place: stored.get(name) or Stored(str(source.tensors[name].dtype).removeprefix("torch."), False)
        for name, place in names.places.items()
    }
    return Side(path, folder, source, skeleton, names, BlockRunner(skeleton, names, source, torch.float32), kinds)


def _rotated(side: Side, transform: ModelTransform, seed: int) -> Side:
    if side.path.is_file():
        raise InputError(
            f"{printable(str(side.path))}: the quantized model is rotated, which a GGUF source cannot be",
            mend="compare with the checkpoint folder it was made from",
        )
    rotated, _ = rotated_source(side.source, transform, seed)
    return _side(side.path, side.folder, rotated, {}, untied=rotated.config.get("tie_word_embeddings") is False)


def _transforms(model: Path) -> Recipe | None:
    """Transforms and seed of the run that made ``model``, from what it says about itself; None where it names none."""
    told: Any = {}
    if model.is_file():
        with GgufFile.open(model) as file:
            text = file.get("bitwright.recipe", str, "")
        try:
            told = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            told = {}
    elif (model / "bitwright.json").is_file():
        told = load_json(model / "bitwright.json")
        told = told.get("recipe") if isinstance(told, Mapping) else None
    if not isinstance(told, Mapping) or not told.get("transforms"):
        return None
    return make_recipe({"method": "rtn", "transforms": told["transforms"], "seed": told.get("seed", 0)})


def _check_alike(source: Side, model: Side) -> None:
    a, b = (dict(side.skeleton.model.base_model.named_parameters()) for side in (source, model))
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise InputError(
            f"{printable(str(model.path))} is not a quantized version of {printable(str(source.path))}: their parameters differ",
            mend="name the checkpoint that it was made from",
        )
