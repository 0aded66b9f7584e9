"""Task files of lm-evaluation-harness that somebody else wrote: found, read, and asked whether they bring Python code of their own.

A task is a YAML file (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/new_task_guide.md). Data files that it names are
taken relative to it. The tag ``!function`` imports a Python file that lies beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitwright.errors import InputError
from bitwright.io.strict import MAX_YAML_BYTES
from bitwright.io.text import printable

__all__ = ["TaskFile", "beside", "is_task_path", "member_names", "names_of", "read_task_files"]


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """One YAML file. name: of the task or group; code: it (or a file it includes) imports Python that lies beside it.

    config: as the harness wants it, with absolute data files; code is named by its path and not imported yet.
    """

    path: Path
    name: str
    code: bool
    config: Mapping[str, Any] = field(repr=False)

    @property
    def is_group(self) -> bool:
        """A group of tasks rather than a task."""
        return "group" in self.config

    @property
    def members(self) -> tuple[str, ...]:
        """Names of what a group holds, without what it describes itself; empty for a task."""
        listed = self.config.get("task") if self.is_group else None
        return tuple(member_names(listed))


def member_names(listed: Any) -> list[str]:
    """Names in the list ``task`` of a group: plain, or with changes. What is written out on the spot has data of its own, and no name.

    >>> member_names(["a", {"task": "b", "num_fewshot": 3}, {"task": "c", "dataset_path": "json"}])
    ['a', 'b']
    """
    items = listed if isinstance(listed, list) else []
    found = [
        item.get("task", item.get("group")) if isinstance(item, dict) and "dataset_path" not in item else item
        for item in items
    ]
    return [name for name in found if isinstance(name, str)]


def is_task_path(name: str) -> bool:
    """Whether this names a file or a folder rather than a task of the harness.

    >>> is_task_path("examples/tasks/word_order.yaml"), is_task_path("arc_easy")
    (True, False)
    """
    return name.endswith((".yaml", ".yml")) or "/" in name or Path(name).is_dir()


def read_task_files(path: Path) -> list[TaskFile]:
    """The task of a YAML file, or all tasks of a folder without the groups. InputError where there are none, or one is damaged."""
    if path.is_file():
        return [_read_one(path)]
    if not path.is_dir():
        raise InputError(f"{path}: there is no such task file or folder", mend="check the path of --tasks")
    found = [task for task in beside(path) if not task.is_group]
    if not found:
        raise InputError(f"{path}: no YAML file in this folder describes a task", mend="name the folder of the tasks")
    return found


def beside(folder: Path) -> list[TaskFile]:
    """All tasks and groups of a folder. Files that describe neither, such as shared templates, are left out."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    return [task for file in files if (task := _read(file)) is not None]


def _read_one(path: Path) -> TaskFile:
    found = _read(path)
    if found is None:
        raise InputError(f"{path}: names neither a task nor a group", mend="add a line: task: NAME")
    return found


def _read(path: Path) -> TaskFile | None:
    seen: list[Path] = []
    tagged: list[str] = []
    config = _merged(path.absolute(), seen, tagged)
    name = config.get("group", config.get("task"))
    if not isinstance(name, str):
        return None
    return TaskFile(
        path=path.absolute(), name=name, code=bool(tagged), config=_absolute(config, path.absolute().parent)
    )


def _merged(path: Path, seen: list[Path], tagged: list[str]) -> dict[str, Any]:
    """The file on top of those it includes, the way the harness merges them."""
    if path in seen:
        raise InputError(f"{path}: includes itself", mend="remove the line: include")
    seen.append(path)
    config = _parse(path, tagged)
    included = config.pop("include", None)
    merged: dict[str, Any] = {}
    for item in included if isinstance(included, list) else [included] if included is not None else []:
        if not isinstance(item, str):
            raise InputError(f"{path}: include {printable(str(item))} is no file name", mend="name a YAML file")
        below = _merged((path.parent / item).absolute(), seen, tagged)
        below.pop("task_list", None)
        merged.update(below)
    return merged | config


def _parse(path: Path, tagged: list[str]) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        """SafeLoader that notes where code would be imported, and imports none."""

    def function(_: yaml.SafeLoader, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "!function names a function", node.start_mark)
        tagged.append(node.value)
        # The very form that the harness itself gives functions it has not imported.
        return str(path.parent / node.value)

    Loader.add_constructor("!function", function)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise InputError(f"{path}: more than {MAX_YAML_BYTES} bytes of YAML", mend="check the file")
        found = yaml.load(data.decode("utf-8"), Loader=Loader)  # a subclass of SafeLoader
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", mend="check the path") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        reason = printable(" ".join(str(error).split())[:300])
        raise InputError(f"{path}: not valid YAML ({reason})", mend="mend the line that is named") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a task: a mapping of keys is expected", mend="see docs/tasks.md")
    return found


def _absolute(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with data files and folders that lie beside the YAML file named in full; the harness looks in the current directory."""
    changed = dict(config)
    dataset = config.get("dataset_path")
    if isinstance(dataset, str) and (folder / dataset).is_dir():
        changed["dataset_path"] = str(folder / dataset)
    options = config.get("dataset_kwargs")
    if isinstance(options, dict):
        found = {
            key: _file(value, folder) if key in ("data_files", "data_dir") else value for key, value in options.items()
        }
        changed["dataset_kwargs"] = found
    return changed


def _file(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _file(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_file(item, folder) for item in value]
    if not isinstance(value, str) or "://" in value:
        return value
    file = folder / value
    if not any(sign in value for sign in "*?[") and not file.exists():
        raise InputError(f"{file}: the task names this file, but it does not exist", mend="check data_files")
    return str(file)


def names_of(files: Sequence[TaskFile]) -> dict[str, TaskFile]:
    """Files by the name of their task. InputError where two have one name."""
    found: dict[str, TaskFile] = {}
    for file in files:
        other = found.get(file.name)
        if other is not None and other.path != file.path:
            raise InputError(
                f"{file.path} and {other.path} both describe the task {printable(file.name)}", mend="rename one of them"
            )
        found[file.name] = file
    return found
