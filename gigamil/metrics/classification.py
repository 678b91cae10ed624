"""Metrics of classes and labels, by scikit-learn.

Shape letters: N slides, K classes, L labels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gigamil.errors import CohortError
from gigamil.metrics.bootstrap import Floats, Ints, Value

CALIBRATION_BINS = 15  # of equal width, as in Guo et al. 2017


class Calibration(NamedTuple):
    """How often what is said with some confidence is true; bins without a slide are left out.

    Attributes:
        confidence_B, share_B: mean of what was said in a bin, and share of it that was true.
        count_B: slides.
    """

    confidence_B: Floats
    share_B: Floats
    count_B: Ints

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance between the two, by slides. Source: Guo et al. 2017, arXiv:1706.04599."""
        return float((self.count_B * np.abs(self.confidence_B - self.share_B)).sum() / self.count_B.sum())


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
    labels_N, probs_NK = checked_classes(labels_N, probs_NK)
    if _empty_classes(labels_N, probs_NK.shape[1]):
        return None
    return _mean_over_classes("roc_auc_score", labels_N, probs_NK)


def class_values(
    labels_N: Ints,
    probs_NK: Floats,
    classes: Sequence[str],
    *,
    is_ordered: bool = False,
    threshold: float | None = None,
) -> dict[str, Value]:
    """AUC, average precision, balanced accuracy, F1, Brier score, calibration error; of ordered classes quadratic kappa, too.

    The prediction of a slide is its most probable class (the first of equals). Binary: AUC, average precision, F1 and
    calibration are those of the last class. More classes: means of one-versus-rest, and calibration of the predicted class.
    Where a class has no slide, what is a mean over classes is not defined; Brier score, calibration and kappa are.

    Args:
        labels_N, probs_NK: checked (`checked_classes`).
        classes: their names, for reasons.
        is_ordered: classes have an order; adds `kappa`.
        threshold: of a binary task: adds `f1_at_threshold`, where a slide is positive from this probability on.
    """
    from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score  # here: a second to import

    num_classes = probs_NK.shape[1]
    missing, predicted_N = _empty_classes(labels_N, num_classes), probs_NK.argmax(axis=1)
    names = ["auc", "auprc", "balanced_accuracy", "f1", *(["f1_at_threshold"] if threshold is not None else [])]
    values: dict[str, Value] = {}
    if missing:
        values |= dict.fromkeys(names, f"no slide of class {', '.join(repr(classes[k]) for k in missing)}")
    else:
        shown = _reported_classes(num_classes)
        values["auc"] = _mean_over_classes("roc_auc_score", labels_N, probs_NK)
        values["auprc"] = _mean_over_classes("average_precision_score", labels_N, probs_NK)
        values["balanced_accuracy"] = float(balanced_accuracy_score(labels_N, predicted_N))
        values["f1"] = float(f1_score(labels_N, predicted_N, labels=shown, average="macro", zero_division=0.0))
        if threshold is not None:
            values["f1_at_threshold"] = float(f1_score(labels_N, probs_NK[:, 1] >= threshold, zero_division=0.0))
    if not len(labels_N):
        return values | dict.fromkeys(["brier", "ece", *(["kappa"] if is_ordered else [])], "no slide")
    values |= {"brier": brier_score(labels_N, probs_NK), "ece": calibration(labels_N, probs_NK).error}
    if is_ordered:
        if len(np.union1d(labels_N, predicted_N)) < 2:
            values["kappa"] = "all slides are of one class, and predicted so"
        else:
            kappa = cohen_kappa_score(labels_N, predicted_N, labels=np.arange(num_classes), weights="quadratic")
            values["kappa"] = float(kappa)
    return values


