import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitwright.errors import InputError, ResourceError
from bitwright.io import publish, rename
from bitwright.io.publish import Staging


def fill(folder: Path, text: str, count: int = 3) -> None:
    (folder / "config.json").write_text(text)
    for index in range(count):
        (folder / f"{index}.safetensors").write_text(text)


def state(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.iterdir()}


def leftovers(parent: Path) -> list[str]:
    return [name for name in os.listdir(parent) if "bitwright" in name]


def make(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    fill(folder, text)
    return folder


def test_nothing_is_visible_before_publish_and_nothing_else_after(tmp_path):
    output = tmp_path / "out"
    with Staging.acquire(output) as staging:
        fill(staging.folder, "new")
        (staging.work / "journal").write_text("x")
        assert not output.exists()
        staging.publish()
    assert state(output) == {"new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("umask", [0o027, 0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with Staging.acquire(tmp_path / "out") as staging:
            assert staging.folder.stat().st_mode & 0o777 == 0o700
            fill(staging.folder, "new")
            (staging.folder / "0.safetensors").chmod(0o600)
            (staging.folder / "sub").mkdir(mode=0o700)
            (staging.folder / "sub" / "x").touch(mode=0o755)
            staging.publish()
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert {p.stat().st_mode & 0o777 for p in (out, out / "sub")} == {0o777 & ~umask}
    files = (out / "config.json", out / "0.safetensors", out / "sub" / "x")
    assert {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}


def test_an_existing_output_is_refused_without_overwrite_and_left_alone(tmp_path):
    output = make(tmp_path / "out", "old")
    with pytest.raises(InputError, match="exists already"):
        Staging.acquire(output)
    assert state(output) == {"old"}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_the_output(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(publish, "exchange", lambda first, second: False)
    output = make(tmp_path / "out", "old")
    with Staging.acquire(output, overwrite=True) as staging:
        fill(staging.folder, "new", count=1)
        assert state(output) == {"old"}
        staging.publish()
    assert state(output) == {"new"}
    assert sorted(os.listdir(output)) == ["0.safetensors", "config.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_exchange_is_used_where_the_kernel_has_it(tmp_path):
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    if not rename.exchange(a, b):
        pytest.skip("no renameat2 here")
    assert (state(a), state(b)) == ({"b"}, {"a"})
    with pytest.raises(FileNotFoundError):
        rename.exchange(a, tmp_path / "none")


def test_overwrite_spares_what_does_not_look_like_a_model(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    make(tmp_path / "real", "x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("home", "file", "link"):
        with pytest.raises(InputError, match=name):
            Staging.acquire(tmp_path / name, overwrite=True)
    (tmp_path / "empty").mkdir()
    with Staging.acquire(tmp_path / "empty", overwrite=True) as staging:
        fill(staging.folder, "new")
        staging.publish()
    assert state(tmp_path / "empty") == {"new"}


def test_outputs_that_touch_the_source_are_refused(tmp_path):
    source = make(tmp_path / "models" / "source", "x")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "models" / "config.json").touch()
    for output in (source, source / "out", tmp_path / "link", tmp_path / "link" / "out", tmp_path / "models"):
        for given in (source, tmp_path / "link"):
            with pytest.raises(InputError, match="source"):
                Staging.acquire(output, overwrite=True, source=given)
    Staging.acquire(tmp_path / "models" / "source-4bit", source=source).release()
    assert state(source) == {"x"}
    assert leftovers(tmp_path) + leftovers(source) == []


def test_parents_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="parent folder does not exist"):
        Staging.acquire(tmp_path / "none" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a usable output path"):
        Staging.acquire(tmp_path / "file" / "out")
    with pytest.raises(InputError):
        Staging.acquire(Path("/"))
    with pytest.raises(InputError):
        Staging.acquire(tmp_path / ("x" * 250))
    with pytest.raises(InputError):
        Staging.acquire(Path("/proc/out"))
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    with pytest.raises(InputError, match="cannot be written to"):
        Staging.acquire(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="cannot be written to"):
        Staging.acquire(tmp_path / "out")
    tmp_path.chmod(0o755)


HOLDER = """
import sys, time
from pathlib import Path
from bitwright.io.publish import Staging
staging = Staging.acquire(Path(sys.argv[1]))
(staging.work / "journal").write_text("block 3")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_job_is_refused_with_the_pid_of_the_first_and_a_dead_one_is_resumed(tmp_path):
    output = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another bitwright \(PID {child.pid}\)"):
            Staging.acquire(output)
        child.kill()
    with Staging.acquire(output) as staging:
        assert staging.exists_partial
        assert (staging.work / "journal").read_text() == "block 3"
        with pytest.raises(InputError, match=rf"PID {os.getpid()}"):
            Staging.acquire(output)
        staging.reset()
        assert not staging.exists_partial
        assert os.listdir(staging.folder) == [".bitwright"]
    assert leftovers(tmp_path) == []


def test_a_lock_file_that_was_removed_meanwhile_is_not_a_lock(tmp_path, monkeypatch):
    original, calls = fcntl.flock, []

    def flock(descriptor, operation):
        original(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".out.bitwright-lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    Staging.acquire(tmp_path / "out").release()
    assert len(calls) == 2


def test_release_keeps_what_can_be_resumed_and_nothing_else(tmp_path):
    with Staging.acquire(tmp_path / "out") as staging:
        fill(staging.folder, "part")
    assert leftovers(tmp_path) == []
    with Staging.acquire(tmp_path / "out") as staging:
        fill(staging.folder, "part")
        (staging.work / "journal").touch()
    assert leftovers(tmp_path) == [".out.bitwright-partial"]
    with Staging.acquire(tmp_path / "out") as staging:
        assert staging.exists_partial
        staging.discard()
    assert leftovers(tmp_path) == []
    with pytest.raises(InputError, match="already"):
        staging.publish()


def test_leftovers_of_dead_runs_are_cleaned(tmp_path):
    output = tmp_path / "out"
    make(tmp_path / ".out.bitwright-partial", "stale")
    make(tmp_path / ".out.bitwright-trash", "stale")
    old = make(tmp_path / ".out.bitwright-old", "old")
    with pytest.raises(InputError, match="exists already"):  # the old output was put back first
        Staging.acquire(output)
    assert state(output) == {"old"}
    assert not old.exists()
    assert leftovers(tmp_path) == []


def test_a_partial_folder_that_is_a_link_is_refused_and_its_target_spared(tmp_path):
    target = make(tmp_path / "precious", "x")
    (tmp_path / ".out.bitwright-partial").symlink_to(target)
    with pytest.raises(InputError, match="not a folder of this user"):
        Staging.acquire(tmp_path / "out")
    assert state(target) == {"x"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_partial_folder_of_another_user_is_refused_and_spared(tmp_path):
    foreign = make(tmp_path / ".out.bitwright-partial", "x")
    os.chown(foreign, 65534, 65534)
    with pytest.raises(InputError, match="not a folder of this user"):
        Staging.acquire(tmp_path / "out")
    assert state(foreign) == {"x"}


def test_space_is_required_before_work(tmp_path):
    with Staging.acquire(tmp_path / "out") as staging:
        staging.require_space(1)
        with pytest.raises(ResourceError, match=rf"{2**60} bytes needed, \d+ bytes free"):
            staging.require_space(2**60)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_rename_that_fails_leaves_the_old_output_and_a_resumable_partial(tmp_path, monkeypatch, can_exchange):
    output = make(tmp_path / "out", "old")
    original = os.rename

    def fail(first, second):
        if Path(second) == output and "partial" in str(first):
            raise PermissionError(13, "no")
        return original(first, second)

    def broken(first, second):
        if can_exchange:
            raise PermissionError(13, "no")
        return False

    with Staging.acquire(output, overwrite=True) as staging:
        fill(staging.folder, "new")
        (staging.work / "journal").touch()
        with monkeypatch.context() as patch:
            patch.setattr(publish, "exchange", broken)
            patch.setattr(os, "rename", fail)
            with pytest.raises(InputError, match="publishing"):
                staging.publish()
        assert state(output) == {"old"}
        assert staging.exists_partial
        staging.publish()
    assert state(output) == {"new"}


def test_links_in_the_partial_folder_are_not_published(tmp_path):
    with Staging.acquire(tmp_path / "out") as staging:
        (staging.folder / "config.json").symlink_to("/etc/passwd")
        with pytest.raises(InputError, match="publishing"):
            staging.publish()
    assert not (tmp_path / "out").exists()


REPLACER = """
import os
import sys
from pathlib import Path
from bitwright.io import publish
os.fsync = lambda descriptor: None  # a kill does not lose the page cache: more renames per second instead
from bitwright.io.publish import Staging
output, can_exchange = Path(sys.argv[1]), sys.argv[2] == "yes"
if not can_exchange:
    publish.exchange = lambda first, second: False
print("ready", flush=True)
generation = int(sys.argv[3])
while True:
    generation += 1
    with Staging.acquire(output, overwrite=True) as staging:
        for name in ("config.json", *(f"{i}.safetensors" for i in range(40))):
            (staging.folder / name).write_text(str(generation))
        (staging.work / "journal").write_text("x")
        staging.publish()
"""


@pytest.mark.parametrize("can_exchange", ["yes", "no"])
def test_a_kill_at_any_moment_leaves_a_whole_output(tmp_path, can_exchange):
    rng = random.Random(5)
    output = make(tmp_path / "out", "0")
    for index in (3, *range(4, 40)):
        (output / f"{index}.safetensors").write_text("0")
    seen, pending = set(), set()
    for round_number in range(20):
        command = [sys.executable, "-c", REPLACER, str(output), can_exchange, str(1000 * round_number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.08))
            child.send_signal(signal.SIGKILL)
        whole = output
        if can_exchange == "no" and not output.exists():
            whole = tmp_path / ".out.bitwright-old"
        assert len(os.listdir(whole)) == 41
        assert len(state(whole)) == 1
        seen |= state(whole)
        pending |= set(leftovers(tmp_path))
    assert len(seen) > 5
    assert len(pending) > 1  # kills did land inside of the critical section
    with Staging.acquire(output, overwrite=True) as staging:
        staging.discard()
    assert len(os.listdir(output)) == 41
    assert os.listdir(tmp_path) == ["out"]
