"""Slides -> train, val, test: by patient, so that no patient is on two sides; checked whenever a split is used."""

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigamil.config.schema import Cohort
from gigamil.data.cohort import SPLITS, CohortTable
from gigamil.errors import CohortError


@dataclass(frozen=True)
class Splits:
    """Slide ids of each split, in the order of the slide table.

    Attributes:
        train, val, test: slide ids; val and test may be empty.
        without_tiles: slides of the table that have no tiles and so are in no split.
        classes: class names by number.
        cohort_sha256: digest of the slide table that was split.
        method: in words, how.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    without_tiles: tuple[str, ...]
    classes: tuple[str, ...]
    cohort_sha256: str
    method: str

    def of(self, split: str) -> tuple[str, ...]:
        """Slide ids of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def split_of(self) -> dict[str, str]:
        """Split of each slide id."""
        return {slide_id: split for split in SPLITS for slide_id in self.of(split)}

    def to_json(self) -> str:
        """As written to splits.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Splits":
        """Inverse of `to_json`.

        Raises:
            ValueError: the text is not JSON, or not of this shape; says what is missing or unknown.
        """
        data = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"expected an object with the keys {', '.join(sorted(names))}")
        for name, value in data.items():
            is_text = isinstance(value, str)
            is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
            if not (is_text if name in ("cohort_sha256", "method") else is_list):
                raise ValueError(f"'{name}' has the wrong kind")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def make_splits(
    table: CohortTable, slide_ids_with_tiles: Iterable[str], cfg: Cohort, *, limit: int | None = None
) -> Splits:
    """Split the slides by patient, stratified by label; or as the table's split column says.

    Patients of a label are put in the order of a hash of (seed, patient), and test, val and train are cut from it: the
    outcome does not depend on the order of the table. A patient with several labels counts as the last of its
    classes. Train gets the first patient of a label, test the second, val the third: small classes reach far.

    Args:
        table: the cohort, with labels.
        slide_ids_with_tiles: slides that have shards; the others are listed in `without_tiles`.
        cfg: fractions and seed; a fraction of 0 leaves that split empty.
        limit: a smoke run, with only the first so many slides of each split and class (see `smoke_slides`).
    Raises:
        CohortError: the fractions leave nothing to train on, or as `check_splits`.
    """
    tiled = set(slide_ids_with_tiles)
    if limit is None:
        wanted = [row.slide_id for row in table.rows]
        assigned = _assign(table, [slide_id for slide_id in wanted if slide_id in tiled], cfg)
    else:
        smoke = smoke_slides(table, cfg, limit)
        wanted = list(smoke)
        assigned = {slide_id: split for slide_id, split in smoke.items() if slide_id in tiled}
    if not assigned:
        raise CohortError(f"none of the {len(wanted)} slides of '{cfg.table}' has tiles. Run `gigamil tile` first.")
    splits = Splits(
        train=tuple(slide_id for slide_id, split in assigned.items() if split == "train"),
        val=tuple(slide_id for slide_id, split in assigned.items() if split == "val"),
        test=tuple(slide_id for slide_id, split in assigned.items() if split == "test"),
        without_tiles=tuple(slide_id for slide_id in wanted if slide_id not in tiled),
        classes=table.classes,
        cohort_sha256=table.sha256,
        method=split_method(table, cfg, limit),
    )
    check_splits(splits, table, needed=_needed(table, cfg))
    return splits


def smoke_slides(table: CohortTable, cfg: Cohort, limit: int) -> dict[str, str]:
    """The slides of a smoke run and their splits: the first `limit` of each split and class, in the table's order.

    Slides are assigned before it is known which have tiles, so that `tile` and `split` choose the same.
    """
    taken: defaultdict[tuple[str, str | None], int] = defaultdict(int)
    chosen = {}
    for slide_id, split in _assign(table, [row.slide_id for row in table.rows], cfg).items():
        kind = (split, table.row(slide_id).label)
        taken[kind] += 1
        if taken[kind] <= limit:
            chosen[slide_id] = split
    return chosen


def split_method(table: CohortTable, cfg: Cohort, limit: int | None) -> str:
    """How a split of this table would be made, in words; equal words give equal splits."""
    method = (
        "split column of the slide table"
        if _is_given(table)
        else f"by patient, stratified by label, seed {cfg.split_seed}, test {cfg.test_fraction}, val {cfg.val_fraction}"
    )
    return method if limit is None else f"{method}; smoke run of the first {limit} of each split and class"


def check_splits(splits: Splits, table: CohortTable, *, needed: Iterable[str] = ("train",)) -> None:
    """Refuse a split that leaks or cannot be learned from. Called whenever a split is made or loaded.

    Args:
        needed: splits that must not be empty.
    Raises:
        CohortError: a patient or a slide in two splits, a slide that the table lacks, a class that is absent from a
            split, other classes than the table's, an empty split that is needed. All problems are in one message.
    """
    problems = [
        *_table_problems(splits, table),
        *_leaks(splits, table),
        *(f"{split} has no slide" for split in needed if not splits.of(split)),
        *_absent_classes(splits, table),
    ]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise CohortError(
            f"the split ({splits.method}) has {len(problems)} problem(s):\n{listed}\nChange cohort.test_fraction, "
            "cohort.val_fraction or cohort.split_seed, fill the split column of the slide table, or add slides; "
            "then run `gigamil split` again."
        )


def save_splits(splits: Splits, path: Path) -> None:
    """Write a split, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(splits.to_json(), encoding="utf-8")
    os.replace(temporary, path)