def label_values(target_NL: Floats, probs_NL: Floats, names: Sequence[str]) -> dict[str, Value]:
    """AUC and average precision of each label over the slides of which it is known, and their means over labels.

    Args:
        target_NL: 1, 0, or NaN where not known.
        probs_NL: probability of each label.
        names: of the labels.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    values: dict[str, Value] = {}
    for kind, function in (("auc", roc_auc_score), ("auprc", average_precision_score)):
        for column, name in enumerate(names):
            known_N = np.isfinite(target_NL[:, column])
            true_N = target_NL[known_N, column] > 0
            if not 0 < true_N.sum() < len(true_N):
                values[f"{kind}_{name}"] = f"of label '{name}' all {len(true_N)} known slides are alike"
            else:
                values[f"{kind}_{name}"] = float(function(true_N, probs_NL[known_N, column]))
    for kind in ("auc", "auprc"):
        defined = [values[f"{kind}_{name}"] for name in names]
        numbers = [value for value in defined if not isinstance(value, str)]
        values[kind] = float(np.mean(numbers)) if numbers else "no label is defined"
    return values


def brier_score(labels_N: Ints, probs_NK: Floats) -> float:
    """Mean squared distance between probabilities and truth: of the positive class of two, else summed over classes."""
    true_NK = labels_N[:, None] == np.arange(probs_NK.shape[1])
    squared_NK = np.square(probs_NK - true_NK)
    return float(squared_NK[:, 1].mean() if probs_NK.shape[1] == 2 else squared_NK.sum(axis=1).mean())


def calibration(labels_N: Ints, probs_NK: Floats, num_bins: int = CALIBRATION_BINS) -> Calibration:
    """Confidence and truth in bins of confidence: of the positive class of two, else of the predicted class."""
    if probs_NK.shape[1] == 2:
        confidence_N, is_true_N = probs_NK[:, 1], labels_N == 1
    else:
        confidence_N, is_true_N = probs_NK.max(axis=1), probs_NK.argmax(axis=1) == labels_N
    bin_N = np.minimum((confidence_N * num_bins).astype(np.int64), num_bins - 1)
    count_B = np.bincount(bin_N, minlength=num_bins)
    used = count_B > 0
    said_B, true_B = (np.bincount(bin_N, weights, num_bins)[used] for weights in (confidence_N, is_true_N))
    return Calibration(said_B / count_B[used], true_B / count_B[used], count_B[used])


def best_threshold(labels_N: Ints, probs_N: Floats) -> float | None:
    """Probability from which on a slide is called positive, so that F1 is largest; of equals the highest. None without both classes."""
    if not 0 < (labels_N == 1).sum() < len(labels_N):
        return None
    from sklearn.metrics import precision_recall_curve

    precision_T, recall_T, threshold_T = precision_recall_curve(labels_N == 1, probs_N)
    sums_T = precision_T + recall_T
    f1_T = np.divide(2 * precision_T * recall_T, sums_T, out=np.zeros_like(sums_T), where=sums_T > 0)[:-1]
    return float(threshold_T[np.flatnonzero(f1_T == f1_T.max())[-1]])


def confusion_counts(labels_N: ArrayLike, predicted_N: ArrayLike, num_classes: int) -> Ints:
    """Count slides by true class (rows) and predicted class (columns), [K, K]."""
    labels_N, predicted_N = np.asarray(labels_N, dtype=np.int64), np.asarray(predicted_N, dtype=np.int64)
    from sklearn.metrics import confusion_matrix

    counts_KK: Ints = confusion_matrix(labels_N, predicted_N, labels=np.arange(num_classes))
    return counts_KK


def checked_classes(labels: ArrayLike, probs: ArrayLike) -> tuple[Ints, Floats]:
    """Labels and probabilities as arrays.

    Raises:
        CohortError: shapes that do not fit, a label out of range, or a score that is not finite.
    """
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


def _mean_over_classes(function: str, labels_N: Ints, probs_NK: Floats) -> float:
    import sklearn.metrics  # here: it takes a second, and `gigamil --help` needs none of it

    score = getattr(sklearn.metrics, function)
    return float(np.mean([score(labels_N == k, probs_NK[:, k]) for k in _reported_classes(probs_NK.shape[1])]))


def _reported_classes(num_classes: int) -> list[int]:
    """Classes that a one-versus-rest metric is averaged over: of two, only the positive (last) one."""
    return [1] if num_classes == 2 else list(range(num_classes))


def _empty_classes(labels_N: Ints, num_classes: int) -> list[int]:
    return np.flatnonzero(np.bincount(labels_N, minlength=num_classes) == 0).tolist()
