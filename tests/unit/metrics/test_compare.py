"""DeLong's test against its definition, which compares every positive with every negative slide."""

import numpy as np
import pytest
from scipy.stats import norm

from gigamil.metrics.compare import delong


def by_definition(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """AUCs and p from the structural components of DeLong et al. 1988."""
    components = []
    for score in (a, b):
        positive, negative = score[labels == 1], score[labels == 0]
        psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        components.append((psi.mean(), psi.mean(axis=1), psi.mean(axis=0)))
    (auc_a, v10_a, v01_a), (auc_b, v10_b, v01_b) = components
    variance = np.var(v10_a - v10_b, ddof=1) / len(v10_a) + np.var(v01_a - v01_b, ddof=1) / len(v01_a)
    return auc_a, auc_b, float(2 * norm.sf(abs(auc_a - auc_b) / np.sqrt(variance)))


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.array([0, 1] * 20))
    a = rng.integers(0, 8, 40) + 2.0 * labels  # with ties
    b = rng.normal(size=40) + labels
    found = delong(labels, a, b)
    assert (found.auc_a, found.auc_b, found.p) == pytest.approx(by_definition(labels, a, b), rel=1e-9)


def test_equal_scores_do_not_differ() -> None:
    labels, score = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.6, 0.5, 0.7, 0.9])
    assert delong(labels, score, 10 * score).p == 1.0
    assert delong(np.array([0, 0, 1, 1]), np.arange(4.0), np.full(4, 0.5)).p is None, (
        "no variance, of any number of slides"
    )
    found = delong(labels, score, -score)
    assert found.auc_b == pytest.approx(1 - found.auc_a)


def test_false_alarms_come_as_often_as_they_should() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 1] * 30)
    found = [delong(labels, rng.normal(size=60) + labels, rng.normal(size=60) + labels).p for _ in range(400)]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_too_few_slides_are_refused() -> None:
    with pytest.raises(ValueError, match="1 positive and 2 negative slides"):
        delong(np.array([0, 0, 1]), np.arange(3.0), np.arange(3.0))
