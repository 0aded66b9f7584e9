"""Quality of a checkpoint on texts: one model in memory at a time, the source's predictions kept on disk between runs."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from bitwright.engine.progress import Progress, Silent
from bitwright.errors import InputError
from bitwright.evaluation.quality import measure, run_windows, summarize
from bitwright.evaluation.record import Perplexity, Quality
from bitwright.evaluation.reference import StoredReference, reference_key, store_reference
from bitwright.evaluation.windows import Window, make_windows, second_halves
from bitwright.io.cache import cached_folder
from bitwright.io.gguf_file import GgufFile
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.text import printable

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Evaluation",
    "Texts",
    "device_of",
    "evaluate_path",
    "first_windows",
    "load_any",
    "load_any_tokenizer",
    "own_samples",
    "read_texts",
]

Convention = Literal["non-overlapping", "sliding", "llama.cpp"]
CONVENTIONS: tuple[Convention, ...] = ("non-overlapping", "sliding", "llama.cpp")
#: Texts by name, or files (``NAME=FILE`` names them), or ``edge-cases`` for the built-in set.
Texts = str | Path | Sequence[str | Path] | Mapping[str, str | Path]

_EDGE_CASES = "edge-cases"
#: How many sequences are sampled from a source where there is no text.
_SAMPLES = 32
#: Calibration text is sampled with seed 0 unless told otherwise; nothing should be measured on what it was fitted to.
_SAMPLE_SEED = 1


@dataclass(frozen=True)
class Evaluation:
    """quality: over all texts together; domains: by text, where there were several; texts: name -> tokens that it has."""

    quality: Quality
    windows: int
    length: int
    stride: int | None
    convention: Convention
    dtype: str
    texts: Mapping[str, int]
    domains: Mapping[str, Quality] = field(default_factory=dict)

    @property
    def perplexity(self) -> Perplexity:
        """The model's own, over all texts."""
        return self.quality.model


def read_texts(texts: Texts) -> dict[str, str]:
    """Contents by name. InputError for files that cannot be read, and for two texts of one name."""
    if isinstance(texts, Mapping):
        return {name: _content(Path(value)) if isinstance(value, Path) else value for name, value in texts.items()}
    found: dict[str, str] = {}
    for item in [texts] if isinstance(texts, str | Path) else texts:
        for name, content in _named(item).items():
            if name in found:
                raise InputError(f"two texts are called {printable(name)}", mend="name them: NAME=FILE")
            found[name] = content
    if not found:
        raise InputError("there is no text to evaluate on", mend="give a text file")
    return found


def _named(item: str | Path) -> dict[str, str]:
    if item == _EDGE_CASES:
        from bitwright.evaluation.edge_cases import edge_case_texts

        return dict(edge_case_texts())
    name, equals, path = str(item).partition("=")
    if equals and not Path(item).exists() and name and "/" not in name:
        return {name: _content(Path(path))}
    return {Path(item).stem: _content(Path(item))}


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable UTF-8 text: {error}", mend="check the path of the text") from error


def own_samples(
    source: Path, *, count: int = _SAMPLES, length: int = 512, progress: Progress | None = None
) -> torch.Tensor:
    """``(count, length)`` tokens drawn from the model itself, kept for the next time. InputError for what is no plain checkpoint folder."""
    from bitwright.engine.recipe import make_recipe
    from bitwright.engine.run import open_source, vocab_size
    from bitwright.engine.sample import sample_tokens

    if source.is_file():
        raise InputError(f"{source}: text is sampled from checkpoint folders only", mend="give a text file with --text")
    recipe = make_recipe({"method": "rtn", "calibration": {"samples": count, "length": length}, "seed": _SAMPLE_SEED})
    with open_source(source) as opened:
        facts = {**opened.fingerprint(), "torch": version("torch"), "transformers": version("transformers")}
        key = reference_key([], facts | {"count": str(count), "length": str(length), "seed": str(_SAMPLE_SEED)})

        def build(folder: Path) -> None:
            sample_tokens(recipe, opened, folder, vocab_size(opened), progress or Silent())

        folder = cached_folder("samples", key, build)
        tokens = sample_tokens(recipe, opened, folder, vocab_size(opened), progress or Silent())
    return torch.cat(tokens.batches)


def load_any(path: Path, *, dtype: torch.dtype | None = None, kernel: str = "auto") -> Any:
    """A transformers model from a checkpoint folder of any layout, or from a GGUF file, decoded."""
    if path.is_file():
        from bitwright.runtime.gguf_model import load_gguf

        return load_gguf(path, dtype=dtype)
    from bitwright.runtime.load import load_model

    return load_model(path, dtype=dtype, kernel=kernel)


def load_any_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, or the one that a GGUF file's header describes."""
    from bitwright.engine.calibration import load_tokenizer

    if not path.is_file():
        return load_tokenizer(path)
    from bitwright.runtime.gguf_model import gguf_folder

    with gguf_folder(path) as folder:
        return load_tokenizer(folder)


