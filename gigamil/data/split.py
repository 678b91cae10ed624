"""Slides -> train, val, test: by patient, so that no patient is on two sides; checked whenever a split is used."""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigamil.config.schema import Cohort
from gigamil.data.cohort import SPLITS, CohortTable
from gigamil.data.folds import folds_method, make_folds, refuse_without_site, who_has
from gigamil.data.leaks import HASH_FILE, file_leaks, patient_leaks, picture_leaks, site_leaks, slide_prints
from gigamil.data.split_import import import_split
from gigamil.data.table import folded
from gigamil.errors import CohortError
from gigamil.files import replace_file
from gigamil.shards.read import ShardSet


@dataclass(frozen=True)
class Splits:
    """Slide ids of each split, in the order of the slide table.

    Attributes:
        train, val, test: slide ids; val and test may be empty.
        without_tiles: slides of the table that have no tiles and so are in no split.
        classes: class names by number.
        cohort_sha256: digest of the slide table that was split.
        method: in words, how.
        unnamed: slides of the table that an imported split does not name; they are in no split.
        sites_apart: no site is on two sides.
        seed, fold, inner_fold: of the configuration that made it; None where it has no part in the outcome.
        sources_sha256: digest of the slide files, as they were when they were tiled; empty if there were no shards.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    without_tiles: tuple[str, ...]
    classes: tuple[str, ...]
    cohort_sha256: str
    method: str
    unnamed: tuple[str, ...] = ()
    sites_apart: bool = False
    seed: int | None = None
    fold: int | None = None
    inner_fold: int | None = None
    sources_sha256: str = ""

    def of(self, split: str) -> tuple[str, ...]:
        """Slide ids of "train", "val" or "test"."""
        return self.sides()[split]

    def sides(self) -> dict[str, tuple[str, ...]]:
        """Slide ids by split."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def split_of(self) -> dict[str, str]:
        """Split of each slide id."""
        return {slide_id: split for split in SPLITS for slide_id in self.of(split)}

    def to_json(self) -> str:
        """As written to splits.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Splits":
        """Inverse of `to_json`; keys that have a default may be missing, as in files of earlier versions.

        Raises:
            ValueError: the text is not JSON, or not of this shape; says what is missing or unknown.
        """
        data = json.loads(text)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if not isinstance(data, dict) or not needed <= set(data) <= set(fields):
            raise ValueError(f"expected an object with the keys {', '.join(sorted(fields))}")
        for name, value in data.items():
            if not _fits(str(fields[name].type), value):
                raise ValueError(f"'{name}' has the wrong kind")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def make_splits(
    table: CohortTable, slide_ids_with_tiles: Iterable[str], cfg: Cohort, *, limit: int | None = None
) -> Splits:
    """Split the slides by patient, stratified by label; or as the table's split column or `cfg.splits` says.

    Folds and splits by site are those of `make_folds`, made of the whole table, so that slides without tiles do not
    move others. In a holdout the patients of a label that have tiles are put in the order of a hash of (seed, patient),
    and test, val and train are cut from it: the outcome does not depend on the order of the table. A patient with
    several labels counts as the last of its classes. Train gets the first patient of a label, test the second, val the
    third: small classes reach far.

    Args:
        table: the cohort, with labels.
        slide_ids_with_tiles: slides that have shards; the others are listed in `without_tiles`.
        cfg: method, fractions and seed; a fraction of 0 leaves that split empty.
        limit: a smoke run, with only the first so many slides of each split and class (see `smoke_slides`).
    Raises:
        CohortError: the fractions leave nothing to train on; the table has a split column and the configuration says
            otherwise; or as `make_folds`, `import_split` and `check_splits`.
    """
    tiled = set(slide_ids_with_tiles)
    if limit is None:
        wanted = [row.slide_id for row in table.rows]
        named = _assign(table, [slide_id for slide_id in wanted if slide_id in tiled], cfg)
        assigned = {slide_id: side for slide_id, side in named.items() if slide_id in tiled}
    else:
        named = smoke_slides(table, cfg, limit)
        wanted = list(named)
        assigned = {slide_id: split for slide_id, split in named.items() if slide_id in tiled}
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
        unnamed=tuple(slide_id for slide_id in wanted if slide_id in tiled and slide_id not in named),
        sites_apart=cfg.preserve_sites,
        seed=None if _is_given(table) or cfg.splits else cfg.split_seed,
        fold=cfg.fold if _has_folds(cfg) else None,
        inner_fold=cfg.inner_fold if _has_folds(cfg) else None,
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
    """How a split of this table would be made, in words.

    Equal words give equal splits of a table; of a holdout without sites only if the same slides have tiles.
    """
    if _is_given(table):
        method = "split column of the slide table"
    elif cfg.splits is not None:
        method = (
            f"'{cfg.splits.name}', sha256 {_digest(cfg)}, fold {cfg.fold}"
            + ", no site on two sides" * cfg.preserve_sites
        )
    elif cfg.split_method == "holdout" and not cfg.preserve_sites:
        method = (
            f"by patient, stratified by label, seed {cfg.split_seed}, test {cfg.test_fraction}, val {cfg.val_fraction}"
        )
    else:
        method = f"fold {cfg.fold} of " * (cfg.split_method != "holdout") + folds_method(cfg)
    if cfg.inner_fold is not None and _has_folds(cfg):
        method += f", inner fold {cfg.inner_fold}"
    return method if limit is None else f"{method}; smoke run of the first {limit} of each split and class"


def makes_folds(table: CohortTable, cfg: Cohort) -> bool:
    """Whether the configuration describes several splits, of which a run uses one."""
    return cfg.split_method != "holdout" and cfg.splits is None and not _is_given(table)


def check_splits(
    splits: Splits, table: CohortTable, *, needed: Iterable[str] = ("train",), leaks: Iterable[str] = ()
) -> None:
    """Refuse a split that leaks or cannot be learned from. Called whenever a split is made or loaded.

    Args:
        needed: splits that must not be empty.
        leaks: what else was found, see `tile_leaks`.
    Raises:
        CohortError: a patient or a slide in two splits, also if spelled otherwise; a site in two, where they are to be
            apart; a slide that the table lacks, another table than the one that was split, a class that is absent from
            a split, an empty split that is needed. All problems are in one message.
    """
    known = {slide_id: table.row(slide_id) for slide_id in splits.split_of() if slide_id in table}
    problems = [
        *_table_problems(splits, table),
        *patient_leaks(splits.sides(), {slide_id: row.patient_id for slide_id, row in known.items()}),
        *leaks,
        *(f"{split} has no slide" for split in needed if not splits.of(split)),
        *_absent_classes(splits, table),
    ]
    if splits.sites_apart:
        problems += site_leaks(splits.sides(), {slide_id: row.site for slide_id, row in known.items() if row.site})
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise CohortError(
            f"the split ({splits.method}) has {len(problems)} problem(s):\n{listed}\nChange cohort.test_fraction, "
            "cohort.val_fraction or cohort.split_seed, fill the split column of the slide table, remove copies, or "
            "add slides; then run `gigamil split --again`."
        )


def tile_leaks(
    splits: Splits, shards: ShardSet, folder: Path | None = None, *, near_duplicates: str = "refuse"
) -> list[str]:
    """What the tiles of the slides say against a split: one file, or one picture, on two sides; files that changed.

    Args:
        shards: of the slides of the split.
        folder: of splits.json; hashes of thumbnails are kept there.
        near_duplicates: "ignore" passes over slides that look the same.
    Raises:
        ShardError: a slide has no shards.
    Cost: see `slide_prints`.
    """
    prints = slide_prints(shards, splits.split_of(), folder / HASH_FILE if folder else None)
    found = list(file_leaks(splits.sides(), prints))
    if near_duplicates == "refuse":
        found += picture_leaks(splits.sides(), prints)
    if splits.sources_sha256 and splits.sources_sha256 != sources_digest(shards, splits.split_of()):
        found.append("slide files are others than when the split was made")
    return found


def sources_digest(shards: ShardSet, slide_ids: Iterable[str]) -> str:
    """Digest of the slide files that tiles were made of."""
    sources = sorted((slide_id, shards.manifest(slide_id).source_fingerprint) for slide_id in slide_ids)
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def save_splits(splits: Splits, path: Path) -> None:
    """Write a split, whole or not at all."""
    replace_file(path, splits.to_json())


def load_splits(
    path: Path, table: CohortTable, shards: ShardSet | None = None, near_duplicates: str = "refuse"
) -> Splits:
    """Read a split and check it against the table, and against the tiles if they are given.

    Raises:
        CohortError: the file is missing or is not a split; or as `check_splits`.
        ShardError: as `tile_leaks`.
    """
    try:
        splits = Splits.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CohortError(f"no split at '{path}'. Run `gigamil split` first.") from None
    except (OSError, ValueError) as error:
        raise CohortError(f"'{path}' is not a split: {error}. Delete it and run `gigamil split` again.") from error
    leaks = [] if shards is None else tile_leaks(splits, shards, path.parent, near_duplicates=near_duplicates)
    check_splits(splits, table, leaks=leaks)
    return splits


def _fits(kind: str, value: object) -> bool:
    """Whether a JSON value is of a field's kind, which is written as in `Splits`."""
    if "tuple" in kind:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if "int" in kind:
        return value is None or (isinstance(value, int) and not isinstance(value, bool))
    return isinstance(value, bool if "bool" in kind else str)


