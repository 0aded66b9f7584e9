"""Run a GGUF file in llama.cpp, in a child process that may die without taking us along.

llama.cpp aborts the whole process on some files, and on some failures in the middle of a run. So it lives in a child
(``runtime.llamacpp_child``, over ``xllamacpp``); requests and answers are JSON lines over pipes of their own, and its log goes to a
temporary file whose end is quoted when something goes wrong.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bitwright.errors import InputError, ResourceError
from bitwright.io.gguf_check import check_hyperparameters
from bitwright.io.gguf_file import GgufFile
from bitwright.io.text import printable

__all__ = ["LlamaCpp", "LlamaOptions"]

_LOG_TAIL = 2000
_MEND = "see the log above; try a smaller --context, or check the file with `bitwright inspect`"


@dataclass(frozen=True, kw_only=True)
class LlamaOptions:
    """How the model is loaded.

    context: tokens of context; threads: None lets llama.cpp choose; gpu_layers: blocks that go to a GPU; embeddings: vectors are wanted
    instead of text. load_seconds, answer_seconds: how long the child may take to load, and between two pieces of an answer.
    """

    context: int = 2048
    threads: int | None = None
    gpu_layers: int = 0
    embeddings: bool = False
    load_seconds: float = 600.0
    answer_seconds: float = 600.0


class LlamaCpp:
    """A loaded model. Use as ``with LlamaCpp.load(path) as model``.

    Raises InputError for files that llama.cpp does not take and for requests that it refuses, ResourceError where the child died or does
    not answer.
    """

    def __init__(self, path: Path, options: LlamaOptions, child: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.path = path
        self._options = options
        self._child = child
        self._log = log
        self._buffer = b""
        self._answering = False

    @classmethod
    def load(cls, path: Path, options: LlamaOptions | None = None) -> Self:
        """Check the file, start the child, and wait until the model is there."""
        options = options or LlamaOptions()
        if importlib.util.find_spec("xllamacpp") is None:
            raise InputError("llama.cpp is not installed", mend="pip install 'bitwright[llamacpp]'")
        if options.context < 8:
            raise InputError(f"a context of {options.context} tokens is too short", mend="use 512 or more")
        with GgufFile.open(path) as file:
            check_hyperparameters(file)
            architecture = file.get("general.architecture", str)
            pooled = f"{architecture}.pooling_type" in file.values
        log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        try:
            child = subprocess.Popen(
                # -P: without it, modules in the current folder would be imported before those of Python.
                [sys.executable, "-P", "-m", "bitwright.runtime.llamacpp_child"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        except OSError as error:
            log.close()
            raise ResourceError(f"llama.cpp's process cannot be started: {error}", mend="free memory") from error
        model = cls(path, options, child, log)
        try:
            model._send({"load": str(path.resolve()), "options": {**asdict(options), "pooled": pooled}})
            model._receive(options.load_seconds)
        except BaseException:
            model.close()
            raise
        return model

    def generate(self, prompt: str, **settings: Any) -> str:
        """The continuation of ``prompt``. settings: ``max_tokens``, ``temperature``, ``seed``, ``stop`` and what else llama.cpp's
        ``/completions`` knows.
        """
        return "".join(self.stream(prompt, **settings))

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """The same, piece by piece."""
        for answer in self._ask("complete", {"prompt": prompt, **settings, "stream": True}):
            yield str(answer["choices"][0].get("text") or "")

    def chat(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Iterator[str]:
        """The answer to a conversation, by the model's own chat template, piece by piece."""
        request = {"messages": [dict(message) for message in messages], **settings, "stream": True}
        for answer in self._ask("chat", request):
            choices = answer.get("choices") or [{}]
            yield str(choices[0].get("delta", {}).get("content") or "")

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector for each text; the model must be loaded with ``embeddings``."""
        if not self._options.embeddings:
            raise InputError("the model was not loaded for embeddings", mend="pass LlamaOptions(embeddings=True)")
        (answer,) = self._ask("embed", {"input": list(texts), "model": self.path.stem})
        return [list(item["embedding"]) for item in sorted(answer["data"], key=lambda item: item["index"])]

    def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A raw ``/completions`` request without streaming, and its raw answer."""
        (answer,) = self._ask("complete", {**request, "stream": False})
        return answer

    def close(self) -> None:
        """End the child. May be called twice."""
        if self._child.stdin is not None and not self._child.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it is dead already
                self._child.stdin.close()
        try:
            self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._log.close()

    def _ask(self, kind: str, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """All answers to one request; a caller that stops listening stops the generation. InputError while another one is answered."""
        if self._answering:
            raise InputError(
                "the model is still answering another request",
                mend="read that answer to its end, or close it, before asking again",
            )
        self._send({"ask": kind, "request": dict(request)})
        self._answering, done = True, False
        try:
            while True:
                message = self._receive(self._options.answer_seconds)
                if message.get("done"):
                    done = True
                    return
                yield message["answer"]
        except (InputError, ResourceError):
            done = True  # a refusal ends the request, and so does death
            raise
        finally:
            if not done and self._child.poll() is None and not self._log.closed:
                self._send({"stop": True})
                with contextlib.suppress(InputError):  # a refusal is an end too, and nobody listens any more
                    while not self._receive(self._options.answer_seconds).get("done"):
                        pass
            self._answering = False

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        if self._log.closed:
            raise InputError("the model is closed", mend="load it again")
        try:
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._died() from error

    def _receive(self, seconds: float) -> dict[str, Any]:
        """The next message. InputError for a refusal, ResourceError where none comes."""
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        poll = select.poll()  # select() itself takes no descriptor above 1023
        poll.register(descriptor, select.POLLIN)
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not poll.poll(1000 * max(0.0, until - time.monotonic())):
                self._child.kill()
                raise ResourceError(
                    f"{printable(str(self.path))}: llama.cpp gave no answer for {seconds:.0f} s",
                    mend="use a smaller model",
                )
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise self._died()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        if "error" in message:
            log = f"\n{self._log_tail()}" if message.get("loading") else ""
            raise InputError(f"{printable(str(self.path))}: llama.cpp: {printable(message['error'])}{log}", mend=_MEND)
        return message

    def _died(self) -> ResourceError:
        code = self._child.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return ResourceError(f"{printable(str(self.path))}: llama.cpp {how}\n{self._log_tail()}", mend=_MEND)

    def _log_tail(self) -> str:
        self._log.flush()
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL)).decode("utf-8", "replace")
        return "\n".join(printable(line) for line in tail.splitlines()[-8:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
