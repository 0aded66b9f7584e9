import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


class Forker:
    """Runs commands in forked children of one process that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "forker.log"
        command = [sys.executable, "-W", "error", str(Path(__file__).with_name("forker.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT, cwd=ROOT)
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline().strip()
        assert line, "the forker has ended"
        return line

    def start(self, *arguments: object, kill_at: int | None = None) -> int:
        """The PID of a child that runs a command line."""
        job = {"args": [str(a) for a in arguments], "log": str(self.log), "kill_at": kill_at}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """The exit code, or minus the signal, of the child started last."""
        return os.waitstatus_to_exitcode(int(self._answer()))

    def run(self, *arguments: object, kill_at: int | None = None) -> int:
        self.start(*arguments, kill_at=kill_at)
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
def bitwright(capfd):
    """Run the command line here: ``code, stdout, stderr``."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(*arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(autouse=True)
def _signals_restored():
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
