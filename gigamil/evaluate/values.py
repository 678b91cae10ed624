"""predictions.csv of a run whose task has no classes: what is known of each slide beside what is predicted.

What the columns mean is in task.json beside it.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gigamil.errors import CohortError
from gigamil.evaluate.predictions import FILE_NAME, HEADLINE_ORDER, Predictions, read_predictions
from gigamil.files import replace_file
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.store import load_task
from gigamil.tasks.task import Task

FIXED_COLUMNS = ("slide_id", "patient_id", "split")
_TRUE = "true_"


@dataclass(frozen=True)
class Values:
    """Predicted slides of a task without classes; a target that is not known is NaN."""

    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    splits: tuple[str, ...]
    task: Task
    target_NX: NDArray[np.float64]
    value_NP: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def target_names(self) -> tuple[str, ...]:
        """What is known of a slide, in words."""
        return target_names(self.task)

    @property
    def is_known_N(self) -> NDArray[np.bool_]:
        """Slides of which something is known."""
        return np.asarray(np.isfinite(self.target_NX).any(axis=1))

    @property
    def headline_split(self) -> str:
        """The split that is reported first: test, else val, else train, else the first name in the alphabet."""
        found = sorted(set(self.splits))
        return next((name for name in HEADLINE_ORDER if name in found), found[0])

    def take(self, rows: Sequence[int]) -> "Values":
        """The given rows, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64)
        names = (tuple(column[i] for i in rows) for column in (self.slide_ids, self.patient_ids, self.splits))
        slide_ids, patient_ids, splits = names
        return replace(
            self,
            slide_ids=slide_ids,
            patient_ids=patient_ids,
            splits=splits,
            target_NX=self.target_NX[chosen],
            value_NP=self.value_NP[chosen],
        )

    def labelled(self, split: str) -> "Values":
        """The slides of one split of which something is known."""
        return self.take([i for i in range(len(self)) if self.splits[i] == split and self.is_known_N[i]])

    def words(self, row: int) -> str:
        """What is predicted of a slide and what is known, for a caption."""
        names = self.task.predicted_names[:4]
        said = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, self.value_NP[row], strict=False))
        known = [
            f"{name} {value:g}"
            for name, value in zip(self.target_names, self.target_NX[row], strict=True)
            if math.isfinite(value)
        ]
        truth = f"; known: {', '.join(known)}" if known else ""
        return f"Predicted {said}{truth}; split {self.splits[row]}"

    def shown_first(self, count: int) -> list[str]:
        """Slides of the headline split with the highest and the lowest first number, in turn."""
        rows = [i for i in range(len(self)) if self.splits[i] == self.headline_split]
        falling = sorted(rows, key=lambda i: (-self.value_NP[i, 0], self.slide_ids[i]))
        turns = [row for pair in zip(falling, reversed(falling), strict=True) for row in pair]
        return [self.slide_ids[row] for row in dict.fromkeys(turns)][:count]

    def output(self, row: int) -> tuple[int, str]:
        """Number and name of the output whose saliency is drawn: the first, of labels the most probable."""
        if isinstance(self.task, Multilabel):
            number = int(self.value_NP[row].argmax())
            return number, self.task.labels[number]
        return 0, self.task.predicted_names[0]


def target_names(task: Task) -> tuple[str, ...]:
    """What is known of a slide, in words."""
    if isinstance(task, Several):
        return tuple(f"{part.name}_{name}" for part in task.parts() for name in target_names(part.task))
    if isinstance(task, Multilabel):
        return task.labels
    if isinstance(task, Regression):
        return task.names
    return ("label",) if isinstance(task, Multiclass | Ordinal) else ("time", "event")


def write_values(path: Path, values: Values) -> None:
    """Write `predictions.csv`; numbers keep every digit, so that reading gives the same floats."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIXED_COLUMNS, *(_TRUE + name for name in values.target_names), *values.task.predicted_names])
    for i, slide_id in enumerate(values.slide_ids):
        known = ["" if math.isnan(number) else repr(float(number)) for number in values.target_NX[i]]
        predicted = [repr(float(number)) for number in values.value_NP[i]]
        writer.writerow([slide_id, values.patient_ids[i], values.splits[i], *known, *predicted])
    replace_file(path, text.getvalue().encode())


def read_values(path: Path, task: Task) -> Values:
    """Read `predictions.csv` of a task and check it.

    Raises:
        CohortError: no such file, one that is no CSV in UTF-8, no row, other columns than the task's, a slide twice, a cell that is
            no number, or a prediction that is not finite; every problem is listed.
    """
    columns = [*FIXED_COLUMNS, *(_TRUE + name for name in target_names(task)), *task.predicted_names]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found, rows = list(reader.fieldnames or []), list(reader)
    except FileNotFoundError:
        raise CohortError(
            f"'{path}' does not exist; `gigamil evaluate` writes it from the best checkpoint of the run"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise CohortError(f"'{path}' cannot be read as UTF-8 CSV: {error}. Run `gigamil evaluate` again.") from error
    if found != columns:
        raise CohortError(f"'{path}': its columns are {', '.join(found) or 'none'}, and must be {', '.join(columns)}")
    problems = [] if rows else ["no row: no slide was predicted"]
    ids = [row["slide_id"] for row in rows]
    problems += [f"slide '{name}' appears twice" for name in dict.fromkeys(ids) if ids.count(name) > 1]
    numbers = np.full((len(rows), len(columns) - len(FIXED_COLUMNS)), np.nan)
    num_targets = len(target_names(task))
    for i, row in enumerate(rows):
        for k, name in enumerate(columns[len(FIXED_COLUMNS) :]):
            try:
                numbers[i, k] = float(row[name]) if row[name] or k >= num_targets else math.nan
            except (TypeError, ValueError):
                problems.append(f"slide '{row['slide_id']}': {name} is {row[name]!r}, no number")
                continue
            if k >= num_targets and not math.isfinite(numbers[i, k]):
                problems.append(f"slide '{row['slide_id']}': {name} is not finite")
    if problems:
        raise CohortError(f"'{path}' has {len(problems)} problems:\n  " + "\n  ".join(problems[:20]))
    return Values(
        tuple(ids),
        tuple(row["patient_id"] for row in rows),
        tuple(row["split"] for row in rows),
        task,
        numbers[:, :num_targets],
        numbers[:, num_targets:],
    )


def read_run(run: Path) -> Predictions | Values:
    """The predictions of a run, of whatever task; errors as `read_predictions` and `read_values`."""
    task = load_task(run)
    if task is None or isinstance(task, Multiclass | Ordinal):
        return read_predictions(run / FILE_NAME)
    return read_values(run / FILE_NAME, task)
