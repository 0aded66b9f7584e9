"""``bench`` end to end on tiny models: counts, records and failures; nothing that depends on how fast the machine is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.small import make_model
from typer.testing import CliRunner

from bitwright.api import quantize, to_gguf
from bitwright.cli.bench import app
from bitwright.errors import InputError
from bitwright.evaluation.record import Speed
from bitwright.report.document import Candidate
from bitwright.runtime.bench import BenchOptions, allowed_tokens, bench, suitable_engines

SHORT = BenchOptions(prompt_tokens=6, new_tokens=3, batch=(1, 2), repetitions=2, warmup=1, device="cpu", threads=1)


def check(speed: Speed) -> None:
    """Figures that hold on any machine."""
    assert speed.note is None
    assert (speed.prompt_tokens, speed.new_tokens, speed.repetitions) == (6, 3, 2)
    first, fresh = speed.time_to_first_token_ms, speed.new_tokens_per_s
    assert first is not None
    assert fresh is not None
    assert 0 < first.low <= first.median <= first.high
    assert 0 < fresh.low <= fresh.median <= fresh.high
    assert speed.inter_token_p50_ms is not None
    assert speed.inter_token_p99_ms is not None
    assert 0 < speed.inter_token_p50_ms <= speed.inter_token_p99_ms
    assert speed.peak_resident_bytes is not None
    assert speed.peak_resident_bytes > 10**7
    assert speed.peak_device_bytes is None
    assert speed.versions


def test_a_folder_and_its_original_are_timed_in_transformers(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    quantize(folder, tmp_path / "out", method="rtn", bits=4, group_size=32)
    result = CliRunner().invoke(
        app,
        [str(tmp_path / "out"), "--against", str(folder), "--prompt-tokens", "6", "--new-tokens", "3", "--batch", "1,2", "--repetitions",
         "2", "--engine", "transformers", "--device", "cpu", "--threads", "1", "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert [(line["name"], line["batch"]) for line in found["against"]] == [("model", 1), ("model", 2)]
    assert [(line["name"], line["batch"]) for line in found["speeds"]] == [("out", 1), ("out", 2)]
    lines = found["against"] + found["speeds"]
    # The schema of reports takes the records as they are.
    candidate = Candidate.model_validate(
        {"name": "out", "layout": "compressed-tensors", "size": {"weight_file_bytes": 1}, "speed": lines}
    )
    for speed in candidate.speed:
        check(speed)
        assert (speed.engine, speed.device, speed.dtype, speed.threads) == ("transformers", "cpu", "bfloat16", 1)


def test_a_gguf_file_is_timed_in_llamacpp(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = make_model("llama", tmp_path / "model")
    to_gguf(folder, tmp_path / "model.gguf", gguf={"type": "Q8_0"})
    found = bench(tmp_path / "model.gguf", SHORT)
    assert [(speed.engine, speed.batch) for speed in found] == [("llamacpp", 1), ("llamacpp", 2)]
    for speed in found:
        check(speed)


def test_prompts_avoid_special_tokens(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    config = json.loads((folder / "config.json").read_text())
    allowed = set(allowed_tokens(folder))
    assert allowed
    assert max(allowed) < config["vocab_size"]
    assert not allowed & (special | {config["bos_token_id"], config["eos_token_id"]})


def test_an_engine_that_cannot_take_the_model_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("llama", tmp_path / "model")
    (found, _) = bench(folder, SHORT, engines=["llamacpp"])
    assert found.note
    assert "GGUF" in found.note or "not installed" in found.note
    monkeypatch.setattr("bitwright.runtime.bench.importlib.util.find_spec", lambda name: None)
    (missing, _) = bench(folder, SHORT, engines=["vllm"])
    assert missing.note is not None
    assert missing.note.startswith("not installed")
    assert missing.time_to_first_token_ms is None
    assert suitable_engines(folder) == ("transformers",)


def test_errors_of_the_child_come_back_as_text(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    (found, _) = bench(folder, SHORT)
    assert found.note
    assert found.repetitions == 0


def test_a_child_that_dies_is_reported(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    dying = tmp_path / "python"
    dying.write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.stderr.write('out of luck')\nsys.stderr.flush()\nos.kill(os.getpid(), 9)\n"
    )
    dying.chmod(0o755)
    options: dict[str, Any] = {**vars(SHORT), "vllm_python": dying}
    (found, _) = bench(folder, BenchOptions(**options), engines=["vllm"])
    assert found.note is not None
    assert "signal 9" in found.note
    assert "out of luck" in found.note


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    hanging = tmp_path / "python"
    hanging.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    hanging.chmod(0o755)
    options: dict[str, Any] = {**vars(SHORT), "vllm_python": hanging, "seconds": 1.0}
    (found, _) = bench(folder, BenchOptions(**options), engines=["vllm"])
    assert found.note == "no answer within 1 s"


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    request = {
        "engine": "transformers", "model": str(folder), "device": "cpu", "dtype": None, "threads": 1, "new_tokens": 100_000,
        "repetitions": 1, "warmup": 0, "prompts": [[[5, 6]]],
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "bitwright.runtime.bench_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        assert "loaded" in json.loads(child.stdout.readline())
        child.stdin.close()
        assert child.wait(timeout=60) == 1


def test_wishes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for options in ({"batch": (0,)}, {"repetitions": 0}, {"device": "tpu"}, {"dtype": "int8"}, {"warmup": -1}):
        with pytest.raises(InputError):
            BenchOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        bench(tmp_path, SHORT, engines=["tensorrt"])
    with pytest.raises(InputError):
        CliRunner().invoke(app, [str(tmp_path), "--batch", "1;2"], catch_exceptions=False)
