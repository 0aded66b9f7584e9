"""The verbs: quantize, convert, evaluate, analyze, load. The command line calls these, with the same names and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bitwright.engine.analyze import analyze_folder
from bitwright.engine.convert import Conversion, convert_folder
from bitwright.engine.progress import Progress
from bitwright.engine.recipe import Recipe, load_recipe, make_recipe
from bitwright.engine.run import Result, quantize_folder
from bitwright.errors import InputError
from bitwright.evaluating import Convention, Evaluation, Texts, evaluate_path, load_any, own_samples, read_texts
from bitwright.evaluation.outliers import OutlierReport
from bitwright.io.hub import resolve_model

if TYPE_CHECKING:
    from bitwright.advise.allocating import Allocation
    from bitwright.engine.gguf_dense import DenseResult
    from bitwright.engine.gguf_run import GgufResult
    from bitwright.gguf.imatrix import ImportanceMatrix

__all__ = [
    "Conversion",
    "Evaluation",
    "OutlierReport",
    "allocate",
    "analyze",
    "collect_imatrix",
    "convert",
    "evaluate",
    "from_gguf",
    "load",
    "quantize",
    "to_gguf",
]


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
    made, path = _recipe(recipe, options), resolve_model(model)
    if made.layout == "gguf":
        raise InputError("layout gguf writes a file", mend="use bitwright.to_gguf(model, 'NAME.gguf', ...)")
    if made.budget is not None:
        made = allocate(path, recipe=made, target=target, max_memory_bytes=max_memory_bytes, progress=progress).recipe
    return quantize_folder(
        made, path, Path(output), resume=resume, overwrite=overwrite, max_memory_bytes=max_memory_bytes,
        allow_pickle=allow_pickle, target=target, progress=progress,
    )  # fmt: skip


def _recipe(recipe: Recipe | str | Path | None, options: Mapping[str, Any]) -> Recipe:
    """A recipe with ``options`` on top."""
    if recipe is None:
        return make_recipe(options)
    if isinstance(recipe, Recipe):
        return make_recipe({**recipe.model_dump(), **options})
    return load_recipe(recipe, options)


def allocate(
    model: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    target: str | None = None,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Allocation:
    """Choose bits layer by layer under ``recipe.budget``, for example ``budget={"bits_per_weight": 3.5}``, and write nothing.

    The result holds the recipe that ``quantize`` (or ``to_gguf``) carries out, what was measured, and the curve of loss against size.
    """
    from bitwright.advise.allocating import allocate_recipe

    return allocate_recipe(
        _recipe(recipe, options), resolve_model(model, file=True), target=target, max_memory_bytes=max_memory_bytes,
        progress=progress,
    )  # fmt: skip


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
    path = resolve_model(model, file=True)
    if made.budget is not None:
        made = allocate(path, recipe=made, max_memory_bytes=max_memory_bytes, progress=progress).recipe
    return write_gguf_file(
        made, path, Path(output), resume=resume, overwrite=overwrite,
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
    return load_any(resolve_model(model, file=True), dtype=dtype, kernel=kernel)


def evaluate(
    model: str | Path,
    *,
    text: Texts | None = None,
    against: str | Path | None = None,
    length: int = 512,
    stride: int | None = None,
    convention: Convention | None = None,
    windows: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    kernel: str = "auto",
    batch_size: int = 1,
    device: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a checkpoint or GGUF file on texts, and its divergence from ``against``, by the same code for both.

    text: a UTF-8 file, several (``"NAME=FILE"`` names one), a mapping of names to texts (or Paths), or ``"edge-cases"``, the built-in
    set; None: samples of the model ``against``. length, stride, convention: see ``evaluation.windows``; stride alone means sliding.
    windows: at most this many of each text. dtype: of the activations; None: the checkpoint's. batch_size: windows that are run at once.
    cache: keep the predictions of ``against`` for the next evaluation on the same text (``io.cache``). Texts are tokenized without
    special tokens, but for llama.cpp's convention. Raises InputError for a text that is too short or not readable.
    """
    path, source = resolve_model(model, file=True), None if against is None else resolve_model(against, file=True)
    texts: Mapping[str, str | torch.Tensor]
    if text is not None:
        texts = read_texts(text)
    elif source is None:
        raise InputError("there is no text to evaluate on", mend="give a text, or the original to sample one from")
    else:
        texts = {"model samples": own_samples(source, length=length, progress=progress)}
    return evaluate_path(
        path, texts, against=source, length=length, stride=stride, convention=convention, windows=windows, dtype=dtype, kernel=kernel,
        batch_size=batch_size, device=device, cache=cache,
    )  # fmt: skip


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