def _assign(table: CohortTable, slide_ids: Iterable[str], cfg: Cohort) -> dict[str, str]:
    """Split of each slide, in the order given; of all slides of the table where folds or sites decide."""
    if _is_given(table):  # in all rows or none: `load_cohort` has seen to it
        _refuse_two_masters(cfg)
        return {slide_id: table.row(slide_id).split or "" for slide_id in slide_ids}
    if cfg.splits is not None:
        sides = import_split(cfg.splits, table, cfg.fold, cfg.inner_fold)
        if cfg.preserve_sites:  # `check_splits` says whether they are apart
            refuse_without_site(table.row(slide_id) for slide_id in sides)
        return sides
    if _has_folds(cfg) or cfg.preserve_sites:
        fold = cfg.fold if _has_folds(cfg) else 0
        return make_folds(table, cfg).sides(fold, cfg.inner_fold)
    rows = [table.row(slide_id) for slide_id in slide_ids]
    # Spellings of one patient are one; the first of them stands for it.
    spelling: dict[str, str] = {}
    class_of_patient: dict[str, int] = {}
    for row in rows:
        key = folded(row.patient_id)
        spelling[key] = min(row.patient_id, spelling.get(key, row.patient_id))
    for row in rows:
        patient = spelling[folded(row.patient_id)]
        class_of_patient[patient] = max(table.class_number(row.slide_id), class_of_patient.get(patient, 0))
    split_of_patient: dict[str, str] = {}
    for number in range(len(table.classes)):
        patients = [patient for patient, its_class in class_of_patient.items() if its_class == number]
        split_of_patient |= _cut(patients, cfg)
    return {row.slide_id: split_of_patient[spelling[folded(row.patient_id)]] for row in rows}


