"""The verbs: quantize, convert, evaluate, analyze, load. The command line calls these, with the same names and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bitwright.engine.analyze import analyze_folder
from bitwright.engine.convert import Conversion, convert_folder
from bitwright.engine.progress import Progress
from bitwright.engine.recipe import Recipe, load_recipe, make_recipe
from bitwright.engine.run import Result, quantize_folder
from bitwright.errors import InputError
from bitwright.evaluation.divergence import Comparison, Perplexity, compare, perplexity
from bitwright.evaluation.outliers import OutlierReport
from bitwright.evaluation.windows import make_windows
from bitwright.io.hub import resolve_model

if TYPE_CHECKING:
    from bitwright.engine.gguf_dense import DenseResult
    from bitwright.engine.gguf_run import GgufResult
    from bitwright.gguf.imatrix import ImportanceMatrix

__all__ = [
    "Conversion", "Evaluation", "OutlierReport", "analyze", "collect_imatrix", "convert", "evaluate", "from_gguf", "load", "quantize",
    "to_gguf",
]  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """perplexity of the model; comparison with its source where one was given."""

    perplexity: Perplexity
    comparison: Comparison | None
    windows: int
    length: int
    stride: int | None


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    resume: Literal["auto", "require", "never"] = "auto",
    overwrite: bool = False,
    max_memory_bytes: int | None = None,
    allow_pickle: bool = False,
    target: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Quantize a checkpoint folder (or hub name) into the folder ``output``.

    recipe: a Recipe, a YAML file or the name of a preset; ``options`` are fields of Recipe and come on top, for example
    ``method="gptq", bits=4, group_size=128, layout="gptq", calibration={"text": "books.txt"}``. Raises the errors of ``bitwright.errors``.
    """
    made = _recipe(recipe, options)
    if made.layout == "gguf":
        raise InputError("layout gguf writes a file", mend="use bitwright.to_gguf(model, 'NAME.gguf', ...)")
    return quantize_folder(
        made, resolve_model(model), Path(output), resume=resume, overwrite=overwrite, max_memory_bytes=max_memory_bytes,
        allow_pickle=allow_pickle, target=target, progress=progress,
    )  # fmt: skip


def _recipe(recipe: Recipe | str | Path | None, options: Mapping[str, Any]) -> Recipe:
    """A recipe with ``options`` on top."""
    if recipe is None:
        return make_recipe(options)
    if isinstance(recipe, Recipe):
        return make_recipe({**recipe.model_dump(), **options})
    return load_recipe(recipe, options)


