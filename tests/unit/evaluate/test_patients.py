"""Patient level: the mean over slides counts once for each patient, in runs and in studies."""

from pathlib import Path

import numpy as np
import pytest

from gigamil.evaluate.patients import by_patient
from gigamil.evaluate.pooled import Member, read_pooled, write_study
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.evaluate.report import evaluate_run
from gigamil.evaluate.study_report import evaluate_study, gallery, write_study_report
from gigamil.evaluate.values import Values
from gigamil.tasks.regression import Regression

PATIENTS = ("a", "b", "A ", "c", "d", "b")  # "A " is a
LABELS = ("x", "y", "x", "x", "y", "y")
PROBS = (0.1, 0.6, 0.5, 0.7, 0.9, 0.2)  # of y
MEANS = {"a": 0.3, "b": 0.4, "c": 0.7, "d": 0.9}


def predictions(labels: tuple[str, ...] = LABELS, shift: float = 0.0) -> Predictions:
    p_N = np.asarray(PROBS) - shift
    ids = tuple(f"s{i}" for i in range(len(PATIENTS)))
    return Predictions(ids, PATIENTS, labels, ("test",) * len(ids), ("x", "y"), np.stack([1 - p_N, p_N], axis=1))


def write_run(folder: Path, unit: str, shift: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    write_predictions(folder / FILE_NAME, predictions(shift=shift))
    evaluate_run(folder, num_bootstrap=100, seed=0, unit=unit)
    (folder / "run.json").write_text('{"status": "finished"}')
    return folder


def test_the_mean_over_slides() -> None:
    found = by_patient(predictions())
    assert isinstance(found, Predictions)
    assert dict(zip(found.slide_ids, found.probs_NK[:, 1], strict=True)) == pytest.approx(MEANS)
    assert found.labels == ("x", "y", "x", "y")
    assert by_patient(predictions(labels=("y", *LABELS[1:]))) is None, "slides of a with two labels"


def test_numbers_with_gaps() -> None:
    task = Regression(("age", "size"), "huber", (0.0, 0.0), (1.0, 1.0))
    target_NX = np.array([[1, np.nan], [1, np.nan], [2, 5.0]])
    values = Values(("s0", "s1", "s2"), ("a", "a", "b"), ("test",) * 3, task, target_NX, np.arange(6.0).reshape(3, 2))
    found = by_patient(values)
    assert isinstance(found, Values)
    np.testing.assert_array_equal(found.value_NP, [[1, 2], [4, 5]])
    np.testing.assert_array_equal(found.target_NX, target_NX[[0, 2]])
    target_NX[1, 1] = 3
    assert by_patient(values) is None


def test_both_levels_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "slide")
    found = evaluate_run(tmp_path / "run", num_bootstrap=100, seed=0)
    # Of 3 x 3 pairs of slides 6 are in order (0.2 and 0.6 are below some of x), of 2 x 2 pairs of patients 3.
    assert found["splits"]["test"]["metrics"]["auc"]["value"] == pytest.approx(6 / 9)
    assert found["patients"]["test"]["metrics"]["auc"]["value"] == pytest.approx(3 / 4)
    assert found["patients"]["test"]["num_slides"] == 4
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out (test), by patient" in report
    assert "on 6 slides of 4 patients" in report


def test_where_patients_are_scored_a_slide_is_no_row(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "patient")
    found = evaluate_run(tmp_path / "run", num_bootstrap=100, seed=0, unit="patient")
    assert found["unit"] == "patient"
    assert found["patients"] == {}
    assert found["splits"]["test"]["metrics"]["auc"]["value"] == pytest.approx(3 / 4)
    assert "on 4 patients" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("unit", "rows", "by_patient_auc"), [("slide", 6, 3 / 4), ("patient", 4, None)])
def test_both_levels_of_a_study(tmp_path: Path, unit: str, rows: int, by_patient_auc: float | None) -> None:
    study = tmp_path / "my" / "study"
    for seed in range(2):
        write_run(study / f"fold0_seed{seed}", unit, shift=0.01 * seed)
    write_study(study, [Member(0, seed, f"fold0_seed{seed}") for seed in range(2)])
    assert len(read_pooled(study)) == rows
    found = evaluate_study(study, num_bootstrap=100, seed=0)
    assert found["pooled"]["num_slides"] == rows
    if by_patient_auc is None:
        assert found["patients"] is None
    else:
        assert found["patients"] is not None
        assert found["patients"]["metrics"]["auc"]["value"] == pytest.approx(by_patient_auc)
    report = write_study_report(study).read_text()
    assert "<h1>my: cross-validation</h1>" in report
    assert ("by patient" in report) == (by_patient_auc is not None)
    assert {one.slide_id for one in gallery(study)} <= {f"s{i}" for i in range(6)}, "heatmaps are of slides"
