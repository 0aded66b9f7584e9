"""The verbs: quantize, convert, evaluate, analyze, load. The command line calls these, with the same names and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

__all__ = ["Conversion", "Evaluation", "OutlierReport", "analyze", "convert", "evaluate", "load", "quantize"]


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
    if recipe is None:
        made = make_recipe(options)
    elif isinstance(recipe, Recipe):
        made = make_recipe({**recipe.model_dump(), **options})
    else:
        made = load_recipe(recipe, options)
    return quantize_folder(
        made, resolve_model(model), Path(output), resume=resume, overwrite=overwrite, max_memory_bytes=max_memory_bytes,
        allow_pickle=allow_pickle, target=target, progress=progress,
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


def load(model: str | Path, *, dtype: torch.dtype | None = None, kernel: str = "auto") -> Any:
    """A transformers model whose quantized linears hold packed weights; see ``runtime.load.load_model``."""
    from bitwright.runtime.load import load_model

    return load_model(resolve_model(model), dtype=dtype, kernel=kernel)


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
    from bitwright.engine.calibration import load_tokenizer

    path = resolve_model(model)
    source_path = resolve_model(against) if against is not None else None
    file = Path(text)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable UTF-8 text: {error}", mend="check the path of the text") from error
    tokenizer = load_tokenizer(path)
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


def _logits(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
            return found

    return run
