"""Accuracy on tasks, with lm-evaluation-harness as the engine and bitwright's loader under it: any layout answers the same questions.

The harness asks for log-likelihoods of given continuations or for generated text; a task's YAML file says how answers become a score
(Gao et al., https://github.com/EleutherAI/lm-evaluation-harness). Scores are the harness's own, so they compare with published ones
where the number of examples in the prompt is the same.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.errors import HubError, InputError, NumericError
from bitwright.evaluation.harness import quiet, wrap_model
from bitwright.evaluation.record import TaskScore
from bitwright.evaluation.task_files import TaskFile, beside, is_task_path, member_names, names_of, read_task_files
from bitwright.io.text import printable

__all__ = ["check_tasks", "run_tasks"]

#: Resamples for the standard error of metrics that have no formula for it.
_BOOTSTRAP = 1000


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 1,
    include: Path | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
) -> tuple[TaskScore, ...]:
    """Scores of a loaded model, one for every task and metric, in the order in which the tasks were named.

    tasks: YAML files, folders of them, or names that the harness (or the folder ``include``) knows. limit: questions of a task that are
    asked, from the first. fewshot: examples before each question (None: what the task says). seed: of the choice of examples and of
    sampling. allow_code_execution: run tasks whose answers are programs, and import the Python files of local tasks.

    Raises InputError for an unknown task, a damaged task file, or code that was not allowed; HubError where a task's data is not here and
    the network does not deliver it; NumericError where a score is not a number.
    """
    _require_harness()
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} questions leaves none", mend="use 1 or more, or no limit")
    if fewshot is not None and fewshot < 0:
        raise InputError(f"{fewshot} examples cannot be shown", mend="use 0 or more")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is below 1", mend="use 1 or more")
    local, names = _local(tasks, include)
    with quiet(seed, allow_code_execution) as scratch:
        registry = _registry(local, names, allow_code_execution, scratch)
        chosen = [_load(registry, name, local) for name in names]
        found = _evaluate(
            wrap_model(model, tokenizer, batch_size), chosen, registry, limit, fewshot, seed, allow_code_execution
        )
    return _scores(found)


def check_tasks(tasks: Sequence[str], *, include: Path | None = None, allow_code_execution: bool = False) -> None:
    """Refuse tasks that ``run_tasks`` would refuse by name or file, before a model is loaded. Their data is not fetched."""
    _require_harness()
    local, names = _local(tasks, include)
    with quiet(0, allow_code_execution) as scratch:
        _registry(local, names, allow_code_execution, scratch)


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError("tasks need lm-evaluation-harness", mend="pip install 'bitwright[tasks]'") from error


# --- which tasks -------------------------------------------------------------------------------------------------------------


def _local(tasks: Sequence[str], include: Path | None) -> tuple[dict[str, TaskFile], list[str]]:
    """Local files by task name, and the names to run, each once. Files beside a group are local too: it may hold them."""
    if not tasks:
        raise InputError("no task was named", mend="name a YAML file, a folder, or a task of lm-evaluation-harness")
    asked = [read_task_files(Path(name)) if is_task_path(name) else name for name in tasks]
    files = [file for item in asked if not isinstance(item, str) for file in item]
    files += [other for file in list(files) if file.is_group for other in beside(file.path.parent)]
    if include is not None:
        files += beside(include)
    names = [name for item in asked for name in ([item] if isinstance(item, str) else [file.name for file in item])]
    return names_of(files), list(dict.fromkeys(names))


@functools.cache
def _harness_index() -> Mapping[str, Any]:
    """All tasks of the installed harness; reading some 15,000 YAML files takes seconds, so that it happens once."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Any] = TaskManager().task_index
    return index


def _registry(local: Mapping[str, TaskFile], names: Sequence[str], allow_code: bool, scratch: Path) -> Any:
    """A task manager that knows what is needed. InputError for unknown names, and for code that was not allowed."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    wanted = _with_members(local, names)
    if any(name not in local for name in wanted):
        manager.task_index.update(copy.copy(_harness_index()))
    for name in wanted:
        if name in local:
            manager.task_index[name] = _entry(local[name], allow_code, scratch)
        elif name not in manager.task_index:
            raise _unknown(name, [*local, *manager.task_index])
    for name in wanted:
        _check_unsafe(manager.task_index, name, allow_code)
    return manager


def _with_members(local: Mapping[str, TaskFile], names: Sequence[str]) -> list[str]:
    found: list[str] = []
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found.append(name)
            waiting += local[name].members if name in local else ()
    return found


def _entry(file: TaskFile, allow_code: bool, scratch: Path) -> Any:
    """What the harness keeps of a task, with the file's code imported where that is allowed."""
    from lm_eval.tasks._index import Entry, Kind

    config = dict(file.config)
    if file.code:
        if not allow_code:
            raise InputError(
                f"{file.path}: this task imports Python code that lies beside it",
                mend="read it, then use --allow-code-execution",
            )
        config = _with_code(file)
    if isinstance(config.get("dataset_kwargs"), dict):
        # Local data is prepared in a folder that goes away, and not in the user's cache.
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "cache_dir": str(scratch)}
    kind = Kind.GROUP if file.is_group else Kind.PY_TASK if "class" in config else Kind.TASK
    return Entry(name=file.name, kind=kind, yaml_path=None, cfg=config)


