"""What the commands do and show where GGUF files are concerned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    import torch

    from bitwright.engine.gguf_run import GgufPlan, GgufResult

__all__ = ["convert_gguf", "inspect_gguf", "show_gguf_plan", "show_gguf_result"]

_BLOCK = re.compile(r"\.(\d+)\.")
#: header values longer than this are cut in tables
_SHOWN = 60


def show_gguf_plan(plan: GgufPlan, *, all_tensors: bool, as_json: bool) -> None:
    """The table of types, and the size to the byte."""
    if as_json:
        typer.echo(json.dumps(plan.to_json(), indent=2))
        return
    from bitwright.cli.tables import print_facts, print_table, size

    groups: dict[tuple[str, str], list[Any]] = {}
    for target in plan.targets:
        name = target.place.name if all_tensors else _BLOCK.sub(".*.", target.place.name)
        groups.setdefault((name, target.block.name), []).append(target)
    rows = []
    for (name, kind), targets in groups.items():
        numbers = [int(found[1]) for t in targets if (found := _BLOCK.search(t.place.name))]
        where = "" if all_tensors or not numbers else _ranges(numbers)
        shape = "x".join(str(n) for n in targets[0].place.shape)
        bits = f"{targets[0].block.bits_per_weight:.4g}"
        rows.append((name, str(len(targets)), where, shape, kind, bits, size(sum(t.nbytes for t in targets))))
    print_table(("tensor", "count", "blocks", "shape", "type", "bits/weight", "bytes"), rows)
    print_facts(
        [
            *(
                (f"file {part.file_name}", f"{part.total_bytes} bytes ({size(part.total_bytes)})")
                for part in plan.parts
            ),
            ("bits per weight", f"{plan.bits_per_weight:.3f}"),
            *(("note", note) for note in plan.notes),
        ]
    )


def _ranges(numbers: list[int]) -> str:
    """Block numbers in short.

    >>> _ranges([0, 1, 2, 5])
    '0-2,5'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def show_gguf_result(result: GgufResult, *, as_json: bool) -> None:
    """What was written."""
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    from bitwright.cli.tables import print_facts, size

    plan = result.plan
    kinds: dict[str, int] = {}
    for target in plan.targets:
        kinds[target.block.name] = kinds.get(target.block.name, 0) + 1
    print_facts(
        [
            ("written", str(result.output) + (f" and {len(plan.parts) - 1} more parts" if len(plan.parts) > 1 else "")),
            ("size", f"{size(plan.file_bytes)}, {plan.bits_per_weight:.3f} bits per weight"),
            (
                "tensors",
                ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])),
            ),
        ]
    )


def convert_gguf(
    model: str,
    output: Path | None,
    *,
    to_file: bool,
    choice: dict[str, Any],
    dtype: torch.dtype | None,
    lossy: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """``bitwright convert`` from or to a GGUF file."""
    from bitwright.api import from_gguf, to_gguf
    from bitwright.cli.progress import ConsoleProgress

    if to_file:
        if dtype is not None:
            raise InputError("--dtype does not go with --layout gguf", mend="use --type f16, bf16 or f32")
        from bitwright.engine.gguf_run import is_gguf, plan_gguf_file
        from bitwright.engine.recipe import make_recipe
        from bitwright.gguf.mixture import mixture
        from bitwright.io.hub import resolve_model

        path = resolve_model(model, file=True)
        recipe = make_recipe({"gguf": {"type": "f16", **choice}})
        if mixture(str(choice.get("type", "f16"))).base not in ("F32", "F16", "BF16"):
            raise InputError("convert quantizes nothing", mend="use `bitwright quantize`, or --type f16, bf16 or f32")
        if is_gguf(path) and "type" not in choice:
            raise InputError(f"{path} is a GGUF file already", mend="name a --type, or use --layout dense")
        if dry_run:
            show_gguf_plan(plan_gguf_file(recipe, path, lossy=lossy), all_tensors=False, as_json=as_json)
            return
        assert output is not None
        with ConsoleProgress() as progress:
            result = to_gguf(path, output, recipe=recipe, overwrite=overwrite, lossy=lossy, progress=progress)
        show_gguf_result(result, as_json=as_json)
        return
    if output is None or dry_run:
        raise InputError("a GGUF file is decoded into a folder", mend="name it with -o, and leave --dry-run out")
    with ConsoleProgress() as progress:
        dense = from_gguf(model, output, dtype=dtype, overwrite=overwrite, progress=progress)
    if as_json:
        typer.echo(json.dumps(dense.to_json(), indent=2))
        return
    from bitwright.cli.tables import print_facts, size

    kinds = ", ".join(f"{count} {kind}" for kind, count in dense.types.items())
    print_facts(
        [
            ("written", str(dense.output)),
            ("weights", f"{size(dense.weight_file_bytes)}, {dense.dtype}"),
            ("from", kinds),
        ]
    )


def inspect_gguf(path: Path, *, all_tensors: bool, as_json: bool) -> None:
    """``bitwright inspect`` of a GGUF file: header values, types, bits per weight."""
    from bitwright.io.gguf_file import GgufFile

    with GgufFile.open(path) as file:
        values = {key: _plain(value.value) for key, value in file.values.items()}
        tensors: list[dict[str, Any]] = [
            {"name": t.name, "shape": list(t.shape), "type": t.block.name, "bytes": t.nbytes}
            for t in file.tensors.values()
        ]
        version, order, alignment = file.version, file.byte_order, file.alignment
    weights = sum(_count(t["shape"]) for t in tensors)
    total = sum(t["bytes"] for t in tensors)
    found = {
        "path": str(path), "layout": "gguf", "version": version, "byte_order": order, "alignment": alignment, "parameters": weights,
        "data_bytes": total, "bits_per_weight": 8 * total / weights if weights else 0.0, "values": values, "tensors": tensors,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from bitwright.cli.tables import print_facts, print_table, size

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tensor in tensors:
        name = str(tensor["name"]) if all_tensors else _BLOCK.sub(".*.", str(tensor["name"]))
        groups.setdefault((name, str(tensor["type"])), []).append(tensor)
    rows = [
        (name, str(len(group)), "x".join(map(str, group[0]["shape"])), kind,
         f"{8 * sum(t['bytes'] for t in group) / max(1, sum(_count(t['shape']) for t in group)):.3f}", size(sum(t["bytes"] for t in group)))
        for (name, kind), group in groups.items()
    ]  # fmt: skip
    print_table(("tensor", "count", "shape", "type", "bits/weight", "bytes"), rows)
    print_facts([(key, _short(value)) for key, value in values.items()])
    print_facts(
        [
            ("layout", f"gguf version {version}, {order} endian"),
            ("parameters", f"{weights:,}"),
            ("data", size(total)),
            ("bits per parameter", f"{found['bits_per_weight']:.3f}"),
        ]
    )


def _count(shape: Any) -> int:
    count = 1
    for n in shape:
        count *= int(n)
    return count


def _plain(value: Any) -> Any:
    """A header value as JSON holds it; long arrays by their length and first entries."""
    if isinstance(value, (str, bool, int, float)):
        return value
    items = [item.item() if hasattr(item, "item") else item for item in value[:8]]
    return items if len(value) <= len(items) else {"length": len(value), "first": items}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['length']} values: {', '.join(repr(item) for item in value['first'][:4])} ..."
    text = value if isinstance(value, str) else json.dumps(value)
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + " ..."
