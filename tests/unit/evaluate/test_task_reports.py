"""Tasks without classes, and several at once: reports of runs and studies, and comparisons, whatever is not known of a slide."""

import json
from pathlib import Path

import numpy as np
import pytest

from gigamil.evaluate.comparison import compare_runs
from gigamil.evaluate.pooled import Member, write_study
from gigamil.evaluate.predictions import FILE_NAME
from gigamil.evaluate.report import evaluate_run
from gigamil.evaluate.study_report import evaluate_study, write_study_report
from gigamil.evaluate.values import Values, read_run, write_values
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.store import save_task
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task

NUM = 16  # slides, two of a patient; the first half is validation
SURVIVAL = DiscreteSurvival((2.0, 4.0))
TASKS: dict[str, tuple[Task, str, set[str]]] = {
    "labels": (Multilabel(("x", "y")), "auc", {"roc.png"}),
    "numbers": (Regression(("age", "size"), (0.0, 0.0), (1.0, 1.0)), "pearson_age", {"scatter.png"}),
    "bins": (SURVIVAL, "c_index", {"survival.png"}),
    "cox": (Cox(), "c_index", {"survival.png"}),
    "binary first": (
        Several(("subtype", "os"), (Multiclass(("a", "b")), SURVIVAL), (1.0, 0.5)),
        "auc",
        {"subtype_roc.png", "subtype_confusion.png", "subtype_calibration.png", "os_survival.png"},
    ),
    "survival first": (
        Several(("os", "grade"), (Cox(), Ordinal(("1", "2", "3"))), (1.0, 1.0)),
        "c_index",
        {"os_survival.png", "grade_roc.png", "grade_confusion.png", "grade_calibration.png"},
    ),
}


def target_of(task: Task, slide: int) -> list[float]:
    """Alike for the slides of a patient."""
    patient = slide // 2
    if isinstance(task, Several):
        return [number for one in task.tasks for number in target_of(one, slide)]
    if isinstance(task, Cox | DiscreteSurvival):
        return [1.0 + patient % 5, float(patient % 3 != 0)]
    if isinstance(task, Multiclass | Ordinal):
        return [float(patient % len(task.classes))]
    if isinstance(task, Multilabel):
        return [float(patient % 2), float(patient // 2 % 2)]
    return [10.0 + patient, 3.0 * patient**2]


def values_of(task: Task, splits: tuple[str, ...], seed: int = 0) -> Values:
    """Predictions by chance; of some patients nothing is known, or not the last task."""
    target_NX = np.array([target_of(task, slide) for slide in range(NUM)])
    target_NX[[2, 3]] = np.nan
    parts = [part.targets for part in task.parts()] if isinstance(task, Several) else [slice(0, task.num_targets)]
    target_NX[12:14, parts[-1]] = np.nan
    value_NP = np.random.default_rng(seed).random((NUM, len(task.predicted_names)))
    ids, patients = (
        tuple(f"{kind}{number // step:02d}" for number in range(NUM)) for kind, step in (("s", 1), ("p", 2))
    )
    return Values(ids, patients, splits, task, target_NX, value_NP)


def write_run(run: Path, values: Values) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_values(run / FILE_NAME, values)
    save_task(values.task, run)
    (run / "run.json").write_text('{"status": "finished"}')


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_and_figure_is_in_the_report(name: str, tmp_path: Path) -> None:
    task, headline, figures = TASKS[name]
    values = values_of(task, ("val",) * (NUM // 2) + ("test",) * (NUM // 2))
    write_run(tmp_path, values)
    again = read_run(tmp_path)
    assert isinstance(again, Values)
    np.testing.assert_array_equal(again.target_NX, values.target_NX)
    np.testing.assert_array_equal(again.value_NP, values.value_NP)
    found = evaluate_run(tmp_path, num_bootstrap=100, seed=0)
    assert found == json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["headline_split"], found["headline_metric"]) == ("test", headline)
    assert found["splits"]["test"]["metrics"][headline]["value"] is not None
    assert found["patients"].keys() == {"val", "test"}
    assert set(found["figures"]) == figures
    report = (tmp_path / "report.html").read_text()
    assert report.count("<img") == len(figures)
    assert ("a slide is b from" in report) == (name == "binary first"), "the threshold chosen on validation"
    assert (found["p_log_rank"] is not None) == (name in ("bins", "cox"))


@pytest.mark.parametrize("name", TASKS)
def test_studies_and_comparisons_have_the_first_task(name: str, tmp_path: Path) -> None:
    task, headline, _ = TASKS[name]
    for study in range(2):
        members = []
        for fold in range(2):
            member = Member(fold, 0, f"fold{fold}_seed0")
            run = tmp_path / f"study{study}" / member.folder
            values = values_of(task, ("test",) * NUM, seed=study)
            write_run(run, values.take(range(fold * NUM // 2, (fold + 1) * NUM // 2)))
            evaluate_run(run, num_bootstrap=100, seed=0)
            members.append(member)
        write_study(tmp_path / f"study{study}", members)
    study_folder = tmp_path / "study0"
    found = evaluate_study(study_folder, num_bootstrap=100, seed=0)
    assert found["metric"] == headline
    assert found["pooled"]["metrics"][headline]["value"] is not None
    assert found["patients"] is not None
    known = NUM - 2 if isinstance(task, Several) else NUM - 4
    assert found["pooled"]["num_slides"] == known
    drawn = sorted(path.name for path in (study_folder / "figures").iterdir())
    assert write_study_report(study_folder).read_text().count("<img") == len(drawn) > 1
    lines = (study_folder / "predictions_out_of_fold.csv").read_text().splitlines()
    assert len(lines) == 1 + known
    compared = compare_runs([study_folder, tmp_path / "study1"], tmp_path / "both", num_bootstrap=100)
    assert (compared["metric"], compared["num_slides"]) == (headline, known)
    gap = compared["runs"][1]["minus_first"]
    assert gap is not None
    assert gap["metrics"][headline]["ci"] is not None
