"""Runs the command line in forked children, so that a hundred runs cost one import of torch.

Reads jobs from stdin, one JSON object a line: ``{"args": [...], "log": path, "signals": [[n, signal], ...]}``. Answers with a line
holding the child's PID and, when it has ended, a line with its wait status. signals: what the child sends itself at its n-th step
that touches the disk (a write, fsync, rename, deletion, or the opening of a file for writing; counted before and after each). The
number of such steps stands in the last line of the log of a child that was not killed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys

_steps = itertools.count(1)


def _watch(signals):
    def tick():
        now = next(_steps)
        for step, number in signals:
            if step == now:
                os.kill(os.getpid(), number)

    def around(function):
        def wrapped(*args, **kwargs):
            tick()
            result = function(*args, **kwargs)
            tick()
            return result

        return wrapped

    for name in ("fsync", "pwrite", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod", "truncate"):
        setattr(os, name, around(getattr(os, name)))

    def audit(event, args):
        if event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+"):
            tick()

    sys.addaudithook(audit)


def main():
    import numba
    import torch

    torch.set_num_threads(1)
    # The first compilation loads most of numba. Not a parallel function: threads would not survive the fork.
    numba.njit(lambda x: x)(1)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import bitwright.api
    import bitwright.cli.progress
    import bitwright.cli.quantize
    import bitwright.cli.tables
    import bitwright.engine.sample
    import bitwright.evaluation.divergence
    import bitwright.report.card  # noqa: F401
    from bitwright import catalog
    from bitwright.cli.main import main as run

    for kind in ("kernels", "layouts", "methods", "schemes"):
        for name in catalog.names(kind):
            catalog.load(kind, name)
    print("ready 0", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            _watch(job["signals"])
            try:
                code = run(job["args"])
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            print(f"steps {next(_steps) - 1}", flush=True)
            os._exit(code)
        print("pid", pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("status", status, flush=True)


if __name__ == "__main__":
    main()