def _with_code(file: TaskFile) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        loaded = load_yaml(file.path, resolve_func=True)
    except Exception as error:  # whatever a stranger's Python file raises when it is imported
        raise InputError(
            f"{file.path}: its Python code cannot be imported ({type(error).__name__}: {printable(str(error))})",
            mend="mend that file",
        ) from error
    kept = {key: value for key, value in file.config.items() if key in ("dataset_path", "dataset_kwargs")}
    return {**loaded, **kept}


def _check_unsafe(index: Mapping[str, Any], name: str, allow_code: bool) -> None:
    """InputError where a task, or one of a group's or tag's, runs programs that the model writes."""
    entry = index.get(name)
    if entry is None or allow_code:
        return
    config = entry.cfg or {}
    if config.get("unsafe_code"):
        raise InputError(
            f"task {name} runs programs that the model writes, on this machine",
            mend="do so in a container without a network, with --allow-code-execution",
        )
    # A tag has no config; what else has tags merely bears them.
    for below in [*(sorted(entry.tags) if entry.cfg is None else ()), *member_names(config.get("task"))]:
        if below != name:
            _check_unsafe(index, below, allow_code)


def _unknown(name: str, known: Sequence[str]) -> InputError:
    near = (
        difflib.get_close_matches(name, known, n=5, cutoff=0.6)
        or [other for other in sorted(known) if name.lower() in other.lower()][:5]
    )
    listed = f"; near names: {', '.join(near)}" if near else ""
    return InputError(
        f"task {printable(name)} is unknown{listed}", mend="name a task of lm-evaluation-harness, or a YAML file"
    )


def _load(manager: Any, name: str, local: Mapping[str, TaskFile]) -> list[Any]:
    """The harness's task or group, or all tasks of a tag, with their data."""
    from datasets import exceptions as dataset_errors
    from huggingface_hub import errors as hub_errors
    from jinja2 import TemplateError
    from requests import RequestException

    network = (
        *(ConnectionError, dataset_errors.DatasetNotFoundError, RequestException),
        *(
            hub_errors.OfflineModeIsEnabled,
            hub_errors.LocalEntryNotFoundError,
            hub_errors.HfHubHTTPError,
            hub_errors.HTTPError,
        ),
    )
    try:
        found = manager.load([name])
    except network as error:
        raise _no_data(name, error) from None
    except FileNotFoundError as error:
        # How `evaluate` says that it could not fetch a metric.
        if name in local:
            raise InputError(f"{local[name].path}: {printable(str(error))}", mend="check the file's paths") from error
        raise _no_data(name, error) from None
    except ImportError as error:
        raise InputError(
            f"task {name} needs a package that is missing ({error.name or error})", mend="install it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
        if name not in local:
            raise
        # The harness says nothing better: an unknown metric, for example, ends in KeyError(None).
        reason = f"{type(error).__name__}: {printable(str(error))}"
        mend = "check its metrics, output_type and templates: see docs/tasks.md"
        raise InputError(f"{local[name].path}: not a task that can be run ({reason})", mend=mend) from error
    groups = found["groups"]
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _no_data(name: str, error: Exception) -> HubError:
    return HubError(
        f"task {name}: its data is not on this machine and cannot be downloaded ({type(error).__name__})",
        mend="check the network (and HF_HUB_OFFLINE), or use a task file with local data: see docs/tasks.md",
    )


# --- the scores ----------------------------------------------------------------------------------------------------------------


def _evaluate(
    lm: Any,
    chosen: Sequence[Sequence[Any]],
    manager: Any,
    limit: int | None,
    fewshot: int | None,
    seed: int,
    allow_code: bool,
) -> Mapping[str, Any]:
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate

    try:
        found: Mapping[str, Any] = simple_evaluate(
            lm, tasks=[task for tasks in chosen for task in tasks], task_manager=manager, num_fewshot=fewshot, limit=limit,
            bootstrap_iters=_BOOTSTRAP, log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, confirm_run_unsafe_code=allow_code,
        )  # fmt: skip
    except TemplateError as error:
        raise InputError(
            f"a task's template does not fit its data: {printable(str(error))}", mend="check doc_to_text"
        ) from error
    except AssertionError as error:
        if not str(error):
            raise
        # The harness's way to say that a prompt, or what is to be generated, is longer than the model allows.
        raise InputError(
            f"a task cannot be run on this model: {printable(str(error))}", mend="use another task"
        ) from error
    return found


def _scores(found: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """The harness's results as records. Its keys are ``metric,filter``; the filter ``none`` is not named."""
    scores: list[TaskScore] = []
    for task, values in found["results"].items():
        directions = found["higher_is_better"].get(task, {})
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            number = float(value)
            if not math.isfinite(number):
                raise NumericError(
                    f"task {task}: {metric} is {number}", mend="check the model: its logits may not be finite"
                )
            error = values.get(f"{metric}_stderr,{kind}")
            better = directions.get(metric)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else key,
                    value=number,
                    error=float(error) if isinstance(error, int | float | np.number) and math.isfinite(error) else None,
                    samples=_samples(found, task),
                    higher_is_better=True if better is None else bool(better),
                )
            )
    return tuple(scores)


def _samples(found: Mapping[str, Any], task: str) -> int:
    counts, below = found["n-samples"], found["group_subtasks"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_samples(found, name) for name in below.get(task, ()))
