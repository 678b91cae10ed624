"""A task as a file: what its predictions mean, without the slides that it was made from."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from gigamil.errors import CohortError
from gigamil.files import replace_file
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task

FILE_NAME = "task.json"
_KINDS: dict[str, type[Task]] = {
    kind.__name__: kind for kind in (Multiclass, Multilabel, Ordinal, Regression, DiscreteSurvival, Cox)
}


def task_to_json(task: Task) -> str:
    """All that decides what a prediction means; a loss of one's own is left out."""
    facts = {name: value for name, value in asdict(task).items() if name != "loss" or isinstance(value, str)}  # type: ignore[call-overload]
    return json.dumps({"kind": type(task).__name__} | facts, indent=1) + "\n"


def task_from_json(text: str) -> Task:
    """Inverse of `task_to_json`.

    Raises:
        ValueError: it is no task.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("kind") not in _KINDS:
        raise ValueError(f"'kind' must be one of {', '.join(_KINDS)}")
    kind = _KINDS[data.pop("kind")]
    unknown = set(data) - {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
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
