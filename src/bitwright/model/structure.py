"""What a checkpoint consists of: its linears, which block each belongs to, and what is not a linear.

With model code at hand (transformers knows the architecture) a linear is what the skeleton says it is. Without, the data-free
methods go by the headers alone: two-dimensional weights of numbered blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from bitwright.core.tensor import TensorSpec
from bitwright.model.names import NameMap, Place
from bitwright.model.skeleton import Skeleton

__all__ = ["LinearUnit", "Structure", "structure_from_headers", "structure_from_skeleton"]


@dataclass(frozen=True, slots=True)
class LinearUnit:
    """One stored weight matrix that a method may quantize.

    name: module name on disk (without ``.weight``). tensor: stored tensor's name. shape: ``(out, in)`` in Linear orientation.
    block: decoder block, None outside. role: "linear", "expert", "head" or "embedding". place: where it lies in memory (None
    without model code). transposed: the stored tensor is ``(in, out)``.
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    block: int | None
    role: str
    place: Place | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Structure:
    """All linears of a checkpoint, in stored order, and the blocks.

    block_of: stored tensor name -> block index, for tensors inside blocks. left: why a two-dimensional tensor is no candidate.
    """

    units: tuple[LinearUnit, ...]
    block_count: int
    block_of: Mapping[str, int]
    left: Mapping[str, str]

    def unit(self, tensor: str) -> LinearUnit | None:
        """The unit of a stored tensor, if it is one."""
        return next((unit for unit in self.units if unit.tensor == tensor), None)


def _module_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _expert_counts(config: object) -> set[int]:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return {int(value) for name in names if isinstance(value := getattr(config, name, None), int) and value > 0}


def structure_from_skeleton(skeleton: Skeleton, names: NameMap, stored: Mapping[str, TensorSpec]) -> Structure:
    """Linears by module type: nn.Linear, GPT-2's Conv1D, and stacks of experts (3-D parameters cut into matrices)."""
    from transformers.pytorch_utils import Conv1D

    model = skeleton.model
    modules = dict(model.named_modules())
    experts = _expert_counts(skeleton.config)
    embeddings = {id(model.get_input_embeddings())}
    head = model.get_output_embeddings()
    units: list[LinearUnit] = []
    left: dict[str, str] = {}
    block_of: dict[str, int] = {}
    for parameter, tensors in names.parameters.items():
        block = skeleton.block_of(parameter)
        if block is not None:
            block_of.update(dict.fromkeys(tensors, block))
    for tensor, spec in stored.items():
        place = names.places.get(tensor)
        if len(spec.shape) not in (2, 3) or place is None:
            if len(spec.shape) >= 2:
                left[tensor] = "it does not map to a plain slice of a parameter" if place is None else "not a matrix"
            continue
        owner_name, _, leaf = place.parameter.rpartition(".")
        owner = modules.get(owner_name)
        block = skeleton.block_of(place.parameter)
        if owner is head and leaf == "weight" and isinstance(owner, nn.Linear):
            units.append(LinearUnit(_module_name(tensor), tensor, _pair(spec), None, "head", place))
        elif id(owner) in embeddings:
            units.append(LinearUnit(_module_name(tensor), tensor, _pair(spec), None, "embedding", place))
        elif isinstance(owner, nn.Linear) and leaf == "weight" and block is not None:
            out = spec.shape[0]
            if experts and (out == 1 or out in experts) and re.search(r"gate|router", owner_name):
                left[tensor] = "a router: its few outputs choose experts"
            else:
                units.append(LinearUnit(_module_name(tensor), tensor, _pair(spec), block, "linear", place))
        elif isinstance(owner, Conv1D) and leaf == "weight" and block is not None:
            shape = (spec.shape[1], spec.shape[0])
            units.append(LinearUnit(_module_name(tensor), tensor, shape, block, "linear", place, transposed=True))
        elif place.expert is not None and block is not None:
            units.append(LinearUnit(_module_name(tensor), tensor, _pair(spec), block, "expert", place))
        elif len(spec.shape) == 3 and block is not None and place.expert is None:
            left[tensor] = "experts stored as one 3-D tensor: the layouts here store matrices"
        else:
            left[tensor] = f"part of {type(owner).__name__}, which is not a linear layer"
    return Structure(tuple(units), len(skeleton.blocks), block_of, left)


def _pair(spec: TensorSpec) -> tuple[int, int]:
    return (spec.shape[0], spec.shape[1])


_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
_NOT_LINEAR = re.compile(
    r"norm|embed|(^|\.)wte|(^|\.)wpe|router|rotary|conv|(^|\.)ln_|lm_head|(mlp|moe|ffn)\.gate\.weight|expert_gate|relative"
)


def structure_from_headers(stored: Mapping[str, TensorSpec], config: Mapping[str, object]) -> Structure:
    """Without model code: every two-dimensional ``*.weight`` of a numbered block that is no norm, embedding or router."""
    units: list[LinearUnit] = []
    left: dict[str, str] = {}
    block_of: dict[str, int] = {}
    count = 0
    for tensor, spec in stored.items():
        match = _BLOCK.search(tensor)
        if match:
            block_of[tensor] = int(match[1])
            count = max(count, int(match[1]) + 1)
        if len(spec.shape) != 2 or not spec.dtype.is_floating_point:
            continue
        if match and tensor.endswith(".weight") and not _NOT_LINEAR.search(tensor):
            # GPT-2 keeps Conv1D weights as (in, out) on disk.
            turned = config.get("model_type") == "gpt2"
            shape = (spec.shape[1], spec.shape[0]) if turned else _pair(spec)
            units.append(LinearUnit(_module_name(tensor), tensor, shape, block_of[tensor], "linear", None, turned))
        else:
            left[tensor] = "outside the blocks" if match is None else "by its name not a linear layer"
    return Structure(tuple(units), count, block_of, left)
