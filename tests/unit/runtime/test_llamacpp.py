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
