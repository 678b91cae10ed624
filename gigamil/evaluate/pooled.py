"""Predictions of the same slides by several runs: the folds of a study side by side, its seeds one behind the other.

Shape letters: N slides, X numbers of a target, P numbers that are predicted, S seeds.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gigamil.data.table import folded
from gigamil.errors import CohortError
from gigamil.evaluate.patients import by_patient
from gigamil.evaluate.predictions import Predictions
from gigamil.evaluate.summary import EVALUATION_FILE, read_evaluation, targets_and_values
from gigamil.evaluate.values import read_run
from gigamil.files import parse_object, replace_file
from gigamil.metrics.bootstrap import Floats, Ints, Measure, Value
from gigamil.metrics.task import measure_of
from gigamil.tasks.classification import Multiclass
from gigamil.tasks.several import Several
from gigamil.tasks.store import load_task
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Member:
    """One run of a study.

    Attributes:
        fold, seed: which, both from 0.
        folder: of the run, relative to that of the study.
        is_finished: it is evaluated, as its files say; jobs of an array need not tell each other.
        error: why it failed.
    """

    fold: int
    seed: int
    folder: str
    is_finished: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Pooled:
    """What is predicted of labelled slides that no model saw in training.

    Attributes:
        name: of the run or study.
        slide_ids: all different; of a slide that several folds predict (Monte-Carlo) with the fold behind.
        patient_ids: whose each is.
        folds: of the run that predicted it.
        target_NX: what is known.
        value_SNP: what is predicted, by each seed.
        seeds: their numbers.
        split: that the runs held out: test, or what they have of it.
        left_out: runs that are finished and not in here, for other folds of their seed are not.
    """

    name: str
    task: Task
    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    folds: tuple[int, ...]
    target_NX: Floats
    value_SNP: Floats
    seeds: tuple[int, ...] = (0,)
    split: str = "test"
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def patients(self) -> tuple[str, ...]:
        """Whose each slide is, as splits tell patients apart."""
        return tuple(map(folded, self.patient_ids))

    @property
    def num_seeds(self) -> int:
        """S."""
        return len(self.value_SNP)

    def measure(self) -> Measure:
        """Metrics of rows: of each seed by itself, and the mean over seeds; undefined if of one of them."""
        of_seeds = [measure_of(self.task, self.target_NX, value_NP) for value_NP in self.value_SNP]

        def mean(row_N: Ints) -> dict[str, Value]:
            found = [measure(row_N) for measure in of_seeds]
            return {name: _mean([values[name] for values in found]) for name in found[0]}

        return mean

    def by_patient(self) -> "Pooled | None":
        """A row per patient and fold, the mean over its slides; None if what is known of these differs."""
        rows: dict[tuple[str, int], list[int]] = {}
        for row, key in enumerate(zip(self.patients, self.folds, strict=True)):
            rows.setdefault(key, []).append(row)
        if not all(
            np.array_equal(self.target_NX[own], self.target_NX[[own[0]] * len(own)], equal_nan=True)
            for own in rows.values()
        ):
            return None
        first = self.take([own[0] for own in rows.values()])
        means = [self.value_SNP[:, own].mean(axis=1) for own in rows.values()]
        return replace(first, value_SNP=np.stack(means, axis=1))

    def take(self, rows: Sequence[int]) -> "Pooled":
        """The given slides, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            slide_ids=tuple(self.slide_ids[i] for i in rows),
            patient_ids=tuple(self.patient_ids[i] for i in rows),
            folds=tuple(self.folds[i] for i in rows),
            target_NX=self.target_NX[chosen],
            value_SNP=self.value_SNP[:, chosen],
        )


def read_pooled(folder: Path, *, of_units: bool = True) -> Pooled:
    """Held-out slides of a run (its headline split), or those of all finished folds of a study, of the seeds that have them all.

    While runs of a study are missing: of the seeds that have most folds; `left_out` names the others' runs.

    Args:
        of_units: where patients are scored (`science.bag`), a row per patient; False: always a row per slide.
    Raises:
        CohortError: there is neither; or no slide has a target, or folds have other classes.
    """
    if not (folder / STUDY_FILE).is_file():
        return _read_one(folder, folder.resolve().name, 0, of_units)
    done = [member for member in read_study(folder) if member.is_finished]
    if not done:
        raise CohortError(f"no run of the study '{folder}' is finished")
    folds_of: dict[int, set[int]] = {}
    for member in done:
        folds_of.setdefault(member.seed, set()).add(member.fold)
    most = max(folds_of.values(), key=len)
    seeds = sorted(seed for seed, folds in folds_of.items() if folds == most)
    by_seed = {
        seed: _beside([_read_one(folder / m.folder, m.folder, m.fold, of_units) for m in done if m.seed == seed])
        for seed in seeds
    }
    left_out = tuple(member.folder for member in done if member.seed not in seeds)
    return replace(_behind(folder.resolve().name, list(by_seed.values())), seeds=tuple(seeds), left_out=left_out)


