"""Classification metrics of slides, with intervals that respect patients.

Slides of one patient resemble each other, so a bootstrap over slides would be too sure of itself: patients are drawn,
and a patient brings all of its slides. A resample is one weight per slide (how often its patient was drawn), which the
functions of scikit-learn take.

Shape letters: N slides, K classes, P patients, M metrics.
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigamil.errors import CohortError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METRIC_NAMES = ("auc", "balanced_accuracy", "f1")
INTERVAL_PERCENT = 95.0
# An interval out of fewer resamples than this share would describe the lucky resamples, not the cohort.
MIN_USABLE_RESAMPLES = 0.5


class Estimate(TypedDict):
    """A metric and its interval; `reason` says why one of them is None, or why it should be read with care."""

    value: float | None
    ci: list[float] | None
    reason: NotRequired[str]


class Metrics(TypedDict):
    """What `classification_metrics` returns; every value is plain JSON."""

    num_slides: int
    num_patients: int
    num_bootstrap: int
    num_usable: int
    auc: Estimate
    balanced_accuracy: Estimate
    f1: Estimate


def auc(labels_N: ArrayLike, probs_NK: ArrayLike) -> float | None:
    """Area under the ROC curve of a set of slides, as validation asks for it each epoch.

    Args:
        labels_N: class numbers, 0 to K-1.
        probs_NK: probability (or any score) per class.
    Returns:
        Binary: the last class is the positive one. More classes: the mean of one-versus-rest over classes. Ties count
        one half. None where it is undefined, because a class has no slide.
    Raises:
        CohortError: shapes that do not fit, a label out of range, or a score that is not finite.
    Cost: one sort per class.
    """
    labels_N, probs_NK = _checked(labels_N, probs_NK)
    if _empty_classes(labels_N, probs_NK.shape[1]):
        return None
    return _macro_auc(labels_N, probs_NK, np.ones(len(labels_N)))


def classification_metrics(
    labels_N: ArrayLike, probs_NK: ArrayLike, patients: Sequence[str], *, num_bootstrap: int, seed: int
) -> Metrics:
    """AUC, balanced accuracy and F1 with 95 % percentile intervals from a bootstrap over patients.

    The prediction of a slide is its most probable class (the first of equals). Binary: AUC and F1 are those of the last
    class. More classes: means over classes. Resamples in which a class has no slide are left out and not replaced;
    `num_usable` counts the others. The order of the rows does not matter.

    Args:
        labels_N: class numbers, 0 to K-1.
        probs_NK: probability per class.
        patients: whose each slide is; slides of one patient are drawn together.
        num_bootstrap: resamples.
        seed: of the resampling.
    Returns:
        Per metric `value` and `ci` ([low, high]); None with a `reason` where undefined, never NaN.
    Raises:
        CohortError: shapes that do not fit, a label out of range, or a score that is not finite.
    Cost: about 3 ms per resample of some tens of slides.
    Source: Efron 1979 (bootstrap); Field and Welsh 2007 (resampling of clusters). Test: unit/test_metrics.py
    """
    labels_N, probs_NK = _checked(labels_N, probs_NK)
    if len(patients) != len(labels_N):
        raise CohortError(f"{len(patients)} patients for {len(labels_N)} slides: give one patient id per slide")
    names, patient_N = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    estimates, num_usable = _estimates(labels_N, probs_NK, patient_N, num_bootstrap, seed)
    return Metrics(
        num_slides=len(labels_N),
        num_patients=len(names),
        num_bootstrap=num_bootstrap,
        num_usable=num_usable,
        auc=estimates[0],
        balanced_accuracy=estimates[1],
        f1=estimates[2],
    )


def confusion_counts(labels_N: ArrayLike, predicted_N: ArrayLike, num_classes: int) -> Ints:
    """Count slides by true class (rows) and predicted class (columns), [K, K]."""
    labels_N, predicted_N = np.asarray(labels_N, dtype=np.int64), np.asarray(predicted_N, dtype=np.int64)
    from sklearn.metrics import confusion_matrix

    counts_KK: Ints = confusion_matrix(labels_N, predicted_N, labels=np.arange(num_classes))
    return counts_KK


def _estimates(
    labels_N: Ints, probs_NK: Floats, patient_N: Ints, num_bootstrap: int, seed: int
) -> tuple[list[Estimate], int]:
    """One estimate per name of METRIC_NAMES, and the number of usable resamples."""
    missing = _empty_classes(labels_N, probs_NK.shape[1])
    if missing:
        reason = f"undefined: no slide of class number {', '.join(map(str, missing))}"
        return [Estimate(value=None, ci=None, reason=reason) for _ in METRIC_NAMES], 0
    value_M = _all_metrics(labels_N, probs_NK, np.ones(len(labels_N)))
    resampled = _bootstrap(labels_N, probs_NK, patient_N, num_bootstrap, seed)
    estimates = [_estimate(value, column, num_bootstrap) for value, column in zip(value_M, resampled.T, strict=True)]
    return estimates, len(resampled)


def _bootstrap(labels_N: Ints, probs_NK: Floats, patient_N: Ints, num_bootstrap: int, seed: int) -> Floats:
    """Metrics of the resamples in which every class has a slide, [usable, M]."""
    rng = np.random.default_rng(seed)
    num_patients, num_classes = int(patient_N.max()) + 1, probs_NK.shape[1]
    usable = []
    for _ in range(num_bootstrap):
        times_drawn_P = np.bincount(rng.integers(num_patients, size=num_patients), minlength=num_patients)
        weight_N = times_drawn_P[patient_N].astype(np.float64)
        drawn = np.flatnonzero(weight_N)
        if not _empty_classes(labels_N[drawn], num_classes):
            usable.append(_all_metrics(labels_N[drawn], probs_NK[drawn], weight_N[drawn]))
    return np.array(usable).reshape(-1, len(METRIC_NAMES))


def _estimate(value: float, resampled: Floats, num_bootstrap: int) -> Estimate:
    if not len(resampled) or len(resampled) < MIN_USABLE_RESAMPLES * num_bootstrap:
        reason = (
            f"no interval: only {len(resampled)} of {num_bootstrap} resamples of patients hold every class; "
            "more patients are needed"
        )
        return Estimate(value=float(value), ci=None, reason=reason)
    tail = (100.0 - INTERVAL_PERCENT) / 2
    # Weighted sums end in 0.9999999999999999 where 1 is meant.
    low, high = (round(float(edge), 15) for edge in np.percentile(resampled, [tail, 100.0 - tail]))
    estimate = Estimate(value=float(value), ci=[low, high])
    if low == high:
        estimate["reason"] = (
            "an interval without width means that no resample of these patients changed the value, "
            "not that new patients would not"
        )
    return estimate


def _all_metrics(labels_N: Ints, probs_NK: Floats, weight_N: Floats) -> Floats:
    """In the order of METRIC_NAMES; every class must have a slide."""
    from sklearn.metrics import balanced_accuracy_score, f1_score

    predicted_N, classes = probs_NK.argmax(axis=1), _reported_classes(probs_NK.shape[1])
    accuracy = balanced_accuracy_score(labels_N, predicted_N, sample_weight=weight_N)
    f1 = f1_score(labels_N, predicted_N, labels=classes, average="macro", sample_weight=weight_N, zero_division=0.0)
    return np.array([_macro_auc(labels_N, probs_NK, weight_N), accuracy, f1])


def _macro_auc(labels_N: Ints, probs_NK: Floats, weight_N: Floats) -> float:
    from sklearn.metrics import (
        roc_auc_score,
    )  # here: it takes a second to import, and `gigamil --help` needs none of it

    areas = [
        roc_auc_score(labels_N == k, probs_NK[:, k], sample_weight=weight_N)
        for k in _reported_classes(probs_NK.shape[1])
    ]
    return float(np.mean(areas))


def _reported_classes(num_classes: int) -> list[int]:
    """Classes that a one-versus-rest metric is averaged over: of two, only the positive (last) one."""
    return [1] if num_classes == 2 else list(range(num_classes))


def _empty_classes(labels_N: Ints, num_classes: int) -> list[int]:
    return np.flatnonzero(np.bincount(labels_N, minlength=num_classes) == 0).tolist()


def _checked(labels: ArrayLike, probs: ArrayLike) -> tuple[Ints, Floats]:
    labels_N, probs_NK = np.asarray(labels), np.asarray(probs, dtype=np.float64)
    if probs_NK.ndim != 2 or probs_NK.shape[1] < 2 or labels_N.shape != probs_NK.shape[:1]:
        raise CohortError(
            f"labels have shape {labels_N.shape} and probabilities {probs_NK.shape}: "
            "they must be [slides] and [slides, classes] with at least two classes"
        )
    labels_N = labels_N.astype(np.int64)
    if len(labels_N) and not (labels_N.min() >= 0 and labels_N.max() < probs_NK.shape[1]):
        raise CohortError(f"a label is outside 0..{probs_NK.shape[1] - 1}: {sorted(set(labels_N.tolist()))}")
    if not np.isfinite(probs_NK).all():
        rows = np.flatnonzero(~np.isfinite(probs_NK).all(axis=1)).tolist()
        raise CohortError(f"probabilities of rows {rows[:10]} are not finite: the model that made them has diverged")
    return labels_N, probs_NK