def evaluate_path(
    path: Path,
    texts: Mapping[str, str | torch.Tensor],
    *,
    against: Path | None = None,
    length: int = 512,
    stride: int | None = None,
    convention: Convention | None = None,
    windows: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    kernel: str = "auto",
    batch_size: int = 1,
    device: str = "auto",
    cache: bool = True,
) -> Evaluation:
    """See ``bitwright.evaluate``, which this does once names are resolved and texts are read.

    texts: contents by name, or ``(windows, tokens)`` ids that are windows already.
    """
    convention = _convention(convention, stride)
    place = device_of(device)
    tokenizer = load_any_tokenizer(against or path)
    cut, tokens = {}, {}
    for name, content in texts.items():
        try:
            cut[name], tokens[name] = _windows(tokenizer, content, convention, length, stride, windows)
        except InputError as error:
            raise InputError(f"text {printable(name)}: {error.message}", mend=error.mend) from error
    every = [window for part in cut.values() for window in part]
    with ExitStack() as stack:
        reference = None
        if against is not None:
            source = against

            def build(folder: Path) -> None:
                with _running(source, dtype, "auto", place, every) as model:
                    store_reference(folder, run_windows(model, every, batch_size=batch_size))

            if cache:
                key = reference_key(every, _facts(against, dtype, place))
                reference = StoredReference(cached_folder("references", key, build))
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitwright-reference-")))
                build(folder)
                reference = StoredReference(folder)
        with _running(path, dtype, kernel, place, every) as model:
            values = measure(model, every, reference, batch_size=batch_size)
    by_text, start = {}, 0
    for name, part in cut.items():
        by_text[name] = summarize(values[start : start + len(part)])
        start += len(part)
    return Evaluation(
        quality=summarize(values),
        windows=len(every),
        length=length,
        stride=stride if convention == "sliding" else None,
        convention=convention,
        dtype="checkpoint" if dtype is None else str(dtype).removeprefix("torch."),
        texts=tokens,
        domains=by_text if len(by_text) > 1 else {},
    )


def first_windows(path: Path, texts: Mapping[str, str | torch.Tensor], *, length: int, count: int) -> torch.Tensor:
    """``(count or fewer, length)`` tokens of the texts in turn, as the tokenizer of ``path`` cuts them."""
    tokenizer = load_any_tokenizer(path)
    share = -(-count // len(texts))
    rows: list[torch.Tensor] = []
    for content in texts.values():
        found, _ = _windows(tokenizer, content, "non-overlapping", length, None, share)
        rows += [window.tokens for window in found if window.tokens.shape[1] == length]
    if not rows:
        raise InputError(f"no text has {length} tokens", mend="give a longer text, or use a smaller --length")
    return torch.cat(rows[:count])


def _convention(convention: Convention | None, stride: int | None) -> Convention:
    if convention is None:
        return "non-overlapping" if stride is None else "sliding"
    if convention not in CONVENTIONS:
        raise InputError(f"convention '{convention}' is unknown", mend=f"use one of {', '.join(CONVENTIONS)}")
    if (stride is not None) != (convention == "sliding"):
        mend = "give --stride" if stride is None else "drop --stride, or use --convention sliding"
        raise InputError(f"convention {convention} and stride {stride} do not go together", mend=mend)
    return convention


def device_of(name: str) -> torch.device:
    """The device that a flag names: auto, cpu or cuda. InputError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device '{name}' is unknown", mend="use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("there is no CUDA device, or this torch is built without CUDA", mend="use --device cpu")
    return torch.device(name)


def _windows(
    tokenizer: Any,
    content: str | torch.Tensor,
    convention: Convention,
    length: int,
    stride: int | None,
    limit: int | None,
) -> tuple[list[Window], int]:
    """Windows of one text, and how many tokens it has. No special tokens but llama.cpp's first one."""
    if isinstance(content, torch.Tensor):
        return [Window(row[None]) for row in content[:limit]], content.numel()
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    if convention != "llama.cpp":
        return make_windows(ids, length=length, stride=stride, limit=limit), len(ids)
    wanted = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    first = tokenizer.bos_token_id if wanted and wanted[0] == tokenizer.bos_token_id else None
    if first is not None:
        ids = [first, *ids]
    return second_halves(ids, length=length, first_token=first, limit=limit), len(ids)


def _facts(path: Path, dtype: torch.dtype | None, place: torch.device) -> dict[str, str]:
    """What the source's predictions depend on beside the windows."""
    opened = GgufFile.open(path) if path.is_file() else SafetensorsDir.open(path)
    with opened as source:
        files = source.fingerprint()
    facts = {f"file {name}": value for name, value in files.items()}
    for name in files:
        # The fingerprint samples large files; a weight that changed in the middle of one shows in its time.
        file = path if path.is_file() else path / name
        if file.is_file():
            facts[f"time of {name}"] = str(file.stat().st_mtime_ns)
    facts |= {f"version of {name}": version(name) for name in ("bitwright", "torch", "transformers")}
    return facts | {"dtype": str(dtype), "device": place.type}


@contextmanager
def _running(
    path: Path, dtype: torch.dtype | None, kernel: str, place: torch.device, windows: Sequence[Window]
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A checkpoint as ``tokens -> logits`` for these windows; its memory is given back at the end."""
    held = [load_any(path, dtype=dtype, kernel=kernel).to(place)]
    _check_windows(held[0].config.get_text_config(), windows, path)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = held[0](input_ids=tokens.to(place), use_cache=False).logits
            return found

    try:
        yield run
    finally:
        held.clear()
        gc.collect()


def _check_windows(config: Any, windows: Sequence[Window], path: Path) -> None:
    """InputError for windows that the model has no positions for, or tokens that it has no embedding of."""
    longest = max(window.tokens.shape[1] for window in windows)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise InputError(
            f"{path}: windows of {longest} tokens, but the model was made for {positions}",
            mend=f"use --length {positions}",
        )
    largest = max(int(window.tokens.max()) for window in windows)
    if largest >= config.vocab_size:
        raise InputError(
            f"{path}: the text has token {largest}, the model's vocabulary {config.vocab_size} entries",
            mend="use the tokenizer that belongs to this model",
        )
