"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from bitwright.io.text import printable

__all__ = ["ConsoleProgress"]


class ConsoleProgress:
    """Draws a run's progress; implements ``engine.progress.Progress``."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._total = self._done = 0
        self._began = time.monotonic()

    def begin(self, total: int, what: str) -> None:
        self._total, self._done, self._began = total, 0, time.monotonic()
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)

    def step(self, label: str) -> None:
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=label)
            if self._done >= self._total:
                self.close()
            return
        spent = time.monotonic() - self._began
        left = spent / self._done * (self._total - self._done)
        self._console.print(f"[{self._done}/{self._total}] {label}, {left:.0f} s left", soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"note: {printable(text)}", soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        sys.stderr.flush()
