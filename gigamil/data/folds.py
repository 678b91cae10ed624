"""Many splits of one cohort: k folds, Monte-Carlo, nested; by patient or by site, stratified by label, frozen in files.

Units (patients, or sites with all their patients) are dealt to the sides one by one, large ones first, each to the side
that lacks its classes most. Own code on purpose: scikit-learn's StratifiedGroupKFold knows equal shares only, deals
sites of unequal size less evenly (tests/unit/data/test_folds.py), and has changed its folds between versions, whereas
the splits of a published run must stay what they were.
"""

import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gigamil.config.schema import Cohort
from gigamil.data.cohort import SPLITS, CohortTable, SlideRow
from gigamil.data.table import folded
from gigamil.errors import CohortError
from gigamil.files import replace_file

FOLDS_FORMAT = "gigamil folds 1"
# Sides of a split in the order in which a class with few patients reaches them.
_SIDES = ("train", "test", "val")
_TRIES = 8  # orders of dealing, of which the most even is taken
_EVEN_ENOUGH = 0.01  # largest difference of a side's share of a class from the share wanted, at which trying ends
_NOISE = 0.75  # share of a unit's size that the seed decides when units are ordered by size

Sides = Mapping[str, str]  # slide id -> train, val or test


@dataclass(frozen=True)
class Folds:
    """Several splits of one cohort.

    Attributes:
        method: how they were made, in words; equal words and tables give equal folds.
        cohort_sha256: digest of the slide table.
        classes: class names by number.
        folds: sides of all slides, for each fold, in the order of the slide table.
        inner: for each fold the inner folds of its training and validation slides; a fold's own test slides are in
            none of them. Empty if no fold has any.
    """

    method: str
    cohort_sha256: str
    classes: tuple[str, ...]
    folds: tuple[Sides, ...]
    inner: tuple[tuple[Sides, ...], ...]

    def sides(self, fold: int, inner_fold: int | None = None) -> dict[str, str]:
        """Side of each slide in a fold; with an inner fold, the outer test slides stay the test side.

        Raises:
            CohortError: there is no such fold.
        """
        if not 0 <= fold < len(self.folds):
            raise CohortError(f"cohort.fold={fold}: there are {len(self.folds)} folds, 0..{len(self.folds) - 1}")
        if inner_fold is None:
            return dict(self.folds[fold])
        inner = self.inner[fold] if self.inner else ()
        if not 0 <= inner_fold < len(inner):
            raise CohortError(f"cohort.inner_fold={inner_fold}: fold {fold} has {len(inner)} inner folds")
        return {slide_id: inner[inner_fold].get(slide_id, "test") for slide_id in self.folds[fold]}

    def to_json(self) -> str:
        """As written to folds.json: slide ids by side, without patients."""
        splits = [
            _by_side(sides) | {"inner": [_by_side(inner) for inner in (self.inner[number] if self.inner else ())]}
            for number, sides in enumerate(self.folds)
        ]
        facts = {"format": FOLDS_FORMAT, "method": self.method, "cohort_sha256": self.cohort_sha256}
        return json.dumps(facts | {"classes": self.classes, "folds": splits}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Folds":
        """Inverse of `to_json`, up to the order of slides.

        Raises:
            ValueError: the text is not JSON, or not of this shape.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FOLDS_FORMAT:
            raise ValueError(f"it has no 'format': '{FOLDS_FORMAT}'")
        try:
            inner = tuple(tuple(_sides_of(part) for part in fold["inner"]) for fold in data["folds"])
            return cls(
                method=str(data["method"]),
                cohort_sha256=str(data["cohort_sha256"]),
                classes=tuple(map(str, data["classes"])),
                folds=tuple(_sides_of(fold) for fold in data["folds"]),
                inner=inner if any(inner) else (),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks something, or has something of a wrong kind: {error}") from error

    def to_csv(self, table: CohortTable) -> str:
        """For people, and for tools that read Patho-Bench's tables: a row per slide, a column per fold."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        numbers = range(len(self.folds))
        writer.writerow(["slide_id", "case_id", "label", "site", *(f"fold_{number}" for number in numbers)])
        for row in table.rows:
            sides = [self.folds[number].get(row.slide_id, "") for number in numbers]
            writer.writerow([row.slide_id, row.patient_id, row.label or "", row.site or "", *sides])
        return stream.getvalue()

    def text(self, table: CohortTable) -> str:
        """For people: slides, patients, sites and classes of each side of each fold."""
        return sides_table({str(number): sides for number, sides in enumerate(self.folds)}, table)


def make_folds(table: CohortTable, cfg: Cohort) -> Folds:
    """Make the splits that `cfg` describes.

    - kfold: each patient is in the test side of one fold; `val_fraction` of all patients is held out of the others.
      Each training and validation part is cut in as many inner folds again (nested cross-validation).
    - monte_carlo: each fold is drawn anew, by `test_fraction` and `val_fraction`.
    - holdout: one such draw.

    Patients are dealt, not slides, and a patient's slides stay together; with `preserve_sites` those of a site do, and
    a patient with slides of several sites ties these together. Patients and sites that differ in case, blanks or
    Unicode form only are one. The result depends on the table's content and the seed, not on the order of its rows.

    Raises:
        CohortError: a slide without a site where sites are to be preserved, fractions that leave nothing to train on,
            or a side without one of the classes; says how many patients and sites have it.
    Cost: 2.5 s for 5,000 patients in 5 folds with 5 inner folds each.
    Source: site-preserved cross-validation, Howard et al. 2021, Nat Commun 12:4423.
    """
    units = _units(table, cfg.preserve_sites)
    rows = {row.slide_id: units.of_slide[row.slide_id] for row in table.rows}
    if cfg.split_method == "kfold":
        outer, inner = _kfold(units.counts, cfg)
    else:
        shares = _shares(cfg, test_fraction=cfg.test_fraction)
        num = cfg.folds if cfg.split_method == "monte_carlo" else 1
        outer = [_deal(units.counts, shares, f"{cfg.split_seed} draw {number}") for number in range(num)]
        inner = []

    def slides(side_of: Mapping[str, str]) -> dict[str, str]:
        return {slide_id: side_of[unit] for slide_id, unit in rows.items() if unit in side_of}

    folds = Folds(
        method=folds_method(cfg),
        cohort_sha256=table.sha256,
        classes=table.classes,
        folds=tuple(map(slides, outer)),
        inner=tuple(tuple(map(slides, parts)) for parts in inner),
    )
    _check_classes(folds, table, cfg, _ties(table, units) if cfg.preserve_sites else "")
    return folds


def freeze_folds(folds: Folds, folder: Path, table: CohortTable, *, again: bool = False) -> None:
    """Write folds.json and folds.csv. Folds that are there stay: equal ones are kept, others are refused.

    Args:
        again: replace them.
    Raises:
        CohortError: other folds, or something else, are there.
    """
    path = folder / "folds.json"
    if path.exists() and not again:
        try:
            same = Folds.from_json(path.read_text(encoding="utf-8")) == folds
        except (OSError, ValueError):
            same = False
        if not same:
            raise CohortError(f"'{path}' holds other folds. Choose another folder, or type --again to replace them.")
    replace_file(path, folds.to_json())
    replace_file(folder / "folds.csv", folds.to_csv(table))


def folds_method(cfg: Cohort) -> str:
    """How `make_folds` splits, in words."""
    kind = {"kfold": f"{cfg.folds} folds", "monte_carlo": f"{cfg.folds} Monte-Carlo draws", "holdout": "holdout"}
    test = "" if cfg.split_method == "kfold" else f"test {cfg.test_fraction}, "
    sites = ", no site on two sides" if cfg.preserve_sites else ""
    return (
        f"{kind[cfg.split_method]} by patient, stratified by label, seed {cfg.split_seed}, {test}"
        f"val {cfg.val_fraction}{sites}"
    )


def sides_table(splits: Mapping[str, Sides], table: CohortTable) -> str:
    """A table for people: a row for each side of each split, with numbers of slides, patients, sites and classes."""
    rows = [["fold", "side", "slides", "patients", "sites", *table.classes]]
    for name, side_of in splits.items():
        for side in SPLITS:
            found = [table.row(slide_id) for slide_id, its_side in side_of.items() if its_side == side]
            labels = Counter(row.label for row in found)
            sites = {folded(row.site) for row in found if row.site}
            numbers = [len(found), len({folded(row.patient_id) for row in found}), len(sites)]
            rows.append([name, side, *map(str, numbers), *(str(labels[label]) for label in table.classes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [cell.ljust(width) if number == 1 else cell.rjust(width) for number, (cell, width) in enumerate(cells)]
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


@dataclass(frozen=True)
class _Units:
    """What is never divided: the unit of each slide, and the patients of each class in each unit."""

    of_slide: Mapping[str, str]
    counts: Mapping[str, np.ndarray]


def _units(table: CohortTable, by_site: bool) -> _Units:
    if by_site:
        refuse_without_site(table.rows)
    unit_of_patient = _linked(table.rows) if by_site else {folded(row.patient_id): None for row in table.rows}
    # The first spelling names the patient, so that a table that spells all alike has the names that it shows.
    spelling: dict[str, str] = {}
    for row in table.rows:
        key = folded(row.patient_id)
        spelling[key] = min(row.patient_id, spelling.get(key, row.patient_id))
    name_of = {patient: unit or spelling[patient] for patient, unit in unit_of_patient.items()}
    classes_of: defaultdict[str, set[int]] = defaultdict(set)
    for row in table.rows:
        classes_of[folded(row.patient_id)].add(table.class_number(row.slide_id))
    counts = {name: np.zeros(len(table.classes)) for name in name_of.values()}
    for patient, classes in classes_of.items():
        counts[name_of[patient]][list(classes)] += 1
    return _Units({row.slide_id: name_of[folded(row.patient_id)] for row in table.rows}, counts)


def _linked(rows: Sequence[SlideRow]) -> dict[str, str]:
    """Unit of each patient where sites stay whole: its site, or all sites that patients tie together."""
    patients = sorted({folded(row.patient_id) for row in rows})
    sites = sorted({folded(row.site or "") for row in rows})
    patient_number = {patient: number for number, patient in enumerate(patients)}
    site_number = {site: len(patients) + number for number, site in enumerate(sites)}
    edges = np.array([(patient_number[folded(row.patient_id)], site_number[folded(row.site or "")]) for row in rows])
    size = len(patients) + len(sites)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(size, size))
    part_of = connected_components(graph, directed=False)[1]
    name = {int(part_of[number]): site for site, number in reversed(site_number.items())}  # its first site
    return {patient: name[int(part_of[number])] for patient, number in patient_number.items()}


def _kfold(counts: Mapping[str, np.ndarray], cfg: Cohort) -> tuple[list[dict[str, str]], list[list[dict[str, str]]]]:
    """Sides of the units for each fold, and for each inner fold of each fold."""
    seed, num = cfg.split_seed, cfg.folds
    test_of = _deal(counts, {str(number): 1 / num for number in range(num)}, f"{seed} folds")
    shares = _shares(cfg, test_fraction=1 / num)
    del shares["test"]
    outer, inner = [], []
    for number in range(num):
        rest = {unit: counts[unit] for unit in counts if test_of[unit] != str(number)}
        sides = _deal(rest, shares, f"{seed} fold {number}")
        outer.append({unit: sides.get(unit, "test") for unit in counts})
        part_of = _deal(rest, {str(part): 1 / num for part in range(num)}, f"{seed} inner folds of {number}")
        parts = [{unit: "val" if part == str(n) else "train" for unit, part in part_of.items()} for n in range(num)]
        inner.append(parts)
    return outer, inner


def _shares(cfg: Cohort, test_fraction: float) -> dict[str, float]:
    train = 1 - test_fraction - cfg.val_fraction
    if train <= 1e-9:
        what = "1 / cohort.folds" if cfg.split_method == "kfold" else "cohort.test_fraction"
        raise CohortError(
            f"{what}={test_fraction:g} and cohort.val_fraction={cfg.val_fraction} leave no patient to train on; their "
            "sum must be below 1"
        )
    shares = {"train": train, "test": test_fraction, "val": cfg.val_fraction}
    return {side: shares[side] for side in _SIDES if shares[side]}


def _deal(counts: Mapping[str, np.ndarray], shares: Mapping[str, float], salt: str) -> dict[str, str]:
    """Deal units to sides so that each side gets its share of each class; of some orders the most even one."""
    if not counts:
        return {}
    total_K = np.maximum(sum(counts.values()), 1)
    share_S1 = np.array(list(shares.values()))[:, None] / sum(shares.values())
    best: tuple[tuple[int, float], dict[str, str]] | None = None
    for attempt in range(_TRIES):
        have_SK = np.zeros((len(shares), len(total_K)))
        side_of = {}
        for unit in sorted(counts, key=lambda unit: (-_size(counts[unit], f"{salt}, {attempt}", unit), unit)):
            lack_SK = 1 - have_SK / (share_S1 * total_K)
            # Of sides that lack the unit's own classes alike, the one that lacks most of all.
            need_S = (counts[unit] / total_K * lack_SK).sum(axis=1) + 1e-6 * lack_SK.mean(axis=1)
            side = int(np.argmax(need_S))
            have_SK[side] += counts[unit]
            side_of[unit] = list(shares)[side]
        uneven = (int((have_SK == 0).sum()), float(np.abs(have_SK / total_K - share_S1).max()))
        if best is None or uneven < best[0]:
            best = (uneven, side_of)
        if best[0] <= (0, _EVEN_ENOUGH):
            break
    assert best is not None
    return best[1]


def _size(count_K: np.ndarray, salt: str, unit: str) -> float:
    """Patients of a unit, shrunk by a hash: large units come early, and another seed gives another order."""
    digest = hashlib.sha256(f"{salt}\n{unit}".encode()).digest()
    return float(count_K.sum()) * (1 - _NOISE * int.from_bytes(digest[:8], "big") / 2**64)


def _ties(table: CohortTable, units: _Units) -> str:
    """That sites are not as many as they seem, if so."""
    num_sites = len({folded(row.site or "") for row in table.rows})
    if len(units.counts) == num_sites:
        return ""
    return (
        f"Patients with slides of several sites tie the {num_sites} sites together, so that {len(units.counts)} can be "
        "kept apart. "
    )


def _check_classes(folds: Folds, table: CohortTable, cfg: Cohort, remark: str) -> None:
    problems = list(_absent_classes(folds, table, cfg))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise CohortError(
            f"{folds.method}: {len(problems)} problem(s):\n{listed}\n{remark}Lower cohort.folds, change the fractions or "
            "cohort.split_seed, leave small classes out, or add slides."
        )


def _absent_classes(folds: Folds, table: CohortTable, cfg: Cohort) -> Iterator[str]:
    needed = ["train", *(["test"] if cfg.split_method == "kfold" or cfg.test_fraction else [])]
    needed += ["val"] if cfg.val_fraction else []
    for number, sides in enumerate(folds.folds):
        yield from (f"fold {number}: {problem}" for problem in _absent(sides, needed, table))
        if cfg.inner_fold is not None and folds.inner:
            for part, inner in enumerate(folds.inner[number]):
                problems = _absent(inner, ["train", "val"], table)
                yield from (f"fold {number}, inner fold {part}: {problem}" for problem in problems)


def _absent(side_of: Sides, needed: Iterable[str], table: CohortTable) -> Iterator[str]:
    for side in needed:
        labels = {table.row(slide_id).label for slide_id, its_side in side_of.items() if its_side == side}
        for label in table.classes:
            if label not in labels:
                yield f"class '{label}' is absent from {side}; {who_has(label, table)}"


def refuse_without_site(rows: Iterable[SlideRow]) -> None:
    """Refuse to keep sites apart where slides have none.

    Raises:
        CohortError: says how many, and names one.
    """
    without = [row.slide_id for row in rows if not row.site]
    if without:
        raise CohortError(
            f"cohort.preserve_sites needs a site for every slide; {len(without)} have none, for example "
            f"'{without[0]}'. Fill the column that cohort.columns.site names, or set cohort.preserve_sites=false."
        )


def who_has(label: str, table: CohortTable) -> str:
    """How many patients, of how many sites, have a class: in words, for a refusal."""
    rows = [row for row in table.rows if row.label == label]
    sites = {folded(row.site) for row in rows if row.site}
    of_sites = f" of {len(sites)} site(s)" if sites else ""
    return f"the table has {len({folded(row.patient_id) for row in rows})} patient(s) with it{of_sites}"


def _by_side(side_of: Sides) -> dict[str, Any]:
    return {side: [slide_id for slide_id, its_side in side_of.items() if its_side == side] for side in SPLITS}


def _sides_of(fold: Mapping[str, Iterable[str]]) -> dict[str, str]:
    pairs = [(str(slide_id), side) for side in SPLITS for slide_id in fold[side]]
    twice = [slide_id for slide_id, num in Counter(slide_id for slide_id, _ in pairs).items() if num > 1]
    if twice:
        raise ValueError(f"{len(twice)} slides are named more than once in a fold: {', '.join(twice[:10])}")
    return dict(pairs)
