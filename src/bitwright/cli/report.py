"""``bitwright report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.report.document import Document

__all__ = ["app", "read_document"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def report(
    results: Annotated[
        Path, typer.Argument(help="What `eval --json` or `compare` saved.", metavar="RESULTS.json", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PAGE.html", help="The page.  [default: beside RESULTS.json]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing page.")] = False,
) -> None:
    """Draw saved results as one HTML page that needs no network. Measures nothing."""
    page = output if output is not None else results.with_suffix(".html")
    _check(results, page, overwrite)
    document = read_document(results)
    from bitwright.report.page import render_page

    write_page(page, render_page(document))
    from bitwright.cli.tables import print_facts
    from bitwright.report.verdict import verdict

    found = verdict(document)
    facts = [("written", str(page))]
    if found is not None:
        name = found.candidate.name
        facts.append((name if len(name) < 28 else "verdict", found.sentence))
    print_facts(facts)


def _check(results: Path, page: Path, overwrite: bool) -> None:
    """Refuse before anything is read or drawn what could not be written afterwards."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{page} is not called .html", mend="name a file that ends in .html")
    if page.absolute() == results.absolute():
        raise InputError(f"{page} is the document itself", mend="choose another output path")
    if not page.absolute().parent.is_dir():
        raise InputError(f"{page}: its folder does not exist", mend="create the folder first")
    if page.exists() and not overwrite:
        raise InputError(f"{page}: exists already", mend="choose another output path, or pass --overwrite")


def read_document(path: Path) -> Document:
    """The document in a JSON file. InputError where the file cannot be read or holds something else."""
    from pydantic import ValidationError

    from bitwright.io.strict import load_json, quoted
    from bitwright.report.document import SCHEMA, Document

    value = load_json(path)
    schema = value.get("schema") if isinstance(value, dict) else None
    mend = "give what `bitwright eval --json` or `bitwright compare` saved"
    if schema != SCHEMA:
        found = f"its schema is {quoted(str(schema))}" if schema else "it names no schema"
        raise InputError(f"{path}: not a document of schema {SCHEMA}: {found}", mend=mend)
    try:
        return Document.from_json(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: not a document of schema {SCHEMA}: {quoted(place)}: {first['msg']}", mend=mend
        ) from None


def write_page(page: Path, text: str) -> None:
    """Write the page; it appears only when it is whole."""
    import os
    import tempfile

    from bitwright.io.files import os_error

    part: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=page.absolute().parent, prefix=f".{page.name[:40]}.", suffix=".part")
        part = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(page)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise os_error(error, f"writing {page}") from error
