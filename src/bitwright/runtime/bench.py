"""Time models in the engines that are here, each model and engine in a child process of its own (``runtime.bench_child``).

So the peak of resident memory is that of one model, and an engine that dies takes nobody along. A model that an engine does not take
gives a record without figures, whose ``note`` says why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from bitwright.errors import InputError
from bitwright.evaluation.record import Speed
from bitwright.evaluation.speed import random_prompts, summarize
from bitwright.io.text import printable

__all__ = ["ENGINES", "BenchOptions", "allowed_tokens", "bench", "suitable_engines"]

ENGINES = ("transformers", "llamacpp", "vllm")
_CHILD = Path(__file__).with_name("bench_child.py")
_LOG_TAIL = 1500


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How speed is measured.

    batch: one measurement for each size. device: auto, cpu or cuda. dtype: of the activations in transformers and vLLM (None: the
    model's). vllm_python: an interpreter that has vLLM. seconds: a child that takes longer is ended.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: tuple[int, ...] = (1,)
    repetitions: int = 5
    warmup: int = 1
    device: str = "auto"
    dtype: str | None = None
    threads: int = field(default_factory=_cores)
    seed: int = 0
    vllm_python: Path | None = None
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.new_tokens, self.repetitions, self.threads, *self.batch) < 1 or self.warmup < 0:
            raise InputError("nothing would be measured", mend="all counts must be 1 or more, --warmup 0 or more")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"device '{self.device}' is unknown", mend="use auto, cpu or cuda")
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            raise InputError(f"dtype '{self.dtype}' is unknown", mend="use float32, float16 or bfloat16")


def suitable_engines(path: Path, *, vllm_python: Path | None = None) -> tuple[str, ...]:
    """Engines that are installed and take this kind of model: llama.cpp GGUF files, the others folders."""
    if path.is_file():
        return ("llamacpp",) if importlib.util.find_spec("xllamacpp") else ()
    has_vllm = vllm_python is not None or importlib.util.find_spec("vllm") is not None
    return ("transformers", "vllm") if has_vllm else ("transformers",)


def bench(
    path: Path,
    options: BenchOptions,
    *,
    engines: Sequence[str] = (),
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Speed]:
    """Records of one model: for every engine (none given: those that suit) and batch size one. name: how the records call it."""
    for engine in engines:
        if engine not in ENGINES:
            raise InputError(f"engine '{engine}' is unknown", mend=f"use one of: {', '.join(ENGINES)}")
    wanted = tuple(dict.fromkeys(engines)) or suitable_engines(path, vllm_python=options.vllm_python)
    called = name or path.name
    found: list[Speed] = []
    for engine in wanted or ("llamacpp",):
        reason = _missing(engine, path, options)
        if reason is not None:
            found += [_empty(called, engine, size, options, reason) for size in options.batch]
            continue
        if progress is not None:
            progress(f"{called} in {engine}")
        found += _measure(path, called, engine, options)
    return found


def _missing(engine: str, path: Path, options: BenchOptions) -> str | None:
    """Why an engine cannot be tried."""
    if engine == "llamacpp":
        if importlib.util.find_spec("xllamacpp") is None:
            return "not installed: pip install 'bitwright[llamacpp]'"
        return None if path.is_file() else "llama.cpp runs GGUF files"
    if engine == "vllm":
        if options.vllm_python is None and importlib.util.find_spec("vllm") is None:
            return "not installed: give --vllm-python, an interpreter that has vLLM"
        return "vLLM is measured on checkpoint folders" if path.is_file() else None
    return None


def _measure(path: Path, name: str, engine: str, options: BenchOptions) -> list[Speed]:
    """One child: all batch sizes of a model in an engine."""
    allowed = allowed_tokens(path)
    request = {
        "engine": engine, "model": str(path.resolve()), "device": options.device, "dtype": options.dtype, "threads": options.threads,
        "new_tokens": options.new_tokens, "repetitions": options.repetitions, "warmup": options.warmup,
        "prompts": [random_prompts(size, options.prompt_tokens, allowed, seed=options.seed) for size in options.batch],
    }  # fmt: skip
    answers, failed = _ask(request, options)
    loaded: Mapping[str, Any] = next((answer["loaded"] for answer in answers if "loaded" in answer), {})
    batches = {answer["batch"]["size"]: answer["batch"] for answer in answers if "batch" in answer}
    return [
        _record(name, engine, size, options, loaded, batches[size])
        if size in batches
        else _empty(name, engine, size, options, failed or "the engine gave no answer")
        for size in options.batch
    ]


def _record(
    name: str, engine: str, size: int, options: BenchOptions, loaded: Mapping[str, Any], batch: Mapping[str, Any]
) -> Speed:
    runs = [tuple(tuple(times) for times in run) for run in batch["arrivals"]]
    timing = summarize(runs, prompt_tokens=options.prompt_tokens)
    return Speed(
        name=name, engine=engine, device=loaded["device"], dtype=loaded["dtype"], threads=loaded["threads"], batch=size,
        prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, repetitions=len(runs), load_ms=loaded["milliseconds"],
        time_to_first_token_ms=timing.time_to_first_token_ms, inter_token_p50_ms=timing.inter_token_p50_ms,
        inter_token_p99_ms=timing.inter_token_p99_ms, prompt_tokens_per_s=timing.prompt_tokens_per_s,
        new_tokens_per_s=timing.new_tokens_per_s, peak_resident_bytes=batch["resident"], peak_device_bytes=batch["device"],
        versions=dict(loaded["versions"]),
    )  # fmt: skip


def _empty(name: str, engine: str, size: int, options: BenchOptions, note: str) -> Speed:
    return Speed(
        name=name, engine=engine, device=options.device, dtype="", threads=options.threads, batch=size,
        prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, repetitions=0, note=printable(note),
    )  # fmt: skip


def _ask(request: Mapping[str, Any], options: BenchOptions) -> tuple[list[dict[str, Any]], str | None]:
    """All answers of a child, and why there are no more, where it failed."""
    foreign = request["engine"] == "vllm" and options.vllm_python is not None
    command = (
        [str(options.vllm_python), str(_CHILD)]
        if foreign
        else [sys.executable, "-P", "-m", "bitwright.runtime.bench_child"]
    )
    threads = str(options.threads)
    environment = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    with tempfile.TemporaryFile() as log:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        except OSError as error:
            return [], f"cannot be started: {error}"
        late = threading.Timer(options.seconds, child.kill)
        late.start()
        try:
            return _listen(child, request, log, late, options.seconds)
        finally:
            late.cancel()
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _listen(
    child: subprocess.Popen[bytes], request: Mapping[str, Any], log: IO[bytes], late: threading.Timer, seconds: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Send the request and read answers. Standard input stays open: its end tells the child that we are gone."""
    assert child.stdin is not None
    assert child.stdout is not None
    answers: list[dict[str, Any]] = []
    try:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return answers, _died(child, log)
    for line in child.stdout:
        answer = json.loads(line)
        if "error" in answer:
            return answers, str(answer["error"])
        if "done" in answer:
            return answers, None
        answers.append(answer)
    if late.finished.is_set():
        return answers, f"no answer within {seconds:.0f} s"
    return answers, _died(child, log)


