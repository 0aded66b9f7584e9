"""Tables of the page as plain records: cells are text already, the template only sets them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Cell", "Columns", "Head", "Row", "Table", "mark_best"]


@dataclass(frozen=True)
class Cell:
    """text: what it says; note: in small letters below. value: what a column is sorted by. tone: good, warn, bad or ""."""

    text: str
    note: str = ""
    title: str = ""
    value: float | None = None
    best: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Head:
    """help: what the column means, shown on hovering. group: heading over neighbours with the same one. number: set to the right."""

    text: str
    help: str = ""
    group: str = ""
    number: bool = True


@dataclass(frozen=True)
class Row:
    """name: a stranger's; note: below it. kind: ``source`` and ``chosen`` stand out."""

    name: str
    cells: tuple[Cell, ...]
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """first: heading of the names. legend: sentences below."""

    caption: str
    first: str
    heads: tuple[Head, ...]
    rows: tuple[Row, ...]
    legend: tuple[str, ...] = ()
    sortable: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings over the columns, each with how many it spans; empty where there are none."""
        found: list[tuple[str, int]] = []
        for head in self.heads:
            if found and found[-1][0] == head.group:
                found[-1] = (head.group, found[-1][1] + 1)
            else:
                found.append((head.group, 1))
        return found if any(name for name, _ in found) else []


@dataclass
class Columns:
    """Collects columns of numbers and gives the rows: ``add`` a column, leave out those without a number."""

    heads: list[Head] = field(default_factory=list)
    columns: list[list[Cell]] = field(default_factory=list)

    def add(
        self,
        head: Head,
        values: Sequence[float | None],
        write: Callable[[Sequence[float | None]], list[str]],
        *,
        best: Callable[..., float] | None = None,
        titles: Sequence[str] = (),
        fixed: int = 0,
    ) -> None:
        """best: ``min`` or ``max`` over the rows after the first ``fixed``, which are not candidates."""
        if all(value is None for value in values):
            return
        texts = write(values)
        cells = [
            Cell(text or "–", value=value, title=titles[i] if titles else "")
            for i, (text, value) in enumerate(zip(texts, values, strict=True))
        ]
        self.heads.append(head)
        self.columns.append(mark_best(cells, best, fixed) if best else cells)

    def row(self, index: int) -> tuple[Cell, ...]:
        """Cells of one row."""
        return tuple(column[index] for column in self.columns)


def mark_best(cells: list[Cell], best: Callable[..., float], fixed: int = 0) -> list[Cell]:
    """The best cell of a column, and those that read the same; none where all do, or where there is nothing to compare."""
    known = [cell.value for cell in cells[fixed:] if cell.value is not None and math.isfinite(cell.value)]
    texts = {cell.text for cell in cells[fixed:] if cell.value is not None}
    if len(known) < 2 or len(texts) < 2:
        return cells
    top = best(known)
    text = next(cell.text for cell in cells[fixed:] if cell.value == top)
    return [
        cell
        if i < fixed or cell.text != text
        else Cell(cell.text, cell.note, cell.title, cell.value, best=True, tone=cell.tone)
        for i, cell in enumerate(cells)
    ]
