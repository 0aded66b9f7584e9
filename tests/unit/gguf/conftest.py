"""Tiny models, made once."""

import pytest
from tests.gguf_zoo import MODELS, make, write_gguf


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """``zoo(name) -> (folder, GGUF file in F32, export)``."""
    base, made = tmp_path_factory.mktemp("gguf-zoo"), {}

    def get(name):
        assert name in MODELS
        if name not in made:
            folder, file = make(name, base / name), base / f"{name}.gguf"
            made[name] = folder, file, write_gguf(folder, file)
        return made[name]

    return get
