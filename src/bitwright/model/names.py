"""Names on disk and names in memory.

transformers renames and fuses tensors while it loads (a Mixtral checkpoint stores every expert's matrices apart, in memory they
are one 3-D parameter). The road back is found through transformers' own conversion mapping, run once on tiny tagged tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.model.skeleton import Skeleton

__all__ = ["NameMap", "Place", "map_names"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor lies inside a parameter.

    parameter: name in memory. expert: index on the first axis of a 3-D parameter, or None. rows: ``start, stop`` on the output
    axis where several stored tensors are stacked, or None. transposed: the parameter is ``(in, out)`` where the stored one is
    ``(out, in)``, or the other way round.
    """

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(eq=False)
class NameMap:
    """The correspondence for one checkpoint.

    places: stored name -> where it lies in memory (only where that is a plain slice). parameters: name in memory -> the
    stored tensors that it is made of. unknown: stored tensors that the model does not use.
    """

    places: dict[str, Place] = field(default_factory=dict)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    _converters: dict[str, tuple[Any, tuple[tuple[str, str], ...]]] = field(default_factory=dict)

    def load(self, target: str, read: Callable[[str], torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """The parameters made from the stored tensors of ``target``: name in memory -> tensor. ``read`` takes a stored name."""
        if target not in self._converters:
            (name,) = self.parameters[target]
            return {target: read(name)}
        converter, sources = self._converters[target]
        return _convert(converter, target, [(name, pattern, read(name)) for name, pattern in sources], model)


def _convert(
    converter: Any, target: str, tensors: list[tuple[str, str, torch.Tensor]], model: Any
) -> dict[str, torch.Tensor]:
    fresh = deepcopy(converter)
    for name, pattern, tensor in tensors:
        fresh.add_tensor(target, name, pattern, tensor)
    done = fresh.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in done.items()}


def map_names(skeleton: Skeleton, stored: Mapping[str, TensorSpec]) -> NameMap:
    """Match a checkpoint's tensors with a skeleton's parameters.

    Raises InputError where a parameter has no tensor or a tensor has the wrong shape; the first five are named.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model = skeleton.model
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected: dict[str, torch.Tensor] = dict(model.state_dict())
    tied = skeleton.tied
    result = NameMap()
    sources: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        sources.setdefault(target, []).append((name, pattern))
    unknown: list[str] = []
    wrong: list[str] = []
    for target, found in sources.items():
        names = [name for name, _ in found]
        if target not in expected:
            unknown.extend(names)
            continue
        pattern = found[0][1]
        if pattern is None:
            name = names[-1]
            if tuple(expected[target].shape) != stored[name].shape:
                wrong.append(f"{name} is {stored[name].shape}, the model needs {tuple(expected[target].shape)}")
            result.parameters[target] = (name,)
            result.places[name] = Place(target)
            continue
        pairs = tuple((name, match) for name, match in found if match is not None)
        result._converters[target] = (by_pattern[pattern], pairs)
        result.parameters[target] = tuple(names)
        result.places.update(_probe(by_pattern[pattern], target, pairs, stored, expected, model))
    result.unknown = tuple(unknown)
    covered = set(result.parameters)
    for target in list(result._converters):
        converter, pairs = result._converters[target]
        tags = [(n, p, torch.zeros(1, 1)) for n, p in pairs]
        if len(converter.target_patterns) > 1:
            covered |= set(_convert(converter, target, tags, model))
    missing = [name for name in expected if name not in covered and tied.get(name) not in covered]
    if wrong:
        raise InputError(f"wrong shapes: {'; '.join(wrong[:5])}", mend="the config does not belong to these weights")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"the checkpoint lacks {', '.join(missing[:5])}{more}",
            mend="download the missing shards, or check config.json",
        )
    return result


def _probe(
    converter: Any,
    target: str,
    sources: tuple[tuple[str, str], ...],
    stored: Mapping[str, TensorSpec],
    expected: Mapping[str, torch.Tensor],
    model: Any,
) -> dict[str, Place]:
    """Where each source tensor ends up, found by converting tiny tensors filled with their own number.

    All sources are scaled down by one common divisor of their row counts; where the outcome is not a plain stacking of experts
    and row ranges, the sources have no place (and are then kept in high precision by calibrated methods).
    """
    shapes = [stored[name].shape for name, _ in sources]
    if any(len(shape) != 2 for shape in shapes):
        return {}
    unit = math.gcd(*(shape[0] for shape in shapes))
    tagged = [
        (name, pattern, torch.full((shapes[i][0] // unit, 1), float(i))) for i, (name, pattern) in enumerate(sources)
    ]
    try:
        made = _convert(converter, target, tagged, model)
    except (RuntimeError, ValueError, IndexError):
        return {}
    places: dict[str, Place] = {}
    for parameter, tags in made.items():
        real = expected.get(parameter)
        if real is None or real.dim() != tags.dim() or tags.dim() not in (2, 3):
            return {}
        plain = tags.shape[-1] == 1 and tags.shape[-2] * unit == real.shape[-2]
        turned = tags.shape[-2] == 1 and tags.shape[-1] * unit == real.shape[-1]
        if not plain and not turned:
            return {}
        rows_of = tags.squeeze(-1 if plain else -2)
        for index, line in enumerate(rows_of if rows_of.dim() == 2 else rows_of[None]):
            expert = index if rows_of.dim() == 2 else None
            for i in line.unique().int().tolist():
                at = (line == i).nonzero().flatten()
                start, stop = int(at[0]), int(at[-1]) + 1
                if stop - start != len(at):
                    return {}
                whole = len(at) == len(line)
                rows = None if whole else (start * unit, stop * unit)
                places[sources[i][0]] = Place(parameter, expert, rows, transposed=not plain)
    return places
