"""What is known of each slide: read from the columns of the slide table that the task names.

Shapes: S slides, X numbers of a target, NaN where not known.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gigamil.config.schema import Cohort, Science, Task
from gigamil.data.cohort import CohortTable, SlideRow, load_cohort, natural_key
from gigamil.errors import CohortError, ConfigError

_MAX_LISTED = 20


def has_classes(task: Task) -> bool:
    """Each slide is of one class, in the label column."""
    return task.name in ("binary", "multiclass", "ordinal")


def load_target_table(cohort: Cohort, science: Science, *, need_files: bool = False) -> CohortTable:
    """The slide table of a run, every slide with a target of `science.task` that can be used.

    Of a task without classes the label of a row is what splits are stratified by: "event" or "censored"; "low" or "high", by the
    median of the first column; "all" of several labels. Targets of `science.also` may be missing.

    Args:
        need_files: as `load_cohort`.
    Raises:
        CohortError: as `load_cohort`; or targets are missing, are no numbers, or make no sense, all in one message.
        ConfigError: columns are not named, or the table lacks them, or a binary task has another number of classes.
    """
    task = science.task
    if task.classes is not None:
        raise ConfigError("science.task.classes is of tasks in science.also; set cohort.classes")
    if has_classes(task):
        table = load_cohort(_labelled_by(cohort, task), need_files=need_files)
        _refuse_not_binary(task, table.classes, cohort)
        _refuse_unordered(task, table.classes, cohort.classes is not None, "cohort.classes")
    else:
        table = load_cohort(cohort, need_labels=False, need_files=need_files)
    problems: list[str] = []
    for one in science.also if has_classes(task) else (task, *science.also):
        _refuse_lacking(one, table, cohort)
        if has_classes(one):
            classes = column_classes(one, table)
            _refuse_not_binary(one, classes, cohort)
            _refuse_unordered(one, classes, one.classes is not None, "its classes")
            problems += _class_problems(one, classes, table)
        else:
            problems += [p for row in table.rows for p in _problems(one, row, needed=one is task)]
    if problems:
        more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        listed = "\n  ".join(problems[:_MAX_LISTED])
        raise CohortError(f"'{cohort.table}' has {len(problems)} targets that cannot be used:\n  {listed}{more}")
    if has_classes(task):
        return table
    columns = target_columns(task)
    if task.name == "survival" and not any(_numbers(row, columns)[1] == 1 for row in table.rows):
        raise CohortError(
            f"'{cohort.table}': all slides are censored (column '{columns[1]}' has no 1), so nothing can be learned"
        )
    strata = _strata(task, table, columns)
    rows = tuple(replace(row, label=stratum) for row, stratum in zip(table.rows, strata, strict=True))
    return CohortTable(rows, tuple(dict.fromkeys(_STRATA[task.name])))


def stratum_numbers(table: CohortTable, slide_ids: Sequence[str]) -> list[int]:
    """What slides are drawn by if all kinds are to come equally often: their class, or what splits are stratified by."""
    return [table.class_number(slide_id) for slide_id in slide_ids]


def target_columns(task: Task) -> tuple[str, ...]:
    """Columns of a task without classes.

    Raises:
        ConfigError: they are not named, or not so many as the task takes.
    """
    if task.columns is None and task.name != "survival":
        raise ConfigError(
            f"science.task.name={task.name} needs science.task.columns: names of columns of the slide table"
        )
    columns = ("time", "event") if task.columns is None else task.columns
    if task.name == "survival" and len(columns) != 2:
        raise ConfigError(f"science.task.columns {list(columns)}: survival has two, the time and the event")
    if not columns or len(set(columns)) < len(columns):
        raise ConfigError(f"science.task.columns {list(columns)} must be names of columns, each once")
    return columns


def column_classes(task: Task, table: CohortTable) -> tuple[str, ...]:
    """Classes of a further task: as configured, or what its column holds, numbers by size and words by the alphabet."""
    (column,) = _one_column(task)
    if task.classes is not None:
        return task.classes
    return tuple(sorted({row.cells[column] for row in table.rows if row.cells[column]}, key=natural_key))


def read_targets(science: Science, table: CohortTable, slide_ids: Sequence[str]) -> Tensor:
    """Targets of slides, float64 (S, X): the class number, or the numbers of the columns; of all tasks side by side.

    Args:
        table: from `load_target_table`.
    """
    parts = [_read_own(science.task, table, slide_ids)]
    for task in science.also:
        if has_classes(task):
            (column,), classes = _one_column(task), column_classes(task, table)
            cells = [table.row(slide_id).cells[column] for slide_id in slide_ids]
            numbers = [[float(classes.index(text)) if text else math.nan] for text in cells]
            parts.append(torch.tensor(numbers, dtype=torch.float64).reshape(len(slide_ids), 1))
        else:
            parts.append(_read_own(task, table, slide_ids))
    return torch.cat(parts, dim=1)


def _read_own(task: Task, table: CohortTable, slide_ids: Sequence[str]) -> Tensor:
    if has_classes(task):
        numbers = [[float(table.class_number(slide_id))] for slide_id in slide_ids]
        return torch.tensor(numbers, dtype=torch.float64).reshape(len(slide_ids), 1)
    columns = target_columns(task)
    rows = [_numbers(table.row(slide_id), columns) for slide_id in slide_ids]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(slide_ids), len(columns))


_STRATA = {"survival": ("censored", "event"), "regression": ("low", "high"), "multilabel": ("all",)}


def _labelled_by(cohort: Cohort, task: Task) -> Cohort:
    """The cohort with the task's column as its labels."""
    if task.columns is None:
        return cohort
    columns = cohort.columns.model_copy(update={"label": _one_column(task)[0]})
    return cohort.model_copy(update={"columns": columns})