def _died(child: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    code = child.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    size = os.fstat(log.fileno()).st_size
    tail = os.pread(log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL)).decode("utf-8", "replace")
    return f"the process {how}: " + " / ".join(line.strip() for line in tail.splitlines()[-4:] if line.strip())


def allowed_tokens(path: Path) -> list[int]:
    """Ids that a prompt may consist of: the vocabulary without special tokens."""
    if path.is_file():
        return _gguf_tokens(path)
    from bitwright.io.strict import load_json

    config = load_json(path / "config.json")
    text = config.get("text_config") if isinstance(config, dict) else None
    flat: dict[str, Any] = {**config, **text} if isinstance(text, dict) else dict(config)
    size = flat.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise InputError(f"{printable(str(path))}: config.json does not say 'vocab_size'", mend="fetch it again")
    special = {value for name, value in flat.items() if name.endswith("_token_id") and isinstance(value, int)}
    file = path / "tokenizer.json"
    if file.is_file():
        tokenizer = load_json(file)
        added = tokenizer.get("added_tokens", []) if isinstance(tokenizer, dict) else []
        special |= {token["id"] for token in added if isinstance(token, dict) and isinstance(token.get("id"), int)}
        vocabulary = (tokenizer.get("model") or {}).get("vocab") if isinstance(tokenizer, dict) else None
        if isinstance(vocabulary, dict | list) and vocabulary:
            # Rows of the embedding beyond the tokenizer's stand for nothing.
            size = min(size, len(vocabulary))
    return [number for number in range(size) if number not in special]


def _gguf_tokens(path: Path) -> list[int]:
    from bitwright.io.gguf_file import GgufFile

    with GgufFile.open(path) as file:
        count = len(file.get("tokenizer.ggml.tokens", list))
        kinds = file.get("tokenizer.ggml.token_type", np.ndarray, None)
    # 1 is a plain token; the others are unknown, control, user-defined, unused and byte tokens.
    plain = [] if kinds is None else [number for number, kind in enumerate(kinds) if kind == 1]
    return plain or list(range(count))
