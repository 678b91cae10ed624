"""Metrics of classes and labels: scikit-learn's, calibration by hand, and reasons where something is undefined."""

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

from gigamil.errors import CohortError
from gigamil.metrics.classification import (
    auc,
    best_threshold,
    brier_score,
    calibration,
    checked_classes,
    class_values,
    confusion_counts,
    label_values,
)


def cohort(num_slides: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities with many ties; every class has slides."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), rng.integers(num_classes, size=num_slides - num_classes)])
    scores = rng.integers(1, 6, size=(num_slides, num_classes)).astype(float)
    scores[np.arange(num_slides), labels] += rng.integers(0, 4, size=num_slides)
    return labels, scores / scores.sum(axis=1, keepdims=True)


def test_auc_by_hand() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    assert auc([0, 0, 1, 1], np.stack([1 - scores, scores], axis=1)) == 0.75
    assert auc([0, 1], [[0.5, 0.5], [0.5, 0.5]]) == 0.5
    assert auc([1, 0], [[0.9, 0.1], [0.1, 0.9]]) == 0.0


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_scikit_learn(num_classes: int, seed: int) -> None:
    labels, probs = cohort(40, num_classes, seed)
    predicted, found = probs.argmax(axis=1), class_values(labels, probs, "abcde"[:num_classes], is_ordered=True)
    if num_classes == 2:
        area, average = roc_auc_score(labels, probs[:, 1]), "binary"
        precision, brier = average_precision_score(labels, probs[:, 1]), brier_score_loss(labels, probs[:, 1])
        assert found["brier"] == pytest.approx(brier, rel=1e-12)
    else:
        area, average = roc_auc_score(labels, probs, multi_class="ovr", average="macro"), "macro"
        precision = average_precision_score(labels[:, None] == np.arange(num_classes), probs, average="macro")
    assert found["auc"] == pytest.approx(area, rel=1e-12)
    assert auc(labels, probs) == found["auc"]
    assert found["auprc"] == pytest.approx(precision, rel=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), rel=1e-12)
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, average=average), rel=1e-12)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(labels, predicted, weights="quadratic"), rel=1e-12)


@pytest.mark.parametrize("labels", [[], [0, 0], [0, 2]])
def test_a_class_without_slides_is_undefined_with_a_reason(labels: list[int]) -> None:
    probs = np.full((len(labels), 3), 1 / 3)
    assert auc(labels, probs) is None
    found = class_values(*checked_classes(labels, probs), "abc", is_ordered=True)
    over_classes = ("auc", "auprc", "balanced_accuracy", "f1")
    assert set(found) == {*over_classes, "kappa", "brier", "ece"}
    missing = ", ".join(repr(name) for number, name in enumerate("abc") if number not in labels)
    assert all(found[name] == f"no slide of class {missing}" for name in over_classes)
    assert all((found[name] == "no slide") == (not labels) for name in ("brier", "ece", "kappa"))


def test_kappa_of_grades_of_which_one_has_no_slide() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    assert class_values(labels, np.eye(4)[labels], "abcd", is_ordered=True)["kappa"] == 1.0
    alike = class_values(np.zeros(3, dtype=np.int64), np.eye(4)[[0, 0, 0]], "abcd", is_ordered=True)
    assert alike["kappa"] == "all slides are of one class, and predicted so"
    assert alike["brier"] == 0.0


@pytest.mark.parametrize(
    ("labels", "probs", "message"),
    [
        ([0, 1], [[0.5, 0.5]], r"\(2,\).*\(1, 2\)"),
        ([0, 1], [[0.5], [0.5]], "at least two classes"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], r"outside 0\.\.1: \[0, 2\]"),
        ([0, -1], [[0.5, 0.5], [0.5, 0.5]], "outside"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], r"rows \[1\] are not finite"),
    ],
)
def test_wrong_input_is_named(labels: list[int], probs: list[list[float]], message: str) -> None:
    with pytest.raises(CohortError, match=message):
        checked_classes(labels, probs)


class TestCalibration:
    def test_by_hand(self) -> None:
        probs = np.array([0.05, 0.05, 0.55, 0.55, 1.0])
        found = calibration(np.array([0, 1, 1, 0, 1]), np.stack([1 - probs, probs], axis=1), num_bins=10)
        assert found.confidence_B == pytest.approx([0.05, 0.55, 1.0])
        assert found.share_B.tolist() == [0.5, 0.5, 1.0]
        assert found.count_B.tolist() == [2, 2, 1]
        assert found.error == pytest.approx((2 * 0.45 + 2 * 0.05) / 5)

    def test_of_more_classes_it_is_that_of_the_predicted_one(self) -> None:
        found = calibration(np.array([0, 1]), np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]), num_bins=5)
        assert (found.confidence_B.tolist(), found.share_B.tolist()) == ([0.6], [0.5])

    def test_the_brier_score_of_certainty(self) -> None:
        assert brier_score(np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]])) == 0.5
        assert brier_score(np.array([2, 1]), np.eye(3)[[0, 1]]) == 1.0  # one of two is wrong, in two classes


class TestThreshold:
    def test_it_is_that_of_the_largest_f1(self) -> None:
        rng = np.random.default_rng(0)
        labels, probs = rng.integers(0, 2, 50), rng.integers(0, 20, 50) / 20
        found = best_threshold(labels, probs)
        scored = {t: f1_score(labels, probs >= t) for t in np.unique(probs)}
        assert found is not None
        assert scored[found] == max(scored.values())
        values = class_values(labels, np.stack([1 - probs, probs], axis=1), "ab", threshold=found)
        assert values["f1_at_threshold"] == pytest.approx(max(scored.values()))

    def test_one_class_alone_has_none(self) -> None:
        assert best_threshold(np.array([1, 1]), np.array([0.1, 0.9])) is None


def test_labels_are_scored_where_they_are_known() -> None:
    nan = np.nan
    target = np.array([[1, 0, nan], [0, nan, nan], [1, 1, nan], [0, 1, 1.0], [nan, 0, nan]])
    probs = np.random.default_rng(1).random((5, 3))
    found = label_values(target, probs, ("a", "b", "c"))
    assert found["auc_a"] == roc_auc_score([1, 0, 1, 0], probs[:4, 0])
    rows = [0, 2, 3, 4]
    assert found["auprc_b"] == average_precision_score([0, 1, 1, 0], probs[rows, 1])
    assert found["auc_c"] == "of label 'c' all 1 known slides are alike"
    assert found["auc"] == pytest.approx((found["auc_a"] + found["auc_b"]) / 2)  # type: ignore[operator]
    assert label_values(target[:, 2:], probs[:, 2:], ("c",))["auc"] == "no label is defined"


def test_confusion_counts_have_true_classes_in_rows() -> None:
    counts = confusion_counts([0, 0, 1, 2], [0, 1, 1, 0], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert counts.dtype == np.int64
