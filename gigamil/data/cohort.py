"""The slide table: one CSV, one row per slide. Everything wrong with it is said at once, with line numbers."""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from gigamil.config.schema import Cohort, Columns
from gigamil.data.scan import label_columns, slide_id_of
from gigamil.data.table import Record, folded, path_problem, read_table, refusal, text_problems
from gigamil.errors import CohortError
from gigamil.slides.reader import MAX_MPP, MIN_MPP

# An id is a folder name and a part of tar members, CSV cells, HTML and log lines: plain characters only.
SLIDE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"} | {s: s for s in SPLITS}
_WHAT = "slide table"


@dataclass(frozen=True)
class SlideRow:
    """One row of the slide table; what is optional and empty is None."""

    slide_id: str
    path: Path
    patient_id: str
    label: str | None
    mpp: float | None
    site: str | None
    split: str | None
    cells: Mapping[str, str] = field(default_factory=dict)  # of all columns, as they are


@dataclass(frozen=True)
class CohortTable:
    """A checked slide table, in the order of the file.

    Attributes:
        classes: class names; the position is the class number, and the last of two is the positive one.
    """

    rows: tuple[SlideRow, ...]
    classes: tuple[str, ...]

    def row(self, slide_id: str) -> SlideRow:
        """The row of a slide; KeyError if there is none."""
        return self._by_id[slide_id]

    def __contains__(self, slide_id: str) -> bool:
        return slide_id in self._by_id

    def class_number(self, slide_id: str) -> int:
        """Number of a slide's class; ValueError if its label is missing."""
        return self.classes.index(self.row(slide_id).label or "")

    @cached_property
    def sha256(self) -> str:
        """Digest of ids, patients, labels, given splits, classes; not of paths, nor of sites (see `check_splits`)."""
        rows = [(row.slide_id, row.patient_id, row.label, row.split) for row in self.rows]
        return hashlib.sha256(json.dumps([sorted(rows, key=repr), self.classes]).encode()).hexdigest()

    @cached_property
    def _by_id(self) -> dict[str, SlideRow]:
        return {row.slide_id: row for row in self.rows}


def load_cohort(cfg: Cohort, *, need_labels: bool = True, need_files: bool = True) -> CohortTable:
    """Read and check the slide table.

    Args:
        cfg: the table, its column names, the classes.
        need_labels: every row must have a label of `cfg.classes`, and at least two classes must occur.
        need_files: every path must exist. Training needs the shards only, so it passes False.
    Returns:
        The table. Relative paths are joined to `cfg.root`, or to the folder of the table.
    Raises:
        CohortError: the file is missing or empty, a column is missing, or rows are wrong: an id that is not plain or
            occurs twice (also up to case and Unicode form), a file under two ids, no patient, a label missing or
            unknown, an mpp that is no plausible number, a split that is unknown or given for some rows only, a path
            that does not exist or is no plain path, a cell that holds control characters, a formula, bytes that are not
            UTF-8, or more than 4,096 characters. All of them are in one message, with nothing of the table shown raw.
    """
    if not cfg.table.is_file():
        raise CohortError(f"no slide table '{cfg.table}'. Set cohort.table, or write one with: gigamil init")
    columns, records = read_table(cfg.table, _WHAT)
    needed = [
        "slide_id",
        "path",
        *([] if cfg.patient_is_slide else ["patient_id"]),
        *(["label"] if need_labels else []),
    ]
    problems = _missing_columns(cfg, columns, needed)
    if problems:
        raise refusal(_WHAT, cfg.table, problems)
    rows = {line: _Cells(cfg, record).row() for line, record in records}
    problems = [*_row_problems(cfg, records), *_path_problems(cfg, records, rows, need_files)]
    return _checked(cfg, rows, problems, need_labels)


def load_labels(
    table: Path,
    chosen: Mapping[str, str | None],
    *,
    patient_is_slide: bool = False,
    classes: tuple[str, ...] | None = None,
) -> CohortTable:
    """Read and check a bare label table: slides, patients, labels and perhaps sites, without slide files.

    Slides may be named with folder and suffix, as in `init`. Their paths are empty.

    Args:
        chosen: column of "slide_id", "patient_id" and "label"; None means one of the usual names.
    Raises:
        CohortError: as `load_cohort`, but for paths.
    """
    columns, records = read_table(table, _WHAT)
    cfg = Cohort(
        table=table,
        columns=label_columns(table, columns, chosen, patient_is_slide),
        patient_is_slide=patient_is_slide,
        classes=classes,
    )
    for _, record in records:
        record[cfg.columns.slide_id] = slide_id_of(record[cfg.columns.slide_id])
    rows = {line: replace(_Cells(cfg, record).row(), path=Path()) for line, record in records}
    return _checked(cfg, rows, list(_row_problems(cfg, records)), need_labels=True)


def _checked(cfg: Cohort, rows: Mapping[int, SlideRow], problems: list[str], need_labels: bool) -> CohortTable:
    """The table, or all its problems."""
    classes = cfg.classes or tuple(sorted({row.label for row in rows.values() if row.label}, key=natural_key))
    problems += [*_duplicate_ids(rows), *_split_problems(rows)]
    if need_labels:
        problems += _label_problems(rows, classes)
    if problems:
        raise refusal(_WHAT, cfg.table, problems)
    return CohortTable(tuple(rows.values()), classes)


