"""predictions.csv of a run: one row per slide, one probability per class. The only file that knows its columns.

Read with `csv`, not pandas: a class or a slide may well be called "NA" or "001".
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gigamil.errors import CohortError
from gigamil.files import replace_file

FILE_NAME = "predictions.csv"
FIXED_COLUMNS = ("slide_id", "patient_id", "label", "split")
PROB_PREFIX = "prob_"
HEADLINE_ORDER = ("test", "val", "train")
# `pred` is compared with the largest probability up to the rounding of a CSV that went through another program.
PRED_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Predictions:
    """Predicted slides; the label of a slide is None where it is not known."""

    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels: tuple[str | None, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    probs_NK: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.slide_ids)

    @cached_property
    def predicted(self) -> tuple[str, ...]:
        """The most probable class of each slide (the first of equals)."""
        return tuple(self.classes[k] for k in self.probs_NK.argmax(axis=1))

    @property
    def headline_split(self) -> str:
        """The split that is reported first: test, else val, else train, else the first name in the alphabet."""
        found = sorted(set(self.splits))
        return next((name for name in HEADLINE_ORDER if name in found), found[0])

    @property
    def label_numbers(self) -> NDArray[np.int64]:
        """Labels as class numbers; only for a selection in which every label is known."""
        return np.array([self.classes.index(label) for label in self.labels if label is not None], dtype=np.int64)

    def take(self, rows: Sequence[int]) -> "Predictions":
        """The given rows, in the given order."""
        return Predictions(
            tuple(self.slide_ids[i] for i in rows),
            tuple(self.patient_ids[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            tuple(self.splits[i] for i in rows),
            self.classes,
            self.probs_NK[np.asarray(rows, dtype=np.int64)],
        )

    def labelled(self, split: str) -> "Predictions":
        """The slides of one split whose label is known."""
        return self.take([i for i in range(len(self)) if self.splits[i] == split and self.labels[i] is not None])

    def words(self, row: int) -> str:
        """What is predicted of a slide and what is known, for a caption."""
        truth = f", label {self.labels[row]}" if self.labels[row] is not None else ""
        return f"Predicted {self.predicted[row]} ({self.probs_NK[row].max():.3f}){truth}, split {self.splits[row]}"

    def shown_first(self, count: int) -> list[str]:
        """Slides of the headline split: of each predicted class in turn (the last first), the most probable."""
        rows = [i for i in range(len(self)) if self.splits[i] == self.headline_split]

        def surest_first(name: str) -> list[int]:
            called = [i for i in rows if self.predicted[i] == name]
            return sorted(called, key=lambda i: (-self.probs_NK[i].max(), self.slide_ids[i]))

        queues = [surest_first(name) for name in reversed(self.classes)]
        turns = [i for turn in zip_longest(*queues) for i in turn if i is not None]
        return [self.slide_ids[i] for i in turns[:count]]

    def output(self, row: int) -> tuple[int, str]:
        """Number and name of the class whose saliency is drawn: the one that is predicted."""
        return self.classes.index(self.predicted[row]), self.predicted[row]


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write `predictions.csv`; numbers keep every digit, so that reading gives the same floats."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIXED_COLUMNS, *(PROB_PREFIX + name for name in predictions.classes), "pred"])
    for i, slide_id in enumerate(predictions.slide_ids):
        fixed = [slide_id, predictions.patient_ids[i], predictions.labels[i] or "", predictions.splits[i]]
        writer.writerow([*fixed, *(repr(float(p)) for p in predictions.probs_NK[i]), predictions.predicted[i]])
    replace_file(path, text.getvalue().encode())


def read_predictions(path: Path) -> Predictions:
    """Read `predictions.csv` and check it.

    Raises:
        CohortError: no such file, one that is no CSV in UTF-8, no row, a missing column, a slide twice, a label that is
            no class, a probability that is no number, or a `pred` that is not the most probable class; every
            problem is listed.
    """
    if not path.is_file():
        raise CohortError(f"'{path}' does not exist; `gigamil evaluate` writes it from the best checkpoint of the run")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise CohortError(
            f"'{path}' cannot be read as UTF-8 CSV: {error}. Save it as 'CSV UTF-8', or run `gigamil evaluate` again."
        ) from error
    classes = tuple(name.removeprefix(PROB_PREFIX) for name in columns if name.startswith(PROB_PREFIX))
    missing = [name for name in (*FIXED_COLUMNS, "pred") if name not in columns]
    if missing or len(classes) < 2:
        raise CohortError(
            f"'{path}': needs the columns {', '.join(FIXED_COLUMNS)}, pred and at least two {PROB_PREFIX}<class>; "
            f"it has {', '.join(columns) or 'none'}. Run `gigamil evaluate` again to write it anew."
        )
    problems: list[str] = []
    probs_NK = _probabilities(rows, classes, problems)
    found = Predictions(
        tuple(row["slide_id"] for row in rows),
        tuple(row["patient_id"] for row in rows),
        tuple(row["label"] or None for row in rows),
        tuple(row["split"] for row in rows),
        classes,
        probs_NK,
    )
    problems += _problems(found, [row["pred"] for row in rows])
    if problems:
        raise CohortError(f"'{path}' has {len(problems)} problems:\n  " + "\n  ".join(problems[:20]))
    return found


def _probabilities(rows: list[dict[str, str]], classes: Sequence[str], problems: list[str]) -> NDArray[np.float64]:
    probs_NK = np.zeros((len(rows), len(classes)))
    for i, row in enumerate(rows):
        for k, name in enumerate(classes):
            try:
                probs_NK[i, k] = float(row[PROB_PREFIX + name])
            except (TypeError, ValueError):
                problems.append(
                    f"slide '{row['slide_id']}': {PROB_PREFIX}{name} is {row[PROB_PREFIX + name]!r}, no number"
                )
    return probs_NK


def _problems(found: Predictions, pred: Sequence[str]) -> list[str]:
    if not len(found):
        return ["no row: no slide was predicted"]
    problems = [f"slide '{name}' appears twice" for name in _repeated(found.slide_ids)]
    for i, slide_id in enumerate(found.slide_ids):
        label, prob_K = found.labels[i], found.probs_NK[i]
        if label is not None and label not in found.classes:
            problems.append(f"slide '{slide_id}': label {label!r} is none of {', '.join(found.classes)}")
        if not np.all((prob_K >= 0) & (prob_K <= 1)):
            problems.append(f"slide '{slide_id}': probabilities {prob_K.tolist()} are not between 0 and 1")
        elif pred[i] not in found.classes or prob_K[found.classes.index(pred[i])] < prob_K.max() - PRED_TOLERANCE:
            problems.append(
                f"slide '{slide_id}': pred {pred[i]!r} is not the most probable class {found.predicted[i]!r}"
            )
    return problems


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
