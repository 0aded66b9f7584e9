"""The error tree.

Every error that a user can cause or meet carries two things beside its message: the *mend* (what to do about it, in one
sentence) and the exit code that the command line returns. Messages name the file, the tensor or the option concerned.

Exit codes
----------
==== ===========================================================
0    success
1    a bug in bitwright (any exception that is not in this tree)
2    bad input or usage
3    a quality gate or a verification failed
4    resources: disk, memory, a lost worker
5    numeric: NaN, overflow, a matrix that cannot be factorised
6    network or hub
75   stopped safely, resumable
130  a second Ctrl-C
==== ===========================================================
"""

from __future__ import annotations

__all__ = [
    "BitwrightError",
    "HubError",
    "InputError",
    "NumericError",
    "PlanError",
    "ResourceError",
    "ResumeError",
    "Stopped",
    "VerifyError",
]


class BitwrightError(Exception):
    """Root of all errors raised on purpose.

    >>> str(InputError("config.json: not an object", mend="check the download"))
    'config.json: not an object (mend: check the download)'
    """

    exit_code = 1

    def __init__(self, message: str, *, mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message} (mend: {self.mend})" if self.mend else self.message


class InputError(BitwrightError):
    """A file, an option or a text that cannot be used as it is. Exit code 2."""

    exit_code = 2


class PlanError(InputError):
    """A recipe that cannot be carried out, found before any weight was read. Exit code 2."""


class ResumeError(InputError):
    """An interrupted run that cannot be continued because something changed since. Exit code 2."""


class VerifyError(BitwrightError):
    """What was written is not what was computed, or a quality gate failed. Exit code 3."""

    exit_code = 3


class ResourceError(BitwrightError):
    """Disk, memory or a worker is missing. Exit code 4."""

    exit_code = 4


class NumericError(BitwrightError):
    """NaN, infinity, overflow, or a factorisation that failed for good. Exit code 5."""

    exit_code = 5


class HubError(BitwrightError):
    """The network or the model hub did not deliver. Exit code 6."""

    exit_code = 6


class Stopped(BitwrightError):
    """The run stopped after a committed block because it was asked to; it can be resumed. Exit code 75."""

    exit_code = 75
