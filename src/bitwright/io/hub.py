"""A model by name: a local folder as it is, or a snapshot from the model hub."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from bitwright.errors import BitwrightError, HubError, InputError
from bitwright.io.files import os_error
from bitwright.io.text import quoted

__all__ = ["resolve_model"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_ALLOW = [
    *("*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.*"),
    *("chat_template*", "LICENSE*", "NOTICE*"),
]
#: pickles and code; weights of other programs; subfolders, which hold copies of the weights in other layouts
_IGNORE = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "*.sh"),
    *("*.h5", "*.msgpack", "*.onnx", "*.gguf", "consolidated*", "*/*"),
]


def resolve_model(name_or_path: str | Path, revision: str | None = None, *, file: bool = False) -> Path:
    """The folder of a model: an existing local one as it is, else the hub's ``org/name`` downloaded to its cache.

    file: a local GGUF file is taken as well. revision: branch, tag or commit on the hub. Only safetensors weights, settings, tokenizer
    and licence are fetched.
    Raises InputError for what is neither, HubError where the hub does not deliver, ResourceError if the disk is full.
    """
    text = str(name_or_path)
    path = Path(name_or_path)
    if text.startswith("~/"):
        path = path.expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise os_error(error, quoted(text)) from error
    if is_folder and text:
        if revision is not None:
            raise InputError(f"{quoted(text)}: a local folder has no revisions", mend="leave the revision out")
        return path
    if file and text and path.is_file():
        return path
    if exists and text:
        raise InputError(f"{quoted(text)}: a file, not a model folder", mend="name the folder that holds it")
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(text) or ".." in text or "--" in text:
        raise InputError(
            f"{quoted(text)}: neither an existing folder nor a hub name of the form org/name", mend="check the spelling"
        )
    return _download(text, revision)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(_ALLOW), ignore_patterns=list(_IGNORE)
            )
        )
    # "from None" throughout: messages and tracebacks of the client may carry the request with its token.
    except errors.GatedRepoError:
        failure: BitwrightError = HubError(
            f"{name}: access to this model is gated", mend="accept its terms on the hub, then run: hf auth login"
        )
    except errors.RevisionNotFoundError:
        failure = HubError(f"{name}: no revision {quoted(str(revision))}", mend="check the revision")
    except errors.RepositoryNotFoundError as error:
        failure = (
            HubError(f"{name}: the hub refused the login (401)", mend="check the name, or run: hf auth login")
            if _status(error) == 401
            else HubError(f"{name}: not on the hub, or private", mend="check the name, or run: hf auth login")
        )
    except errors.HFValidationError:
        failure = InputError(f"{quoted(name)}: not a valid hub name", mend="use the form org/name")
    except errors.HfHubHTTPError as error:
        status = _status(error)
        failure = HubError(
            f"{name}: the hub answered with status {status or 'unknown'}",
            mend="run: hf auth login" if status in {401, 403} else "try again later",
        )
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        failure = HubError(
            f"{name}: the hub cannot be reached, and the model is not whole in the local cache",
            mend="check the network (and HF_HUB_OFFLINE), or name a local folder",
        )
    except errors.LocalTokenNotFoundError:
        failure = HubError(f"{name}: no login for the hub", mend="run: hf auth login")
    except OSError as error:
        if isinstance(error, errors.HTTPError) or error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            failure = _cut(name, error)
        else:
            failure = os_error(OSError(error.errno, ""), f"{name}: the hub's local cache")
    except (errors.HTTPError, errors.XetDownloadError, errors.RevisionResolutionError) as error:
        failure = _cut(name, error)
    except (RuntimeError, ValueError) as error:  # the transfer library reports cut downloads as RuntimeError
        failure = _cut(name, error)
    raise failure from None


def _cut(name: str, error: Exception) -> HubError:
    return HubError(
        f"{name}: the download failed ({type(error).__name__})", mend="run it again: finished files are kept"
    )


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None
