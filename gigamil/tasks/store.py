"""A task as a file: what its predictions mean, without the slides that it was made from."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gigamil.errors import CohortError
from gigamil.files import replace_file
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task

FILE_NAME = "task.json"
_KINDS: dict[str, type[Task]] = {
    kind.__name__: kind for kind in (Multiclass, Multilabel, Ordinal, Regression, DiscreteSurvival, Cox, Several)
}


def task_to_json(task: Task) -> str:
    """All that decides what a prediction means; a loss of one's own is left out."""
    return json.dumps(_facts(task), indent=1) + "\n"


def _facts(task: Task) -> dict[str, Any]:
    if isinstance(task, Several):
        parts = [_facts(part) for part in task.tasks]
        return {"kind": "Several", "names": task.names, "tasks": parts, "shares": task.shares}
    facts = asdict(task)  # type: ignore[call-overload]
    return {"kind": type(task).__name__} | {k: v for k, v in facts.items() if k != "loss" or isinstance(v, str)}


def task_from_json(text: str) -> Task:
    """Inverse of `task_to_json`.

    Raises:
        ValueError: it is no task.
    """
    return _made(json.loads(text))


def _made(data: Any) -> Task:
    if not isinstance(data, dict) or data.get("kind") not in _KINDS:
        raise ValueError(f"'kind' must be one of {', '.join(_KINDS)}")
    kind = _KINDS[data["kind"]]
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name != "kind"
    }
    unknown = set(values) - {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    if kind is Several:
        values["tasks"] = tuple(map(_made, values.get("tasks", ())))
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def save_task(task: Task, folder: Path) -> None:
    """Write `<folder>/task.json`."""
    replace_file(folder / FILE_NAME, task_to_json(task))


def load_task(folder: Path) -> Task | None:
    """Read `<folder>/task.json`; None without one.

    Raises:
        CohortError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return task_from_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CohortError(f"'{path}' is no task: {error}. Run `gigamil evaluate` again.") from error
