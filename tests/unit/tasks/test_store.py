"""A task comes back from its file as it was."""

from pathlib import Path

import pytest
import torch

from gigamil.errors import CohortError
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.store import FILE_NAME, load_task, save_task, task_from_json, task_to_json
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task

TASKS = [
    Multiclass(("a", "b"), (1.0, 2.0), 0.1, 2.0),
    Multilabel(("x", "y"), None, 1.0),
    Ordinal(("0", "1", "2")),
    Regression(("age",), (60.0,), (10.0,), "mae"),
    DiscreteSurvival((1.0, 2.5)),
    Cox(),
    Several(("label", "age"), (Multiclass(("a", "b")), Regression(("age",), (60.0,), (10.0,))), (1.0, 0.5)),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_task_comes_back(task: Task, tmp_path: Path) -> None:
    save_task(task, tmp_path)
    assert load_task(tmp_path) == task


def test_a_loss_of_ones_own_is_not_needed_to_read_predictions() -> None:
    own = Multiclass(("a", "b"), loss=lambda output_SK, class_S: output_SK[:, 0] * class_S)
    assert task_from_json(task_to_json(own)) == Multiclass(("a", "b"))
    output_SK = torch.ones(2, 2)
    assert torch.equal(task_from_json(task_to_json(own)).predict(output_SK), own.predict(output_SK))


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "Guess"}', '{"kind": "Cox", "x": 1}', '{"kind": "Multiclass"}'])
def test_what_is_no_task_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(CohortError, match=r"task.json' is no task"):
        load_task(tmp_path)


def test_no_file_is_no_task(tmp_path: Path) -> None:
    assert load_task(tmp_path) is None