def _refuse_two_masters(cfg: Cohort) -> None:
    said = [name for name, is_set in _ASKS_OTHERWISE.items() if is_set(cfg)]
    if said:
        raise CohortError(
            f"'{cfg.table}' has a split column, and {' and '.join(said)} would split otherwise. Leave one of them: to pass "
            "over the column, set cohort.columns.split to a name that the table lacks."
        )


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
    if _is_given(table) or cfg.splits is not None:
        return ["train"]
    has_test = bool(cfg.test_fraction) or cfg.split_method == "kfold"
    has_val = bool(cfg.val_fraction) or cfg.inner_fold is not None
    return ["train", *(["val"] if has_val else []), *(["test"] if has_test else [])]


def _is_given(table: CohortTable) -> bool:
    return table.rows[0].split is not None


def _has_folds(cfg: Cohort) -> bool:
    return cfg.split_method != "holdout" or cfg.splits is not None


def _digest(cfg: Cohort) -> str:
    """Of the file that a split is imported from: another content is another split."""
    path = cfg.splits / f"splits_{cfg.fold}.csv" if cfg.splits and cfg.splits.is_dir() else cfg.splits
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else ""
    except OSError:
        return "of nothing"  # `import_split` says so


# What contradicts a split column. Fractions and the seed do not: a column has always won over their defaults.
_ASKS_OTHERWISE: dict[str, Callable[[Cohort], bool]] = {
    "cohort.splits": lambda cfg: cfg.splits is not None,
    "cohort.split_method": lambda cfg: cfg.split_method != "holdout",
    "cohort.preserve_sites": lambda cfg: cfg.preserve_sites,
}


def _table_problems(splits: Splits, table: CohortTable) -> Iterator[str]:
    if splits.classes != table.classes:
        yield f"it was made for the classes {', '.join(splits.classes)}, the table has {', '.join(table.classes)}"
    elif splits.cohort_sha256 != table.sha256:
        yield "slides, patients, labels or splits of the slide table are others than when the split was made"
    unknown = [slide_id for split in SPLITS for slide_id in splits.of(split) if slide_id not in table]
    if unknown:
        yield f"slides that the table lacks: {', '.join(unknown)}"


def _absent_classes(splits: Splits, table: CohortTable) -> Iterator[str]:
    for split in SPLITS:
        labels = {table.row(slide_id).label for slide_id in splits.of(split) if slide_id in table}
        for name in table.classes:
            if labels and name not in labels:
                yield f"class '{name}' is absent from {split}; {who_has(name, table)}"
