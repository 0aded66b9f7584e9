import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PATHS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": _PATHS}


Signals = Sequence[tuple[int, int]]


class Forker:
    """Runs commands in forked children of one process that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "forker.log"
        command = [sys.executable, "-W", "error", str(Path(__file__).with_name("forker.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT, cwd=ROOT)
        self._running = False
        self._answer("ready")

    def _answer(self, kind: str) -> int:
        found, _, number = self._process.stdout.readline().partition(" ")
        assert found == kind, "the forker has ended"
        return int(number)

    def start(self, *arguments: object, signals: Signals = ()) -> int:
        """The PID of a child that runs a command line."""
        if self._running:  # a test that failed has left its child
            self.wait()
        job = {"args": [str(a) for a in arguments], "log": str(self.log), "signals": signals}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._running = True
        return self._answer("pid")

    def wait(self) -> int:
        """The exit code, or minus the signal, of the child started last."""
        self._running = False
        return os.waitstatus_to_exitcode(self._answer("status"))

    def run(self, *arguments: object, kill_at: int | None = None, signals: Signals = ()) -> int:
        self.start(*arguments, signals=[(kill_at, signal.SIGKILL)] if kill_at else signals)
        return self.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def steps(self) -> int:
        """How many steps that touch the disk the last child took, had it not been killed."""
        return int(self.output.rsplit("steps ", 1)[1])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="session")
def forker(tmp_path_factory):
    made = Forker(tmp_path_factory.mktemp("forker"))
    yield made
    made.close()


@pytest.fixture
def bitwright(bitwright_cli):
    return bitwright_cli


@pytest.fixture(autouse=True)
def _signals_restored():
    # Not the default one everywhere: whoever starts the tests in the background may have them ignore SIGINT.
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
