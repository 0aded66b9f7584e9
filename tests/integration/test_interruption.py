"""Runs that are killed, interrupted or damaged: the output is absent or whole, and resuming gives identical bytes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tests.integration.conftest import ENVIRONMENT, ROOT
from tests.small import contents, left_over

CALIBRATED = ["--layout", "native", "--group-size", "32", "--samples", "8", "--length", "32"]
DATA_FREE = ["--method", "rtn", "--layout", "gptq", "--group-size", "32"]


@pytest.fixture(scope="module")
def commands(llama, text, forker, tmp_path_factory):
    """kind -> (arguments without the output, what an undisturbed run writes, how many disk steps it takes)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    kinds = {
        "calibrated": ["quantize", llama, *CALIBRATED, "--calibration", text],
        "sampled": ["quantize", llama, *CALIBRATED],
        "data-free": ["quantize", llama, *DATA_FREE],
    }
    found = {}
    for kind, arguments in kinds.items():
        assert forker.run(*arguments, "-o", folder / kind) == 0, forker.output
        found[kind] = (arguments, contents(folder / kind), forker.steps)
    return found


def _check_absent_or_whole(output, expected):
    if output.exists():
        assert contents(output) == expected


def _finish(forker, arguments, output, expected):
    code = forker.run(*arguments, "-o", output)
    if code == 2 and output.exists():
        assert "exists already" in forker.output
    else:
        assert code == 0, forker.output
    assert contents(output) == expected
    assert left_over(output) == [output.name] or code == 2