def _one_column(task: Task) -> tuple[str]:
    if task.columns is None or len(task.columns) != 1:
        raise ConfigError(f"columns {list(task.columns or ())} of the {task.name} task: it has one, the class")
    return (task.columns[0],)


def _refuse_not_binary(task: Task, classes: Sequence[str], cohort: Cohort) -> None:
    if task.name == "binary" and len(classes) != 2:
        raise ConfigError(
            f"science.task.name=binary, and '{cohort.table}' has the classes {', '.join(classes)}. Set it to multiclass, or name "
            "two in cohort.classes."
        )


def _refuse_unordered(task: Task, classes: Sequence[str], is_given: bool, key: str) -> None:
    """Words have no order of their own; that of the alphabet would be learned without a word."""
    if task.name == "ordinal" and not is_given and not all(map(_is_number, classes)):
        raise ConfigError(
            f"an ordinal task needs the order of {', '.join(classes)}: set {key} to them, from the lowest to the highest"
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _class_problems(task: Task, classes: Sequence[str], table: CohortTable) -> Iterator[str]:
    (column,) = _one_column(task)
    if len(classes) < 2:
        yield f"column '{column}' of the {task.name} task holds {', '.join(classes) or 'nothing'}: two classes are needed"
    for row in table.rows:
        if row.cells[column] and row.cells[column] not in classes:
            yield f"slide '{row.slide_id}': {column} {row.cells[column]!r} is not in its classes ({', '.join(classes)})"


def _refuse_lacking(task: Task, table: CohortTable, cohort: Cohort) -> None:
    columns = _one_column(task) if has_classes(task) else target_columns(task)
    lacking = [column for column in columns if column not in table.rows[0].cells]
    if lacking:
        raise ConfigError(
            f"'{cohort.table}' has no column {', '.join(map(repr, lacking))} for the {task.name} task. Set science.task.columns (or those "
            f"of science.also) to some of: {', '.join(table.rows[0].cells)}"
        )


def _numbers(row: SlideRow, columns: Sequence[str]) -> list[float]:
    """Cells as numbers, those that are empty as NaN; raises ValueError."""
    return [float(row.cells[column]) if row.cells[column] else math.nan for column in columns]


def _problems(task: Task, row: SlideRow, *, needed: bool) -> Iterator[str]:
    wrong, columns = False, target_columns(task)
    for column in columns:
        text = row.cells[column]
        try:
            is_number = not text or not math.isnan(float(text))
        except ValueError:
            is_number = False
        if not is_number:
            wrong = True
            yield f"slide '{row.slide_id}': {column} {text[:60]!r} is no number; leave the cell empty where it is not known"
    if wrong:
        return
    numbers = _numbers(row, columns)
    if all(map(math.isnan, numbers)):
        if needed:
            yield f"slide '{row.slide_id}' has no target: {', '.join(columns)} are empty"
        return
    problem = _PROBLEMS[task.name](numbers, columns)
    if problem:
        yield f"slide '{row.slide_id}': {problem}"


def _survival_problem(numbers: Sequence[float], columns: Sequence[str]) -> str | None:
    time, event = numbers
    empty = [name for name, value in zip(columns, numbers, strict=True) if math.isnan(value)]
    if empty:
        return f"{' and '.join(empty)} is empty; survival needs both"
    if not 0 < time < math.inf:
        return f"{columns[0]} {time:g} must be a number above 0"
    return None if event in (0.0, 1.0) else f"{columns[1]} {event:g} must be 1 (it came) or 0 (censored)"


def _label_problem(numbers: Sequence[float], columns: Sequence[str]) -> str | None:
    wrong = [
        name for name, value in zip(columns, numbers, strict=True) if not math.isnan(value) and value not in (0.0, 1.0)
    ]
    return f"{', '.join(wrong)} must be 1 (it is there), 0 (it is not) or empty" if wrong else None


def _number_problem(numbers: Sequence[float], columns: Sequence[str]) -> str | None:
    wrong = [name for name, value in zip(columns, numbers, strict=True) if math.isinf(value)]
    return f"{', '.join(wrong)} must be finite" if wrong else None


_PROBLEMS = {"survival": _survival_problem, "multilabel": _label_problem, "regression": _number_problem}


def _strata(task: Task, table: CohortTable, columns: Sequence[str]) -> list[str]:
    numbers = [_numbers(row, columns) for row in table.rows]
    if task.name == "survival":
        return [_STRATA["survival"][int(event)] for _, event in numbers]
    if task.name == "multilabel":
        return ["all"] * len(numbers)
    known = [first for first, *_ in numbers if not math.isnan(first)]
    if not known:
        raise ConfigError(f"column '{columns[0]}' is empty in all rows, so nothing can be learned of it")
    middle = statistics.median(known)
    return ["high" if first > middle else "low" for first, *_ in numbers]  # who is not known is with the low ones