def read_study(folder: Path) -> list[Member]:
    """The runs of a study.

    Raises:
        CohortError: the file is damaged.
    """
    path = folder / STUDY_FILE
    data = parse_object(
        path.read_text(encoding="utf-8"), f"'{path}'", "delete it and type the same `gigamil run` again"
    )
    try:
        members = [Member(**member) for member in data["members"]]
    except (KeyError, TypeError) as error:
        raise CohortError(f"'{path}' is no study: {error}. Delete it and type the same `gigamil run` again.") from error
    return [replace(m, is_finished=m.error is None and is_evaluated(folder / m.folder)) for m in members]


def is_evaluated(run: Path) -> bool:
    """Whether a run is trained to its end and evaluated."""
    if not (run / EVALUATION_FILE).is_file() or not (run / "run.json").is_file():
        return False
    facts = parse_object(
        (run / "run.json").read_text(encoding="utf-8"), f"'{run / 'run.json'}'", "delete the run's folder"
    )
    return facts.get("status") == "finished"


def write_study(folder: Path, members: Sequence[Member]) -> None:
    """Write study.json."""
    facts = [{name: value for name, value in vars(m).items() if name != "is_finished"} for m in members]
    text = json.dumps({"members": facts}, indent=1) + "\n"
    replace_file(folder / STUDY_FILE, text.encode())


def _read_one(run: Path, name: str, fold: int, of_units: bool) -> Pooled:
    predictions = read_run(run)
    known = predictions.labelled(predictions.headline_split)
    if not len(known):
        raise CohortError(f"'{run}': no slide of its {predictions.headline_split} split has a label")
    if of_units and (run / EVALUATION_FILE).is_file() and read_evaluation(run)["unit"] == "patient":
        known = by_patient(known) or known
    target_NX, value_NP = targets_and_values(known)
    found = load_task(run) or Multiclass(predictions.classes if isinstance(predictions, Predictions) else ())
    task, target_NX, value_NP = _first(found, target_NX, value_NP)
    folds, split = (fold,) * len(known), predictions.headline_split
    return Pooled(name, task, known.slide_ids, known.patient_ids, folds, target_NX, value_NP[None], split=split)


def _first(task: Task, target_NX: Floats, value_NP: Floats) -> tuple[Task, Floats, Floats]:
    """Of several tasks the first."""
    if not isinstance(task, Several):
        return task, target_NX, value_NP
    part = next(task.parts())
    return part.task, target_NX[:, part.targets], value_NP[:, part.values]


def _beside(folds: Sequence[Pooled]) -> Pooled:
    """All slides of the folds of one seed."""
    tasks = [fold.task for fold in folds]
    times = Counter(slide_id for fold in folds for slide_id in fold.slide_ids)
    slide_ids = tuple(
        f"{slide_id} (fold {number})" if times[slide_id] > 1 else slide_id
        for fold in folds
        for slide_id, number in zip(fold.slide_ids, fold.folds, strict=True)
    )
    task, width = _common(tasks, folds[0].value_SNP.shape[2])
    return replace(
        folds[0],
        task=task,
        slide_ids=slide_ids,
        patient_ids=tuple(patient_id for fold in folds for patient_id in fold.patient_ids),
        folds=tuple(number for fold in folds for number in fold.folds),
        target_NX=np.concatenate([fold.target_NX for fold in folds]),
        value_SNP=np.concatenate([fold.value_SNP[:, :, :width] for fold in folds], axis=1),
    )


def _common(tasks: Sequence[Task], width: int) -> tuple[Task, int]:
    """What folds have in common, and how many of their numbers: edges of time differ, but risks may be compared.

    Raises:
        CohortError: other classes, labels or numbers.
    """
    first = tasks[0]
    if all(task == first for task in tasks):
        return first, width
    if all(isinstance(task, DiscreteSurvival | Cox) for task in tasks):
        return Cox(), 1
    if any(type(task) is not type(first) or task.predicted_names != first.predicted_names for task in tasks):
        raise CohortError("runs that predict other things cannot be put side by side: are these folds of one study?")
    return first, width  # weights of classes, and units of numbers, are of each fold


def _behind(name: str, seeds: Sequence[Pooled]) -> Pooled:
    """The slides that all seeds predict."""
    rows = [{slide_id: i for i, slide_id in enumerate(seed.slide_ids)} for seed in seeds]
    common = [slide_id for slide_id in seeds[0].slide_ids if all(slide_id in known for known in rows)]
    if not common:
        raise CohortError(f"'{name}': no slide is predicted by all seeds; let more folds end")
    width = min(seed.value_SNP.shape[2] for seed in seeds)
    first = seeds[0].take([rows[0][slide_id] for slide_id in common])
    value_SNP = np.concatenate(
        [
            seed.take([known[slide_id] for slide_id in common]).value_SNP[:, :, :width]
            for seed, known in zip(seeds, rows, strict=True)
        ]
    )
    return replace(first, name=name, task=_common([seed.task for seed in seeds], width)[0], value_SNP=value_SNP)


def _mean(values: Sequence[Value]) -> Value:
    numbers = []
    for value in values:
        if isinstance(value, str):
            return value
        numbers.append(value)
    return sum(numbers) / len(numbers)
