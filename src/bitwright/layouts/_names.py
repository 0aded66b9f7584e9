"""Module names seen as block stack, block number and place inside the block; the fused names of serving engines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bitwright.core.fused import FUSED

__all__ = ["Place", "experts", "place", "regexes", "unique"]


@dataclass(frozen=True, slots=True)
class Place:
    """``stack.number.inside`` of a module name; number is None for a module outside every block."""

    stack: str
    number: int | None
    inside: str


def place(name: str) -> Place:
    """Where a module lives: the first component that is a number is the block's.

    >>> place("model.layers.3.mlp.experts.7.w1")
    Place(stack='model.layers', number=3, inside='mlp.experts.7.w1')
    >>> place("lm_head")
    Place(stack='', number=None, inside='lm_head')
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit() and 0 < index < len(parts) - 1:
            return Place(".".join(parts[:index]), int(part), ".".join(parts[index + 1 :]))
    return Place("", None, name)


def unique(names: Iterable[str]) -> list[str]:
    """The names without repeats, in order."""
    return list(dict.fromkeys(names))


def _any_of(words: Sequence[str]) -> str:
    escaped = [re.escape(word) for word in words]
    return escaped[0] if len(escaped) == 1 else "(?:" + "|".join(escaped) + ")"


def experts(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The modules that vLLM makes of all experts of a block, where ``names`` holds every expert and ``others`` none.

    >>> experts(["model.layers.0.mlp.experts.0.up_proj", "model.layers.1.mlp.experts.0.up_proj"],
    ...         ["model.layers.1.mlp.experts.1.up_proj"])
    ['model.layers.0.mlp.experts']
    """
    mixed = {_experts_of(name) for name in others}
    return unique(whole for name in names if (whole := _experts_of(name)) and whole not in mixed)


def _experts_of(name: str) -> str:
    found = re.match(r"(.*\.experts)\.\d+\.", name)
    return found.group(1) if found else ""


def regexes(names: Iterable[str]) -> list[str]:
    """Regular expressions that match these full module names (and the fused names they make up), and no other.

    They suit start-anchored matching: a prefix that a wrapper model puts before the name is allowed, the end is closed.
    One expression serves all blocks, and all experts, that name the same modules.

    >>> regexes(["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.2.mlp.up_proj"])
    ... # doctest: +NORMALIZE_WHITESPACE
    ['(?:.*\\\\.)?model\\\\.layers\\\\.0\\\\.mlp\\\\.(?:up_proj|gate_proj|gate_up_proj)$',
     '(?:.*\\\\.)?model\\\\.layers\\\\.2\\\\.mlp\\\\.up_proj$']
    """
    leaves: dict[tuple[str, int | None, str], list[str]] = {}
    for name in unique(names):
        where = place(name)
        parent, _, leaf = where.inside.rpartition(".")
        leaves.setdefault((where.stack, where.number, parent), []).append(leaf)
    blocks: dict[tuple[str, str, tuple[str, ...]], list[int | None]] = {}
    for (stack, number, parent), found in leaves.items():
        fused = [whole for whole, parts in FUSED.items() if set(parts) <= set(found)]
        blocks.setdefault((stack, parent, (*found, *fused)), []).append(number)
    parents: dict[tuple[str, tuple[int | None, ...], tuple[str, ...]], list[str]] = {}
    for (stack, parent, words), numbers in blocks.items():
        parents.setdefault((stack, tuple(numbers), words), []).append(parent)
    result = []
    for (stack, many, words), above in parents.items():
        parts = [re.escape(stack)] if stack else []
        if many != (None,):
            parts.append(_any_of([str(number) for number in many]))
        parts += [_any_of(above)] if above != [""] else []
        result.append(r"(?:.*\.)?" + r"\.".join([*parts, _any_of(words)]) + "$")
    return result
