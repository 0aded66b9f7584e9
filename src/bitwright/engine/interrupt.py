"""SIGINT and SIGTERM: the first asks the run to stop after the block at hand, the second ends the process with code 130."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopRequest"]


class StopRequest:
    """Context manager that turns signals into a question, ``requested()``. Outside the main thread it only answers no."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """True once a signal has come."""
        return self._asked

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked:
            os._exit(130)
        self._asked = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
