"""``bitwright engines``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.advise.engines import Engine, Hardware, Reading

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def engines(
    engine: Annotated[
        str | None, typer.Option("--engine", help="One engine, with versions, conditions and sources.")
    ] = None,
    capability: Annotated[
        float | None,
        typer.Option("--compute-capability", metavar="X.Y", help="What runs on GPUs of this compute capability."),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="What runs on this GPU: h100, a100, 4090, t4, ...")] = None,
    cpu: Annotated[bool, typer.Option("--cpu-only", help="What runs without a GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Which engine loads which kind of file, on which hardware, and who says so."""
    from bitwright.advise import engines as table

    hardware = chosen_hardware(gpu, capability, cpu)
    found = [table.engine(engine)] if engine is not None else list(table.engines().values())
    if as_json:
        typer.echo(json.dumps([_plain(entry, hardware) for entry in found], indent=2))
    elif engine is not None:
        _show_one(found[0], hardware)
    else:
        _show_all(found, hardware)


def chosen_hardware(gpu: str | None, capability: float | None, cpu: bool) -> Hardware | None:
    """What flags name; None where they name nothing. InputError where they contradict each other."""
    from bitwright.advise import engines as table

    if sum((gpu is not None, capability is not None, cpu)) > 1:
        raise InputError("--gpu, --compute-capability and --cpu-only exclude each other", mend="give one of them")
    if cpu:
        return table.CPU
    if gpu is not None:
        return table.gpu(gpu)[0]
    if capability is None:
        return None
    if not 3.0 <= capability <= 20.0:
        raise InputError(f"--compute-capability {capability} does not exist", mend="write it like 8.6")
    return table.Hardware(name=f"compute capability {capability}", capability=capability)


def _plain(entry: Engine, hardware: Hardware | None) -> dict[str, Any]:
    from bitwright.advise.engines import kinds

    reads = []
    for kind in kinds().values():
        line = entry.reading(kind.name)
        reads.append(
            {
                "kind": kind.name,
                "layout": kind.layout,
                "what": kind.title,
                "loads": line.loads,
                "compute_capability": line.capability,
                "native_from": line.native,
                "not_from": line.before,
                "cpu": line.cpu,
                "stays_packed": line.packed if line.loads else None,
                "needs": line.needs or None,
                "note": line.note or None,
                "checked": line.checked or None,
                "sources": list(line.sources),
            }
            | ({} if hardware is None else {"refused": line.refused_on(hardware)})
        )
    return {"engine": entry.name, "title": entry.title, "version": entry.version, "reads": reads}


def cell(line: Reading, hardware: Hardware | None) -> str:
    """A cell of the matrix: from which compute capability, and c where a CPU does too.

    >>> from bitwright.advise.engines import engine
    >>> cell(engine("vllm").reading("ct-fp8"), None), cell(engine("vllm").reading("awq-4"), None)
    ('7.5', '7.5 c')
    """
    if hardware is not None:
        return "-" if line.refused_on(hardware) is not None else "native" if line.is_native_on(hardware) else "yes"
    if not line.loads:
        return "-"
    least = "" if not line.gpu else "yes" if line.capability is None else f"{line.capability}"
    return f"{least} c".strip() if line.cpu else least


def _show_all(found: list[Engine], hardware: Hardware | None) -> None:
    from bitwright.advise.engines import kinds
    from bitwright.cli.tables import print_table

    rows = [
        (kind.layout, kind.title, *(cell(entry.reading(kind.name), hardware) for entry in found))
        for kind in kinds().values()
    ]
    print_table(("layout", "", *(entry.name for entry in found)), rows)
    if hardware is None:
        typer.echo("number: least CUDA compute capability; yes: none is named; c: also on CPUs; -: not read.")
    else:
        typer.echo(f"On {hardware.name}. native: products in the file's own numbers; -: not read, or not there.")
    typer.echo("Versions, conditions and sources: bitwright engines --engine NAME")


def _show_one(entry: Engine, hardware: Hardware | None) -> None:
    from bitwright.advise.engines import kinds
    from bitwright.cli.tables import print_facts, print_table

    rows, sources = [], dict[str, None]()
    for kind in kinds().values():
        line = entry.reading(kind.name)
        said = "; ".join(part for part in (f"needs {line.needs}" if line.needs else "", line.note) if part)
        rows.append((kind.layout, kind.title, cell(line, hardware), line.checked, said))
        sources |= dict.fromkeys(line.sources)
    print_facts([("engine", entry.title), ("version", entry.version)])
    print_table(("layout", "", "loads", "known by", "conditions"), rows)
    for source in sources:
        typer.echo(f"source: {source}")
