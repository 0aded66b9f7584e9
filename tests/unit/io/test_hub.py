import errno
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from bitwright.errors import HubError, InputError, ResourceError
from bitwright.io.hub import resolve_model

SECRET = "hf_SeCrEtToken"


class Response:
    def __init__(self, status_code):
        self.headers = {"authorization": f"Bearer {SECRET}"}
        self.status_code = status_code


def http(kind, status):
    error = kind.__new__(kind)
    error.args = (f"{status} for url with Bearer {SECRET}",)
    error.response = Response(status)
    return error


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def answer(result):
        def snapshot_download(repo_id, **options):
            calls.append((repo_id, options))
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return answer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (http(errors.GatedRepoError, 403), "gated"),
        (http(errors.RepositoryNotFoundError, 401), "login"),
        (http(errors.RepositoryNotFoundError, 404), "not on the hub"),
        (http(errors.RevisionNotFoundError, 404), "no revision 'v9'"),
        (http(errors.HfHubHTTPError, 401), "status 401"),
        (http(errors.HfHubHTTPError, 503), "status 503"),
        (errors.LocalEntryNotFoundError(f"offline {SECRET}"), "cannot be reached"),
        (errors.OfflineModeIsEnabled(SECRET), "cannot be reached"),
        (errors.LocalTokenNotFoundError(SECRET), "no login"),
        (errors.FileMetadataError(SECRET), "download failed"),
        (errors.XetDownloadError(SECRET), "download failed"),
        (errors.HTTPError(SECRET), "download failed"),
        (ConnectionResetError(104, SECRET), "download failed"),
        (RuntimeError(SECRET), "download failed"),
        (TimeoutError(SECRET), "download failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value[:12],
)
def test_what_the_hub_does_not_deliver_is_a_hub_error_without_the_token(hub, error, reason):
    hub(error)
    with pytest.raises(HubError, match=f"org/name: .*{reason}") as caught:
        resolve_model("org/name", revision="v9")
    assert caught.value.exit_code == 6
    assert SECRET not in str(caught.value)
    assert caught.value.mend
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_full_disk_is_a_resource_error(hub):
    hub(OSError(errno.ENOSPC, "No space left", SECRET))
    with pytest.raises(ResourceError, match="No space left") as caught:
        resolve_model("org/name")
    assert SECRET not in str(caught.value)


def test_code_and_pickles_are_never_asked_for(hub, tmp_path):
    calls = hub(str(tmp_path))
    assert resolve_model("org/name", revision="main") == tmp_path
    ((name, options),) = calls
    assert name == "org/name"
    assert options["revision"] == "main"
    names = ["model.safetensors", "config.json", "tokenizer.model", "tokenizer.json", "LICENSE", "merges.txt"]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "tokenizer_x.py", "a/model.safetensors", "README.md", "m.gguf"]
    filtered = huggingface_hub.utils.filter_repo_objects(
        names + unwanted, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(filtered) == names


def test_a_local_folder_is_used_as_it_is(tmp_path, monkeypatch, hub):
    calls = hub(RuntimeError("not to be called"))
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")
    assert resolve_model(tmp_path) == tmp_path
    with pytest.raises(InputError, match="no revisions"):
        resolve_model(str(tmp_path), revision="main")
    Path("file.gguf").touch()
    with pytest.raises(InputError, match="a file"):
        resolve_model("file.gguf")
    assert calls == []


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "./org/name",
        "/none",
        "a/b/c",
        "a/../b",
        "../b",
        "",
        "org/",
        "/name",
        "a\\b",
        "x/\x1b[2J",
        "a--b/c",
        "x" * 9999,
    ],
)
def test_what_is_neither_folder_nor_hub_name_says_so(hub, name):
    calls = hub(RuntimeError("not to be called"))
    with pytest.raises(InputError) as caught:
        resolve_model(name)
    assert "neither" in str(caught.value) or name == "x" * 9999
    assert "\x1b" not in str(caught.value)
    assert calls == []