@dataclass(frozen=True)
class _Cells:
    """Access to the cells of one row by the names gigamil uses; a column that the table lacks is empty."""

    cfg: Cohort
    record: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.record.get(getattr(self.cfg.columns, name), "").strip()

    def row(self) -> SlideRow:
        """The row, with cells that cannot be read as None; `_row_problems` reports them."""
        root = self.cfg.root if self.cfg.root is not None else self.cfg.table.parent
        return SlideRow(
            slide_id=self["slide_id"],
            path=root / _expanded(self["path"]),
            patient_id=self["slide_id"] if self.cfg.patient_is_slide else self["patient_id"],
            label=self["label"] or None,
            mpp=_number(self["mpp"]),
            site=self["site"] or None,
            split=SPLIT_WORDS.get(self["split"].lower(), self["split"]) or None,
            cells={column: text.strip() for column, text in self.record.items()},
        )


def _missing_columns(cfg: Cohort, columns: Iterable[str], needed: Iterable[str]) -> list[str]:
    problems = []
    for name in needed:
        column = getattr(cfg.columns, name)
        if column not in columns:
            cure = f"set cohort.columns.{name} to one of: {', '.join(columns)}"
            if name == "patient_id":
                cure += "; or set cohort.patient_is_slide=true if every slide is a patient of its own"
            problems.append(f"no column '{column}': {cure}")
    return problems


def _row_problems(cfg: Cohort, records: Sequence[Record]) -> Iterator[str]:
    known = {name: getattr(cfg.columns, name) for name in Columns.model_fields}
    yield from text_problems(records, {name: column for name, column in known.items() if column in records[0][1]})
    for line, record in records:
        cells = _Cells(cfg, record)
        if not SLIDE_ID.fullmatch(cells["slide_id"]):
            allowed = "1 to 128 of A-Z a-z 0-9 . _ - and not begin with a dot"
            yield f"line {line}: slide_id {cells['slide_id']!r} must be {allowed}"
        if not cfg.patient_is_slide and not cells["patient_id"]:
            yield f"line {line}: patient_id is empty, so leakage between splits could not be seen"
        if cells["mpp"]:
            yield from _mpp_problem(line, cells["mpp"])


def _path_problems(cfg: Cohort, records: Iterable[Record], rows: Mapping[int, SlideRow], exist: bool) -> Iterator[str]:
    first: dict[str | tuple[int, int], int] = {}
    for line, record in records:
        text = _Cells(cfg, record)["path"]
        problem = path_problem(text)
        if problem:
            yield f"line {line}: path {text[:60]!r} {problem}"
            continue
        path = rows[line].path
        before = first.setdefault(os.path.normpath(path), line)
        if before == line and exist:
            try:
                found = path.stat()
            except (OSError, ValueError):  # also a name that no file can have
                yield f"line {line}: path '{path}' does not exist"
                continue
            before = first.setdefault((found.st_dev, found.st_ino), line)  # a link is the file that it leads to
        if before != line:
            yield f"line {line}: path '{path}' is that of line {before} ('{rows[before].path}')"


def _mpp_problem(line: int, text: str) -> Iterator[str]:
    mpp = _number(text)
    if mpp is None:
        hint = " (write a point, not a comma)" if "," in text else ""
        yield f"line {line}: mpp {text!r} is not a number{hint}"
    elif not MIN_MPP <= mpp <= MAX_MPP:  # also refuses NaN
        yield f"line {line}: mpp {text!r} cannot be true (plausible: {MIN_MPP:g} to {MAX_MPP:g} micron per pixel)"


def _duplicate_ids(rows: Mapping[int, SlideRow]) -> Iterator[str]:
    first: dict[str, int] = {}
    for line, row in rows.items():
        before = first.setdefault(folded(row.slide_id), line)
        if before != line:
            yield f"line {line}: slide_id '{row.slide_id}' is that of line {before} ('{rows[before].slide_id}')"


def _split_problems(rows: Mapping[int, SlideRow]) -> Iterator[str]:
    without = [line for line, row in rows.items() if row.split is None]
    if without and len(without) < len(rows):
        yield f"line {without[0]}: split is empty, as in {len(without)} rows altogether; fill all rows or none"
    for line, row in rows.items():
        if row.split is not None and row.split not in SPLITS:
            yield f"line {line}: split '{row.split}' is not one of {', '.join(SPLITS)}"


def _label_problems(rows: Mapping[int, SlideRow], classes: tuple[str, ...]) -> Iterator[str]:
    for line, row in rows.items():
        if row.label is None:
            yield f"line {line}: slide '{row.slide_id}' has no label"
        elif row.label not in classes:
            yield f"line {line}: label '{row.label}' is not in cohort.classes ({', '.join(classes)})"
    count = Counter(row.label for row in rows.values())
    if len(set(classes)) < 2:
        yield f"a classifier needs at least two classes, found: {', '.join(classes) or 'none'}"
    for name in classes:
        if not count[name]:
            yield f"class '{name}' of cohort.classes has no slide"


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # the home of somebody who is not known here: then it does not exist
        return Path(text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def natural_key(label: str) -> tuple[float, str]:
    """Sort '2' before '10', and numbers before words; 'nan', which has no place among numbers, is a word."""
    number = _number(label)
    return (math.inf if number is None or math.isnan(number) else number, label)
