"""``bitwright convert``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import options as o

if TYPE_CHECKING:
    from bitwright.engine.conversion import ConversionPlan

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_BLOCK = re.compile(r"\.(\d+)\.")


@app.command()
def convert(
    model: o.Model,
    layout: Annotated[
        str, typer.Option("--layout", help=f"{o.listed('layouts')}; or dense: plain weights.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder (or NAME.gguf) to write; it appears only when it is whole."),
    ] = None,
    layout_option: o.LayoutOption = None,
    type_: o.Type = None,
    pre: o.Pre = None,
    split: o.Split = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of what is not quantized.  [default: the model's]")
    ] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Scales may be rounded to what the layout stores.")] = False,
    target: o.Target = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, in one rename.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would become of every module; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Carry a quantized checkpoint into another layout, or decode it; codes stay as they are, nothing is quantized anew.

    With --layout gguf also a plain checkpoint (--type f16, bf16, f32) to a GGUF file; with --layout dense also a GGUF file to a folder.
    """
    from bitwright.core.tensor import parse_dtype
    from bitwright.errors import InputError
    from bitwright.io.hub import resolve_model

    if output is None and not dry_run:
        raise InputError("there is no output folder", mend="name one with -o, or look first with --dry-run")
    wanted = parse_dtype(dtype) if dtype is not None else None
    if layout == "gguf" or (layout == "dense" and Path(model).is_file()):
        from bitwright.cli.gguf_tables import convert_gguf

        convert_gguf(
            model, output, to_file=layout == "gguf", choice=o.gguf_choice(type_, None, None, None, None, None, pre, split),
            dtype=wanted, lossy=lossy, overwrite=overwrite, dry_run=dry_run, as_json=as_json,
        )  # fmt: skip
        return
    options = o.pairs(layout_option, "--layout-option")
    if dry_run:
        from bitwright.engine.convert import plan_folder

        plan = plan_folder(
            resolve_model(model), layout=layout, layout_options=options, dtype=wanted, lossy=lossy, target=target
        )
        _show(plan, None, as_json)
        return
    assert output is not None
    from bitwright.api import convert as run
    from bitwright.cli.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        result = run(
            model, output, layout=layout, layout_options=options, dtype=wanted, lossy=lossy, overwrite=overwrite, target=target,
            progress=progress,
        )  # fmt: skip
    _show(result.plan, output, as_json)


def _show(plan: ConversionPlan, output: Path | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan.to_json() | ({"output": str(output)} if output is not None else {}), indent=2))
        return
    from bitwright.cli.tables import print_table, size
    from bitwright.io.text import printable

    groups: dict[tuple[str, str, str], int] = {}
    for line in plan.to_json()["modules"]:
        key = (_BLOCK.sub(".*.", line["module"]), line["from"], line["to"])
        groups[key] = groups.get(key, 0) + 1
    print_table(("module", "from", "to", "count"), [(*key, str(count)) for key, count in groups.items()])
    dtype = str(plan.dtype).removeprefix("torch.")
    if plan.layout is None:
        numbers = f"decoded, rounded once to {dtype}"
    elif plan.rounding:
        numbers = f"scales rounded by up to {plan.rounding:.1e} relative"
    else:
        numbers = "the same, bit for bit"
    facts = [("written", str(output))] if output is not None else []
    facts += [
        ("layout", plan.layout_name),
        ("decoded weights", numbers),
        ("weight files", size(plan.weight_file_bytes)),
    ]
    facts += [(f"loads in {name}", "yes" if why is None else f"no: {why}") for name, why in plan.engines.items()]
    facts += [("left out", f"{name}: {why}") for name, why in plan.dropped.items()]
    for name, value in facts:
        typer.echo(f"{name:<28}{printable(value)}")
