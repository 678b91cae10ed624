"""Metrics against scikit-learn, and the bootstrap against one that copies rows."""

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from gigamil.errors import CohortError
from gigamil.metrics import METRIC_NAMES, auc, classification_metrics, confusion_counts


def cohort(num_slides: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels, probabilities with many ties, and patients of one to three slides; every class has slides."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), rng.integers(num_classes, size=num_slides - num_classes)])
    scores = rng.integers(1, 6, size=(num_slides, num_classes)).astype(float)
    scores[np.arange(num_slides), labels] += rng.integers(0, 4, size=num_slides)
    patients = [f"p{number}" for number in rng.integers(num_slides // 2, size=num_slides)]
    return labels, scores / scores.sum(axis=1, keepdims=True), patients


def reference(labels: np.ndarray, probs: np.ndarray) -> list[float]:
    """AUC, balanced accuracy and F1 by scikit-learn."""
    predicted = probs.argmax(axis=1)
    if probs.shape[1] == 2:
        area, average = roc_auc_score(labels, probs[:, 1]), "binary"
    else:
        area, average = roc_auc_score(labels, probs, multi_class="ovr", average="macro"), "macro"
    return [area, balanced_accuracy_score(labels, predicted), f1_score(labels, predicted, average=average)]


def test_auc_by_hand() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    assert auc([0, 0, 1, 1], np.stack([1 - scores, scores], axis=1)) == 0.75
    assert auc([0, 1], [[0.5, 0.5], [0.5, 0.5]]) == 0.5
    assert auc([1, 0], [[0.9, 0.1], [0.1, 0.9]]) == 0.0


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_scikit_learn(num_classes: int, seed: int) -> None:
    labels, probs, patients = cohort(40, num_classes, seed)
    found = classification_metrics(labels, probs, patients, num_bootstrap=100, seed=0)
    values = [found[name]["value"] for name in METRIC_NAMES]  # type: ignore[literal-required]
    np.testing.assert_allclose(values, reference(labels, probs), rtol=1e-12)
    assert auc(labels, probs) == pytest.approx(values[0], rel=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_intervals_are_those_of_copied_rows(num_classes: int) -> None:
    labels, probs, patients = cohort(24, num_classes, seed=7)
    found = classification_metrics(labels, probs, patients, num_bootstrap=200, seed=5)
    names, rng, resampled = sorted(set(patients)), np.random.default_rng(5), []
    for _ in range(200):
        drawn = [names[i] for i in rng.integers(len(names), size=len(names))]
        rows = [i for name in drawn for i, patient in enumerate(patients) if patient == name]
        if len(set(labels[rows])) == num_classes:
            resampled.append(reference(labels[rows], probs[rows]))
    assert found["num_usable"] == len(resampled)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    for number, name in enumerate(METRIC_NAMES):
        np.testing.assert_allclose(found[name]["ci"], [low[number], high[number]], rtol=1e-12)  # type: ignore[literal-required]


def test_copies_of_a_patients_slides_do_not_narrow_the_interval() -> None:
    labels, probs, _ = cohort(20, 2, seed=3)
    patients = [f"p{number}" for number in range(20)]
    once = classification_metrics(labels, probs, patients, num_bootstrap=300, seed=1)
    thrice = classification_metrics(np.tile(labels, 3), np.tile(probs, (3, 1)), patients * 3, num_bootstrap=300, seed=1)
    alone = classification_metrics(
        np.tile(labels, 3), np.tile(probs, (3, 1)), [str(i) for i in range(60)], num_bootstrap=300, seed=1
    )
    assert thrice["auc"]["ci"] == pytest.approx(once["auc"]["ci"], rel=1e-12)
    assert np.diff(alone["auc"]["ci"] or []) < 0.8 * np.diff(once["auc"]["ci"] or [])
    assert (thrice["num_slides"], thrice["num_patients"]) == (60, 20)


def test_row_order_changes_nothing_and_seeds_do() -> None:
    labels, probs, patients = cohort(30, 3, seed=2)
    order = np.random.default_rng(0).permutation(30)
    found = classification_metrics(labels, probs, patients, num_bootstrap=100, seed=4)
    shuffled = classification_metrics(
        labels[order], probs[order], [patients[i] for i in order], num_bootstrap=100, seed=4
    )
    for name in METRIC_NAMES:
        assert shuffled[name]["ci"] == pytest.approx(found[name]["ci"], rel=1e-12)  # type: ignore[literal-required]
    assert classification_metrics(labels, probs, patients, num_bootstrap=100, seed=4) == found
    assert classification_metrics(labels, probs, patients, num_bootstrap=100, seed=9)["auc"] != found["auc"]


@pytest.mark.parametrize("labels", [[], [0, 0], [0, 2]])
def test_a_class_without_slides_is_undefined_with_a_reason(labels: list[int]) -> None:
    probs = np.full((len(labels), 3), 1 / 3)
    assert auc(labels, probs) is None
    found = classification_metrics(labels, probs, ["a", "b"][: len(labels)], num_bootstrap=100, seed=0)
    for name in METRIC_NAMES:
        estimate = found[name]  # type: ignore[literal-required]
        assert (estimate["value"], estimate["ci"]) == (None, None)
        assert "no slide of class number" in estimate["reason"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_one_patient_per_class_has_a_value_but_says_what_its_interval_is_worth() -> None:
    probs = [[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.1, 0.9]]
    single = classification_metrics([0, 1, 1, 1], probs, ["a", "b", "b", "b"], num_bootstrap=400, seed=0)
    assert single["auc"]["value"] == 1.0
    # Half of the resamples of two patients hold one patient only.
    assert 0 < single["num_usable"] < 250
    assert "without width" in single["auc"]["reason"] or "no interval" in single["auc"]["reason"]
    rare = classification_metrics(
        [0] * 9 + [1, 2], np.eye(3)[[0] * 9 + [1, 2]], list("abcdefghijk"), num_bootstrap=400, seed=0
    )
    assert rare["auc"]["value"] == 1.0
    assert rare["auc"]["ci"] is None
    assert f"only {rare['num_usable']} of 400" in rare["auc"]["reason"]


@pytest.mark.parametrize(
    ("labels", "probs", "patients", "message"),
    [
        ([0, 1], [[0.5, 0.5]], ["a", "b"], r"\(2,\).*\(1, 2\)"),
        ([0, 1], [[0.5], [0.5]], ["a", "b"], "at least two classes"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], ["a", "b"], r"outside 0\.\.1: \[0, 2\]"),
        ([0, -1], [[0.5, 0.5], [0.5, 0.5]], ["a", "b"], "outside"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], ["a", "b"], r"rows \[1\] are not finite"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], ["a"], "1 patients for 2 slides"),
    ],
)
def test_wrong_input_is_named(labels: list[int], probs: list[list[float]], patients: list[str], message: str) -> None:
    with pytest.raises(CohortError, match=message):
        classification_metrics(labels, probs, patients, num_bootstrap=100, seed=0)


def test_confusion_counts_have_true_classes_in_rows() -> None:
    counts = confusion_counts([0, 0, 1, 2], [0, 1, 1, 0], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert counts.dtype == np.int64