def load_splits(path: Path, table: CohortTable) -> Splits:
    """Read a split and check it against the table.

    Raises:
        CohortError: the file is missing or is not a split; or as `check_splits`.
    """
    try:
        splits = Splits.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CohortError(f"no split at '{path}'. Run `gigamil split` first.") from None
    except (OSError, ValueError) as error:
        raise CohortError(f"'{path}' is not a split: {error}. Delete it and run `gigamil split` again.") from error
    check_splits(splits, table)
    return splits


def _assign(table: CohortTable, slide_ids: Iterable[str], cfg: Cohort) -> dict[str, str]:
    """Split of each slide, in the order given."""
    rows = [table.row(slide_id) for slide_id in slide_ids]
    given = {row.slide_id: row.split for row in rows if row.split is not None}
    if given:  # all or none: `load_cohort` has seen to it
        return given
    class_of_patient: dict[str, int] = {}
    for row in rows:
        class_number = table.class_number(row.slide_id)
        class_of_patient[row.patient_id] = max(class_number, class_of_patient.get(row.patient_id, 0))
    split_of_patient: dict[str, str] = {}
    for number in range(len(table.classes)):
        patients = [patient for patient, its_class in class_of_patient.items() if its_class == number]
        split_of_patient |= _cut(patients, cfg)
    return {row.slide_id: split_of_patient[row.patient_id] for row in rows}


def _cut(patients: list[str], cfg: Cohort) -> dict[str, str]:
    """Splits of the patients of one class."""
    if cfg.test_fraction + cfg.val_fraction >= 1:
        raise CohortError(
            f"cohort.test_fraction={cfg.test_fraction} and cohort.val_fraction={cfg.val_fraction} leave no patient to "
            "train on; their sum must be below 1"
        )
    ordered = sorted(patients, key=lambda patient: _hash(cfg.split_seed, patient))
    num_test = _share(len(ordered), cfg.test_fraction, at_most=len(ordered) - 1)
    num_val = _share(len(ordered), cfg.val_fraction, at_most=len(ordered) - 1 - num_test)
    names = ["test"] * num_test + ["val"] * num_val
    names += ["train"] * (len(ordered) - len(names))
    return dict(zip(ordered, names, strict=True))


def _share(num: int, fraction: float, at_most: int) -> int:
    """`fraction` of `num`, rounded half up, but at least one if any is asked for, and at most `at_most`."""
    wanted = max(1, int(num * fraction + 0.5)) if fraction else 0
    return max(0, min(wanted, at_most))


def _hash(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{patient}".encode()).digest()


def _needed(table: CohortTable, cfg: Cohort) -> list[str]:
    if _is_given(table):
        return ["train"]
    return ["train", *(["val"] if cfg.val_fraction else []), *(["test"] if cfg.test_fraction else [])]


def _is_given(table: CohortTable) -> bool:
    return table.rows[0].split is not None


def _table_problems(splits: Splits, table: CohortTable) -> Iterator[str]:
    if splits.classes != table.classes:
        yield f"it was made for the classes {', '.join(splits.classes)}, the table has {', '.join(table.classes)}"
    unknown = [slide_id for split in SPLITS for slide_id in splits.of(split) if slide_id not in table]
    if unknown:
        yield f"slides that the table lacks: {', '.join(unknown)}"


def _leaks(splits: Splits, table: CohortTable) -> Iterator[str]:
    slides: defaultdict[str, list[str]] = defaultdict(list)
    patients: defaultdict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split in SPLITS:
        for slide_id in splits.of(split):
            slides[slide_id].append(split)
            if slide_id in table:
                patients[table.row(slide_id).patient_id][split].append(slide_id)
    for slide_id, where in slides.items():
        if len(where) > 1:
            yield f"slide '{slide_id}' is listed {len(where)} times ({', '.join(where)})"
    for patient_id, by_split in patients.items():
        if len(by_split) > 1:
            sides = " and ".join(f"{split} ({', '.join(ids)})" for split, ids in by_split.items())
            yield f"patient '{patient_id}' is in {sides}: the score would be too good"


def _absent_classes(splits: Splits, table: CohortTable) -> Iterator[str]:
    for split in SPLITS:
        labels = {table.row(slide_id).label for slide_id in splits.of(split) if slide_id in table}
        for name in table.classes:
            if labels and name not in labels:
                num = len({row.patient_id for row in table.rows if row.label == name})
                yield f"class '{name}' is absent from {split}; the table has {num} patient(s) with it"
