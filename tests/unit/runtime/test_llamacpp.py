"""llama.cpp in a child process: what it generates, and what happens when it dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from bitwright import InputError, ResourceError, to_gguf
from bitwright.runtime.llamacpp import LlamaCpp, LlamaOptions

pytest.importorskip("xllamacpp")

MODEL = Path("examples/storylm-8m")
OPTIONS = LlamaOptions(context=256, threads=1, load_seconds=60, answer_seconds=60)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / "story.gguf"
    return to_gguf(MODEL, output, gguf={"type": "f32"}).output


def test_greedy_text_is_that_of_transformers(file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompt = "It was a dark night, and the old man"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    with LlamaCpp.load(file, OPTIONS) as loaded:
        pieces = list(loaded.stream(prompt, max_tokens=24, temperature=0))
    assert len(pieces) > 5
    assert "".join(pieces).strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_a_listener_that_leaves_stops_the_generation_and_the_model_goes_on(file: Path) -> None:
    with LlamaCpp.load(file, OPTIONS) as loaded:
        stream = loaded.stream("Once", max_tokens=200, temperature=0)
        first = next(stream)
        stream.close()
        assert loaded.generate("Once", max_tokens=200, temperature=0).startswith(first)


def test_vectors_have_the_width_of_the_model(file: Path) -> None:
    options = LlamaOptions(context=256, threads=1, embeddings=True, load_seconds=60, answer_seconds=60)
    with LlamaCpp.load(file, options) as loaded:
        one, two, again = loaded.embed(["a horse", "the sea", "a horse"])
    assert len(one) == 256
    assert one == again != two


def test_a_dead_child_is_an_error_and_not_our_death(file: Path) -> None:
    with LlamaCpp.load(file, OPTIONS) as loaded:
        os.kill(loaded._child.pid, signal.SIGABRT)
        with pytest.raises(ResourceError, match="killed by signal 6"):
            loaded.generate("Once", max_tokens=4)


def test_a_refused_request_names_the_reason_and_the_model_goes_on(file: Path) -> None:
    with LlamaCpp.load(file, OPTIONS) as loaded:
        with pytest.raises(InputError, match="context"):
            loaded.generate("word " * 2000, max_tokens=4)
        assert loaded.generate("Once", max_tokens=4, temperature=0)


def test_damaged_files_are_refused_before_llama_cpp_sees_them(file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"short\.gguf"):
        LlamaCpp.load(short, OPTIONS)


def test_a_second_request_does_not_read_the_answer_to_the_first(file: Path) -> None:
    with LlamaCpp.load(file, OPTIONS) as loaded:
        expected = loaded.generate("Once", max_tokens=12, temperature=0)
        stream = loaded.stream("Once", max_tokens=12, temperature=0)
        first = next(stream)
        with pytest.raises(InputError, match="still answering"):
            loaded.generate("The old man", max_tokens=4)
        assert first + "".join(stream) == expected
        assert loaded.generate("Once", max_tokens=12, temperature=0) == expected


def test_modules_in_the_current_folder_are_not_imported(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(3)")
    absolute = file.resolve()
    monkeypatch.chdir(tmp_path)
    with LlamaCpp.load(absolute, OPTIONS) as loaded:
        assert loaded.generate("Once", max_tokens=2)


def test_a_closed_model_says_so(file: Path) -> None:
    with LlamaCpp.load(file, OPTIONS) as loaded:
        pass
    with pytest.raises(InputError, match="closed"):
        loaded.generate("Once")


def test_processes_with_many_open_files_can_listen(file: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1400:
        pytest.skip("this many files cannot be opened")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with LlamaCpp.load(file, OPTIONS) as loaded:
            assert loaded.generate("Once", max_tokens=2)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
