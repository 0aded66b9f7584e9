import json
import os
from pathlib import Path

import pytest
from tests.small import STORY, STORY_TEXT

import bitwright

HERE = Path(__file__).parent
_LINES = pytest.StashKey[list]()


def pytest_collection_modifyitems(config, items):
    wanted = os.environ.get("BITWRIGHT_INTEROP") == "1"
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.interop)
            if not wanted:
                item.add_marker(pytest.mark.skip(reason="needs foreign engines: make interop, or BITWRIGHT_INTEROP=1"))


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(_LINES, []):
        terminalreporter.write_line(line)


@pytest.fixture
def report(request):
    """Says a line at the end of the run: counts belong beside a pass."""

    def say(line):
        request.config.stash.setdefault(_LINES, []).append(f"{request.node.name}: {line}")

    return say


@pytest.fixture(scope="session")
def windows():
    """``windows(count, length)``: windows of the example text, 512 tokens from one to the next."""
    from bitwright.engine.calibration import load_tokenizer

    text = STORY_TEXT.read_text(encoding="utf-8")
    ids = load_tokenizer(STORY)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return lambda count, length: [ids[start : start + length] for start in range(0, 512 * count, 512)]


@pytest.fixture(scope="session")
def prompts(windows):
    """64 prompts of 32 tokens."""
    return windows(64, 32)


@pytest.fixture(scope="session")
def prompts_file(prompts, tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.json"
    file.write_text(json.dumps(prompts))
    return file


@pytest.fixture(scope="session")
def calibration_file(windows, tmp_path_factory):
    file = tmp_path_factory.mktemp("calibration") / "windows.json"
    file.write_text(json.dumps(windows(16, 256)))
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(name, **options)``: the example model quantized by bitwright, made once a session under this name."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name, **options):
        if name not in made:
            made[name] = folder / name
            calibration = {"text": str(STORY_TEXT), "samples": 8, "length": 256}
            bitwright.quantize(STORY, made[name], calibration=calibration, **{"method": "rtn", **options})
        return made[name]

    return make