@pytest.mark.parametrize("kind", ["calibrated", "sampled", "data-free"])
def test_run_killed_again_and_again_ends_in_identical_bytes(kind, commands, forker, tmp_path):
    arguments, expected, steps = commands[kind]
    output = tmp_path / "out"
    rng = random.Random(f"kills {kind}")
    kills = 0
    for _ in range(9):
        code = forker.run(*arguments, "-o", output, kill_at=rng.randint(1, steps // 3))
        _check_absent_or_whole(output, expected)
        if code != -signal.SIGKILL:
            assert output.exists(), forker.output
            break
        kills += 1
    assert kills >= 3
    _finish(forker, arguments, output, expected)


@pytest.mark.parametrize("kind", ["calibrated", "data-free"])
def test_kill_at_each_of_the_last_steps_leaves_nothing_or_everything(kind, commands, forker, tmp_path):
    """The renames of publishing are the last steps: a kill before, between and after each of them."""
    arguments, expected, steps = commands[kind]
    prepared = tmp_path / "prepared"
    # Killed in the middle of publishing, the run has committed all its steps: what follows starts there each time.
    assert forker.run(*arguments, "-o", prepared, kill_at=steps - 40) == -signal.SIGKILL
    partial = tmp_path / ".prepared.bitwright-partial"
    shutil.copytree(partial, tmp_path / ".whole.bitwright-partial")
    assert forker.run(*arguments, "-o", tmp_path / "whole", "--resume", "require") == 0, forker.output
    total = forker.steps
    seen = []
    for back in range(0, 26, 2):
        folder = tmp_path / f"case{back}"
        folder.mkdir()
        output = folder / "out"
        shutil.copytree(partial, folder / ".out.bitwright-partial")
        assert forker.run(*arguments, "-o", output, kill_at=total - back) == -signal.SIGKILL
        seen.append(output.exists())
        _check_absent_or_whole(output, expected)
        if back % 6 == 0:
            _finish(forker, arguments, output, expected)
    assert seen[0]
    assert not seen[-1]


def test_kill_before_the_first_commit_is_resumed(commands, forker, tmp_path):
    """The shards exist, but no step is committed yet."""
    arguments, expected, steps = commands["calibrated"]
    output, found = tmp_path / "out", False
    for kill_at in range(1, steps):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        assert forker.run(*arguments, "-o", output, kill_at=kill_at) == -signal.SIGKILL
        partial = tmp_path / ".out.bitwright-partial"
        if (partial / "model.safetensors").exists():
            assert len((partial / ".bitwright" / "journal.jsonl").read_text().splitlines()) == 1
            found = True
            break
    assert found
    _finish(forker, arguments, output, expected)


def test_kills_at_random_times_of_a_fresh_process(commands, tmp_path):
    """No fork, no preparation: the real command, killed by the clock, from right after its start on."""
    arguments, expected, _ = commands["calibrated"]
    output = tmp_path / "out"
    command = [sys.executable, "-m", "bitwright", *map(str, arguments), "-o", str(output)]
    began = time.monotonic()
    for delay in (0.0, 0.3):
        with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay)
            process.kill()
        _check_absent_or_whole(output, expected)
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(output) == expected
    assert time.monotonic() - began < 300


def test_random_sigkills_by_the_clock(commands, forker, tmp_path):
    arguments, expected, _ = commands["calibrated"]
    output = tmp_path / "out"
    rng = random.Random(14)
    for _ in range(6):
        pid = forker.start(*arguments, "-o", output)
        time.sleep(rng.uniform(0.0, 0.4))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        forker.wait()
        _check_absent_or_whole(output, expected)
    _finish(forker, arguments, output, expected)


def _wait_for(path, pid):
    for _ in range(3000):
        if path.exists() and len(path.read_bytes().splitlines()) > 1:
            return
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the run never committed a step")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["calibrated", "data-free"])
def test_signal_finishes_the_block_and_exits_75(kind, number, commands, forker, tmp_path):
    arguments, expected, steps = commands[kind]
    output = tmp_path / "out"
    journal = tmp_path / ".out.bitwright-partial" / ".bitwright" / "journal.jsonl"
    assert forker.run(*arguments, "-o", output, signals=[(steps // 3, number)]) == 75
    assert "stopped after" in forker.output
    assert "run the same command again" in forker.output
    assert not output.exists()
    committed = len(journal.read_bytes().splitlines()) - 1
    assert f"stopped after {committed} of 4 steps" in forker.output
    assert 1 <= committed < 4
    _finish(forker, arguments, output, expected)


def test_second_signal_ends_the_process_with_130(commands, forker, tmp_path):
    arguments, expected, steps = commands["calibrated"]
    output, middle = tmp_path / "out", steps // 3
    assert forker.run(*arguments, "-o", output, signals=[(middle, signal.SIGINT), (middle + 1, signal.SIGINT)]) == 130
    assert not output.exists()
    _finish(forker, arguments, output, expected)


@pytest.fixture
def stopped(commands, forker, tmp_path):
    """A run that was asked to stop while it quantized its second block: three of four steps are committed."""
    arguments, expected, steps = commands["calibrated"]
    output = tmp_path / "out"
    journal = tmp_path / ".out.bitwright-partial" / ".bitwright" / "journal.jsonl"
    assert forker.run(*arguments, "-o", output, signals=[(steps // 2, signal.SIGINT)]) == 75
    assert len(journal.read_bytes().splitlines()) == 4
    return arguments, expected, output, journal.parent


def _newest(work):
    return max(work.glob("activations-*.bin"), key=lambda file: file.stat().st_mtime_ns)


def _flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_newest_activations_cost_one_block(damage, stopped, forker):
    arguments, expected, output, work = stopped
    newest = _newest(work)
    if damage == "flip":
        _flip(newest, newest.stat().st_size // 2)
    elif damage == "truncate":
        os.truncate(newest, newest.stat().st_size - 100)
    else:
        newest.unlink()
    assert forker.run(*arguments, "-o", output) == 0, forker.output
    assert "are damaged; going back to the step before" in forker.output
    assert contents(output) == expected


def test_two_damaged_generations_are_refused_each_time(stopped, forker):
    arguments, expected, output, work = stopped
    for file in work.glob("activations-*.bin"):
        _flip(file, 10)
    for _ in range(2):
        assert forker.run(*arguments, "-o", output) == 2
        assert "no generation of the activations is whole" in forker.output
        assert "--resume never" in forker.output
        assert not output.exists()
    assert forker.run(*arguments, "-o", output, "--resume", "never") == 0
    assert contents(output) == expected


@pytest.mark.parametrize("cut", [1, 30])
def test_torn_tail_of_the_journal_is_dropped(cut, stopped, forker):
    arguments, expected, output, work = stopped
    journal = work / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - cut)
    assert forker.run(*arguments, "-o", output) == 0, forker.output
    if cut > 1:  # one byte is the line's end alone: the entry is whole
        assert "the newest entry of the journal is damaged" in forker.output
    assert contents(output) == expected


def test_damaged_head_of_the_journal_is_refused(stopped, forker):
    arguments, _, output, work = stopped
    _flip(work / "journal.jsonl", 20)
    assert forker.run(*arguments, "-o", output) == 2
    assert "damaged from its beginning" in forker.output


def test_damaged_partial_shard_fails_verification(stopped, forker):
    """Bytes that an earlier, killed run wrote are not trusted."""
    arguments, expected, output, work = stopped
    shard = work.parent / "model.safetensors"
    journal = [json.loads(line)["record"] for line in (work / "journal.jsonl").read_text().splitlines()]
    name = next(iter(journal[-1]["commit"]["hashes"]))
    header = json.loads(shard.read_bytes()[8 : 8 + int.from_bytes(shard.read_bytes()[:8], "little")])
    stored = header.get(name) or header[name + ".codes"]
    start = 8 + int.from_bytes(shard.read_bytes()[:8], "little") + stored["data_offsets"][0]
    _flip(shard, start)
    assert forker.run(*arguments, "-o", output) == 3, forker.output
    assert f"{name}: what was written differs from what was computed" in forker.output
    assert left_over(output) == []
    assert forker.run(*arguments, "-o", output) == 0
    assert contents(output) == expected


def test_resume_after_a_change_lists_the_differences(stopped, forker, llama, text, tmp_path):
    arguments, expected, output, _ = stopped
    changed_text = tmp_path / "text.txt"
    changed_text.write_text(text.read_text().replace("the", "a"))
    changed_model = tmp_path / "model" / "llama"
    shutil.copytree(llama, changed_model)
    file = changed_model / "model.safetensors"
    _flip(file, file.stat().st_size - 1)
    cases = [
        ([*arguments, "--bits", "3"], ["recipe bits: was null, is 3"]),
        ([*arguments, "--seed", "1"], ["recipe seed: was 0, is 1"]),
        ([*arguments, "--calibration", changed_text], ["calibration tokens: was", "recipe calibration: was"]),
        (["quantize", changed_model, *arguments[2:]], ["model file model.safetensors: was"]),
    ]
    for changed, messages in cases:
        assert forker.run(*changed, "-o", output) == 2
        for message in messages:
            assert message in forker.output
        assert "--resume never" in forker.output
        assert not output.exists()
    assert forker.run(*arguments, "-o", output, "--resume", "require") == 0
    assert contents(output) == expected


def test_resume_require_without_an_interrupted_run_is_refused(commands, forker, tmp_path):
    arguments, _, _ = commands["data-free"]
    assert forker.run(*arguments, "-o", tmp_path / "out", "--resume", "require") == 2
    assert "no interrupted run to resume" in forker.output
    assert left_over(tmp_path / "out") == []


def test_second_job_on_one_output_is_refused_with_the_first_ones_pid(commands, forker, tmp_path, bitwright):
    arguments, expected, _ = commands["calibrated"]
    output = tmp_path / "out"
    pid = forker.start(*arguments, "-o", output)
    _wait_for(tmp_path / ".out.bitwright-partial" / ".bitwright" / "journal.jsonl", pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        code, _, err = bitwright(*arguments, "-o", output)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert code == 2
    assert f"PID {pid}" in err
    assert forker.wait() == 0
    assert contents(output) == expected
