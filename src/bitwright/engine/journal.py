"""The journal: what has been committed, so that a killed run resumes there with identical bytes.

One JSON object per line. The first line is the identity of the run (recipe, model, data, versions); each further line commits one
step after its tensors reached the disk. Activations that feed the next step are kept in two generations, so that a damaged newest
one costs one step.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright.errors import ResumeError

__all__ = ["Commit", "Journal"]

_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Commit:
    """One finished step.

    hashes: stored name in the source -> SHA-256 of what it decodes to (quantized) or of its bytes (kept). report: what is worth
    telling. activations: hash of the generation that feeds the next step; dtype: what the block ran in.
    """

    step: int
    hashes: dict[str, str] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)
    activations: str | None = None
    dtype: str = ""


class Journal:
    """Append-only record of a run in its staging folder."""

    def __init__(self, folder: Path, identity: dict[str, str], commits: list[Commit], torn: bool = False) -> None:
        self.folder = folder
        self.identity = identity
        self.commits = commits
        #: True where a damaged tail was dropped on reopening
        self.torn = torn

    @classmethod
    def start(cls, folder: Path, identity: dict[str, str]) -> Journal:
        """A fresh journal."""
        journal = cls(folder, identity, [])
        with (folder / _NAME).open("wb") as file:
            file.write(_line({"identity": identity}))
            file.flush()
            os.fsync(file.fileno())
        return journal

    @classmethod
    def present(cls, folder: Path) -> bool:
        """True where a run has left a journal."""
        return (folder / _NAME).is_file()

    @classmethod
    def reopen(cls, folder: Path, identity: dict[str, str]) -> Journal:
        """The journal of an interrupted run.

        A torn or damaged tail is dropped, and ``torn`` is set. Raises ResumeError where the identity differs, listing what changed,
        and where the journal's head is not readable.
        """
        lines = (folder / _NAME).read_bytes().split(b"\n")
        records: list[dict[str, Any]] = []
        torn = False
        for line in lines:
            if not line:
                continue
            record = _parse(line)
            if record is None:
                torn = True
                break
            records.append(record)
        if not records or not isinstance(records[0].get("identity"), dict):
            raise ResumeError(f"{folder / _NAME} is damaged from its beginning", mend="start again with --resume never")
        was = records[0]["identity"]
        changed = [
            f"{key}: was {was.get(key, 'absent')}, is {identity.get(key, 'absent')}"
            for key in sorted(was.keys() | identity.keys())
            if was.get(key) != identity.get(key)
        ]
        if changed:
            raise ResumeError(
                "the interrupted run was another one; " + "; ".join(changed),
                mend="run it with the same inputs, or start again with --resume never",
            )
        journal = cls(folder, identity, [Commit(**record["commit"]) for record in records[1:]], torn)
        journal._rewrite()
        return journal

    def _rewrite(self) -> None:
        """Write the valid part anew, so that a torn tail is gone before anything is appended."""
        temporary = self.folder / (_NAME + ".new")
        with temporary.open("wb") as file:
            file.write(_line({"identity": self.identity}))
            for commit in self.commits:
                file.write(_line({"commit": vars(commit)}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / _NAME)

    def append(self, commit: Commit) -> None:
        """Commit a step; returns when it is on the disk."""
        with (self.folder / _NAME).open("ab") as file:
            file.write(_line({"commit": vars(commit)}))
            file.flush()
            os.fsync(file.fileno())
        self.commits.append(commit)

    def drop_last(self) -> None:
        """Forget the newest commit (its activations were damaged)."""
        self.commits.pop()
        self._rewrite()


def _line(record: dict[str, Any]) -> bytes:
    """A record and the hash of its text, so that a damaged line is told from a whole one."""
    text = json.dumps(record, sort_keys=True)
    return (
        json.dumps({"sha": hashlib.sha256(text.encode()).hexdigest()[:16], "record": record}, sort_keys=True).encode()
        + b"\n"
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        outer = json.loads(line)
        record = outer["record"]
        text = json.dumps(record, sort_keys=True)
        good = hashlib.sha256(text.encode()).hexdigest()[:16] == outer["sha"]
    except (ValueError, KeyError, TypeError):
        return None
    return record if good and isinstance(record, dict) else None
