"""Two models on the same slides: is the difference of their AUCs more than chance?

Shape letters: M positive, N negative slides.
"""

from typing import NamedTuple

import numpy as np

from gigamil.metrics.bootstrap import Floats, Ints


class Delong(NamedTuple):
    """Two AUCs, the standard error of their difference, and the two-sided p that there is none."""

    auc_a: float
    auc_b: float
    standard_error: float
    p: float | None


def delong(labels_N: Ints, score_a_N: Floats, score_b_N: Floats) -> Delong:
    """DeLong's test for the AUCs of two scores of the same slides, which takes into account that they go together.

    It takes slides for independent; where patients have several, `bootstrap.difference` is the one to read.

    Args:
        labels_N: 1 of positive slides, 0 of the others; two of each at least.
        score_a_N, score_b_N: more means positive.
    Returns:
        `p` is None where the AUCs differ and their difference has no variance, of a few slides: it would be 0 for any number of them.
    Raises:
        ValueError: less than two slides of a class.
    Cost: sorting.
    Source: DeLong, DeLong and Clarke-Pearson 1988; Sun and Xu 2014, doi:10.1109/LSP.2014.2337313 (by ranks).
    """
    from scipy.stats import norm, rankdata

    positive_N = labels_N == 1
    num_positive, num_negative = int(positive_N.sum()), int((~positive_N).sum())
    if min(num_positive, num_negative) < 2:
        raise ValueError(f"{num_positive} positive and {num_negative} negative slides: two of each are needed")
    areas, over_positive, over_negative = [], [], []
    for score_N in (score_a_N, score_b_N):
        rank_N = rankdata(score_N)
        # Of each positive the share of negatives below it, of each negative the share of positives above it.
        below_M = (rank_N[positive_N] - rankdata(score_N[positive_N])) / num_negative
        above_N = 1 - (rank_N[~positive_N] - rankdata(score_N[~positive_N])) / num_positive
        areas.append(float(below_M.mean()))
        over_positive.append(below_M)
        over_negative.append(above_N)
    covariance_22 = np.cov(over_positive) / num_positive + np.cov(over_negative) / num_negative
    variance = float(covariance_22[0, 0] + covariance_22[1, 1] - 2 * covariance_22[0, 1])
    error = float(np.sqrt(max(0.0, variance)))
    gap = areas[0] - areas[1]
    if error < 1e-12:  # both order all slides alike; or one is right of all and the other does not tell any apart
        return Delong(areas[0], areas[1], 0.0, 1.0 if abs(gap) < 1e-12 else None)
    return Delong(areas[0], areas[1], error, float(2 * norm.sf(abs(gap) / error)))
