"""Metrics of numbers, by scikit-learn and SciPy.

Shape letters: N slides.
"""

import numpy as np

from gigamil.metrics.bootstrap import Floats, Value


def number_values(target_N: Floats, value_N: Floats) -> dict[str, Value]:
    """Mean absolute and root mean squared error, R2, Pearson's and Spearman's correlation, over slides whose target is known.

    Args:
        target_N: NaN where not known.
        value_N: predicted.
    """
    known_N = np.isfinite(target_N)
    target_N, value_N = target_N[known_N], value_N[known_N]
    if not len(target_N):
        return dict.fromkeys(("mae", "rmse", "r2", "pearson", "spearman"), "no slide with a known target")
    from scipy.stats import pearsonr, spearmanr  # here: a second to import
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    values: dict[str, Value] = {
        "mae": float(mean_absolute_error(target_N, value_N)),
        "rmse": float(root_mean_squared_error(target_N, value_N)),
        "r2": "all targets are equal",
        "pearson": "all targets, or all predictions, are equal",
        "spearman": "all targets, or all predictions, are equal",
    }
    if np.ptp(target_N) > 0:
        values["r2"] = float(r2_score(target_N, value_N))
        if np.ptp(value_N) > 0:
            values["pearson"] = float(pearsonr(target_N, value_N).statistic)
            values["spearman"] = float(spearmanr(target_N, value_N).statistic)
    return values
