"""Targets come from the columns that the task names; what cannot be used is named, slide by slide, all at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gigamil.config.schema import Cohort, Science, Task
from gigamil.data.targets import column_classes, load_target_table, read_targets
from gigamil.errors import CohortError, ConfigError

ROWS = [  # label, age, time, event, x, y
    ("a", "61", "12.5", "1", "1", "0"),
    ("b", "", "3", "0", "", "1"),
    ("c", "48.5", "7", "1", "0", ""),
    ("a", "70", "1e1", "0", "1", "1"),
]


def cohort(folder: Path, rows: list[tuple[str, ...]] = ROWS, **keys: Any) -> Cohort:
    lines = ["slide_id,path,patient_id,label,age,time,event,x,y"]
    lines += [f"s{i},s{i}.svs,p{i},{','.join(row)}" for i, row in enumerate(rows)]
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    return Cohort(table=folder / "slides.csv", **keys)


def targets(folder: Path, task: Task, **keys: Any) -> list[list[float]]:
    science = Science(task=task)
    table = load_target_table(cohort(folder, **keys), science)
    found: list[list[float]] = read_targets(science, table, [f"s{i}" for i in range(4)]).tolist()
    return found


def test_classes_are_numbers_of_the_label(tmp_path: Path) -> None:
    assert targets(tmp_path, Task()) == [[0], [1], [2], [0]]
    assert targets(tmp_path, Task(name="ordinal"), classes=("c", "b", "a")) == [[2], [1], [0], [2]]


def test_another_column_may_hold_the_classes(tmp_path: Path) -> None:
    task = Task(name="binary", columns=("event",))
    assert targets(tmp_path, task) == [[1], [0], [1], [0]]
    assert load_target_table(cohort(tmp_path), Science(task=task)).classes == ("0", "1")


def test_survival_has_time_and_event_and_is_stratified_by_the_event(tmp_path: Path) -> None:
    task = Task(name="survival")
    assert targets(tmp_path, task) == [[12.5, 1], [3, 0], [7, 1], [10, 0]]
    table = load_target_table(cohort(tmp_path), Science(task=task))
    assert table.classes == ("censored", "event")
    assert [row.label for row in table.rows] == ["event", "censored", "event", "censored"]


def test_empty_cells_are_not_known(tmp_path: Path) -> None:
    found = torch.tensor(targets(tmp_path, Task(name="multilabel", columns=("x", "y"))))
    assert torch.isnan(found).tolist() == [[False, False], [True, False], [False, True], [False, False]]
    assert load_target_table(cohort(tmp_path), Science(task=Task(name="multilabel", columns=("x", "y")))).classes == (
        "all",
    )


def test_numbers_are_stratified_by_their_median(tmp_path: Path) -> None:
    rows = [*ROWS[:1], ("b", "30", "3", "0", "", "1"), *ROWS[2:]]
    table = load_target_table(cohort(tmp_path, rows), Science(task=Task(name="regression", columns=("age",))))
    assert [row.label for row in table.rows] == ["high", "low", "low", "high"]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (Task(name="survival"), {5: "-3"}, r"'s1': time -3 must be a number above 0"),
        (Task(name="survival"), {5: ""}, r"'s1': time is empty; survival needs both"),
        (Task(name="survival"), {5: "soon"}, r"'s1': time 'soon' is no number; leave the cell empty"),
        (Task(name="survival"), {6: "2"}, r"'s1': event 2 must be 1 \(it came\) or 0 \(censored\)"),
        (Task(name="multilabel", columns=("x", "y")), {8: "0.5"}, r"'s1': y must be 1 .*, 0 .* or empty"),
        (Task(name="multilabel", columns=("x", "y")), {8: ""}, r"'s1' has no target: x, y are empty"),
        (Task(name="regression", columns=("age",)), {}, r"'s1' has no target: age are empty"),
        (Task(name="regression", columns=("age",)), {4: "inf"}, r"'s1': age must be finite"),
        (Task(name="regression", columns=("age",)), {4: "nan"}, r"'s1': age 'nan' is no number"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, task: Task, changes: dict[int, str], message: str) -> None:
    row = list(ROWS[1])
    for column, text in changes.items():
        row[column - 3] = text
    with pytest.raises(CohortError, match=rf"has 1 targets that cannot be used:\n  slide {message}"):
        load_target_table(cohort(tmp_path, [ROWS[0], tuple(row), *ROWS[2:]]), Science(task=task))


def test_all_censored_is_refused(tmp_path: Path) -> None:
    rows = [(*row[:3], "0", *row[4:]) for row in ROWS]
    with pytest.raises(CohortError, match="all slides are censored \\(column 'event' has no 1\\)"):
        load_target_table(cohort(tmp_path, rows), Science(task=Task(name="survival")))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(name="binary"), "science.task.name=binary, and '.*' has the classes a, b, c. Set it to multiclass"),
        (Task(name="regression"), "science.task.name=regression needs science.task.columns"),
        (
            Task(name="regression", columns=("height",)),
            "no column 'height' for the regression task. Set science.task.columns .* to some of: .*age",
        ),
        (Task(name="survival", columns=("time",)), r"science.task.columns \['time'\]: survival has two"),
        (Task(name="multilabel", columns=("x", "x")), r"\['x', 'x'\] must be names of columns, each once"),
        (Task(name="ordinal", columns=("x", "y")), r"columns \['x', 'y'\] of the ordinal task: it has one"),
    ],
)
def test_columns_have_to_be_the_tasks(tmp_path: Path, task: Task, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_target_table(cohort(tmp_path), Science(task=task))


class TestFurtherTasks:
    science = Science(
        task=Task(name="survival"),
        also=(
            Task(name="multiclass", columns=("label",)),
            Task(name="regression", columns=("age",)),
            Task(name="binary", columns=("x",)),
        ),
    )

    def test_targets_stand_side_by_side_and_may_be_missing(self, tmp_path: Path) -> None:
        table = load_target_table(cohort(tmp_path), self.science)
        found = read_targets(self.science, table, ["s0", "s1"])
        assert found[0].tolist() == [12.5, 1, 0, 61, 1]
        assert found[1, :3].tolist() == [3, 0, 1]
        assert torch.isnan(found[1, 3:]).tolist() == [True, True]
        assert column_classes(self.science.also[2], table) == ("0", "1")

    def test_what_cannot_be_used_is_named_all_the_same(self, tmp_path: Path) -> None:
        rows = [*ROWS[:3], ("a", "old", "1", "1", "2", "")]
        with pytest.raises(ConfigError, match="science.task.name=binary, and .* has the classes 0, 1, 2"):
            load_target_table(cohort(tmp_path, rows), self.science)
        rows[3] = ("a", "old", "1", "1", "", "")
        with pytest.raises(CohortError, match="'s3': age 'old' is no number"):
            load_target_table(cohort(tmp_path, rows), self.science)

    def test_a_further_class_needs_its_column(self, tmp_path: Path) -> None:
        science = Science(also=(Task(name="multiclass"),))
        with pytest.raises(ConfigError, match="of the multiclass task: it has one, the class"):
            load_target_table(cohort(tmp_path), science)


def test_words_of_an_ordinal_task_need_their_order(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the order of a, b, c: set cohort.classes"):
        load_target_table(cohort(tmp_path), Science(task=Task(name="ordinal")))
    further = Task(name="ordinal", columns=("label",))
    with pytest.raises(ConfigError, match="needs the order of a, b, c: set its classes"):
        load_target_table(cohort(tmp_path), Science(also=(further,)))
    given = further.model_copy(update={"classes": ("c", "b", "a")})
    science = Science(also=(given,))
    table = load_target_table(cohort(tmp_path), science)
    assert read_targets(science, table, ["s0", "s1", "s2"])[:, 1].tolist() == [2, 1, 0]
    with pytest.raises(ConfigError, match="science.task.classes is of tasks in science.also; set cohort.classes"):
        load_target_table(cohort(tmp_path), Science(task=given))


def test_classes_of_a_further_task_are_checked_at_the_start(tmp_path: Path) -> None:
    rows = [(*row[:5], "1") for row in ROWS]
    with pytest.raises(CohortError, match="column 'y' of the multiclass task holds 1: two classes are needed"):
        load_target_table(cohort(tmp_path, rows), Science(also=(Task(columns=("y",)),)))
    few = Task(columns=("label",), classes=("a", "b"))
    with pytest.raises(CohortError, match=r"'s2': label 'c' is not in its classes \(a, b\)"):
        load_target_table(cohort(tmp_path), Science(also=(few,)))


def test_a_column_of_numbers_that_is_empty(tmp_path: Path) -> None:
    rows = [(row[0], "", *row[2:]) for row in ROWS]
    with pytest.raises(ConfigError, match="column 'age' is empty in all rows"):
        load_target_table(cohort(tmp_path, rows), Science(task=Task(name="regression", columns=("age", "time"))))
