"""What a run tells while it works: steps done, and things worth noting. The command line draws it; the library is silent."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives what happens during a run."""

    def begin(self, total: int, what: str) -> None:
        """A phase of ``total`` steps starts."""

    def step(self, label: str) -> None:
        """One step of the phase is done."""

    def note(self, text: str) -> None:
        """Something that the user should read."""


class Silent:
    """Says nothing."""

    def begin(self, total: int, what: str) -> None:
        pass

    def step(self, label: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass
