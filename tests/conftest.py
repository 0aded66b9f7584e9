import pytest

from tests.small import add_text, make_model, run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """4,000 characters of stories, one byte a token for the tiny tokenizer."""
    return add_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tied Llama of three blocks with a byte tokenizer. Not to be changed: copy it first."""
    return make_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def bitwright_cli(capfd):
    """Run the command line here: ``code, stdout, stderr``."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(*arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call