def convert(
    model: str | Path,
    output: str | Path,
    *,
    layout: str,
    layout_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    target: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Carry a quantized checkpoint folder (or hub name) into another layout without quantizing it anew; ``dense`` decodes it.

    dtype: that of what is not quantized (default: the model's). lossy: scales may be rounded to the dtype that the layout stores.
    Raises PlanError where the layout cannot hold the same numbers, before anything is written.
    """
    return convert_folder(
        resolve_model(model), Path(output), layout=layout, layout_options=layout_options, dtype=dtype, lossy=lossy,
        overwrite=overwrite, target=target, progress=progress,
    )  # fmt: skip


def to_gguf(
    model: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    resume: Literal["auto", "require", "never"] = "auto",
    overwrite: bool = False,
    max_memory_bytes: int | None = None,
    allow_pickle: bool = False,
    requantize: bool = False,
    lossy: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> GgufResult:
    """Write a checkpoint folder (or hub name, or GGUF file) as the GGUF file ``output``.

    recipe, options: as for ``quantize``; ``gguf={"type": "Q4_K_M", "imatrix": "auto"}`` says which types, ``method="gptq"`` puts error
    feedback on their grids. requantize, lossy: see ``engine.gguf_run.write_gguf_file``.
    """
    from bitwright.engine.gguf_run import write_gguf_file

    made = _recipe(recipe, {"layout": "gguf", **options} if recipe is None else options)
    return write_gguf_file(
        made, resolve_model(model, file=True), Path(output), resume=resume, overwrite=overwrite,
        max_memory_bytes=max_memory_bytes, allow_pickle=allow_pickle, requantize=requantize, lossy=lossy, progress=progress,
    )  # fmt: skip


def from_gguf(
    file: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DenseResult:
    """Write a GGUF file as a checkpoint folder of plain weights; see ``engine.gguf_dense.dense_from_gguf``."""
    from bitwright.engine.gguf_dense import dense_from_gguf

    return dense_from_gguf(
        resolve_model(file, file=True), Path(output), dtype=dtype, overwrite=overwrite, progress=progress
    )


def collect_imatrix(
    model: str | Path,
    output: str | Path | None = None,
    *,
    text: str | Path | None = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """The importance matrix of a checkpoint folder, written to ``output`` where one is named; see ``engine.gguf_imatrix``."""
    from bitwright.engine.gguf_imatrix import collect_imatrix as collect
    from bitwright.gguf.imatrix import write_imatrix

    found = collect(
        resolve_model(model), text=text, samples=samples, length=length, seed=seed, max_memory_bytes=max_memory_bytes,
        progress=progress,
    )  # fmt: skip
    if output is not None:
        write_imatrix(found, Path(output))
    return found


def load(model: str | Path, *, dtype: torch.dtype | None = None, kernel: str = "auto") -> Any:
    """A transformers model whose quantized linears hold packed weights; see ``runtime.load.load_model``. GGUF files are decoded."""
    path = resolve_model(model, file=True)
    if path.is_file():
        from bitwright.runtime.gguf_model import load_gguf

        return load_gguf(path, dtype=dtype)
    from bitwright.runtime.load import load_model

    return load_model(path, dtype=dtype, kernel=kernel)


def evaluate(
    model: str | Path,
    *,
    text: str | Path,
    against: str | Path | None = None,
    length: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    kernel: str = "auto",
) -> Evaluation:
    """Perplexity of a checkpoint on a text file, and its divergence from ``against``, by the same code for both.

    length, stride: see ``evaluation.windows`` (stride None: non-overlapping). windows: at most this many. dtype: dtype of the activations.
    The text is tokenized without special tokens. Raises InputError for a text that is too short or not readable.
    """
    path = resolve_model(model, file=True)
    source_path = resolve_model(against, file=True) if against is not None else None
    file = Path(text)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable UTF-8 text: {error}", mend="check the path of the text") from error
    tokenizer = _tokenizer(source_path or path)
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    cut = make_windows(ids, length=length, stride=stride, limit=windows)
    subject = _logits(load(path, dtype=dtype, kernel=kernel))
    if source_path is None:
        return Evaluation(perplexity(subject, cut), None, len(cut), length, stride)
    comparison = compare(_logits(load(source_path, dtype=dtype)), subject, cut)
    return Evaluation(comparison.model, comparison, len(cut), length, stride)


def analyze(
    model: str | Path,
    *,
    text: str | Path | None = None,
    samples: int = 32,
    length: int = 512,
    threshold: float = 6.0,
    top: int = 5,
    seed: int = 0,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> OutlierReport:
    """Outliers among the inputs of every linear layer, one decoder block at a time; see ``engine.analyze.analyze_folder``."""
    return analyze_folder(
        resolve_model(model), text=text, samples=samples, length=length, threshold=threshold, top=top, seed=seed,
        max_memory_bytes=max_memory_bytes, progress=progress,
    )  # fmt: skip


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, or the one that a GGUF file's header describes."""
    from bitwright.engine.calibration import load_tokenizer

    if not path.is_file():
        return load_tokenizer(path)
    from bitwright.runtime.gguf_model import gguf_folder

    with gguf_folder(path) as folder:
        return load_tokenizer(folder)


def _logits(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
            return found

    return run
