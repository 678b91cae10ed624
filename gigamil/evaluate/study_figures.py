"""Pictures of a study: metric of each run, ROC curves of seeds with a band over patients.

Shape letters: N slides, S seeds, F points of a grid.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigamil.evaluate.figures import SHARES, roc_points
from gigamil.evaluate.style import MUTED, PALETTE, class_style, drawing
from gigamil.metrics.bootstrap import Floats, Scores, resampled_rows

_RESAMPLES = 200
_GRID = np.linspace(0, 1, 101)


def draw_folds(runs: Sequence[Mapping[str, Any]], metric: str, words: str, pooled: Scores, out_png: Path) -> None:
    """The metric of each run on its held-out slides, by fold, a colour per seed; the band is the pooled interval.

    Args:
        words: the metric for people.
    """
    folds = sorted({run["fold"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    with drawing(out_png, max(4.6, 2.0 + 0.7 * len(folds)), 4.2) as figure:
        axes = figure.add_subplot()
        whole = pooled["metrics"][metric]
        if whole["value"] is not None:
            axes.axhline(whole["value"], color=MUTED, linewidth=1, label="pooled")
        if whole["ci"] is not None:
            axes.axhspan(*whole["ci"], color=MUTED, alpha=0.15, linewidth=0)
        for number, seed in enumerate(seeds):
            shift, style = 0.16 * (number - (len(seeds) - 1) / 2), class_style(number)
            own = [run for run in runs if run["seed"] == seed]
            label: str | None = f"seed {seed}"
            for run in own:
                estimate = run["scores"]["metrics"].get(metric, {"value": None, "ci": None})
                if estimate["value"] is None:
                    continue
                place = folds.index(run["fold"]) + shift
                if estimate["ci"] is not None:
                    axes.plot([place, place], estimate["ci"], color=style["color"], linewidth=2, alpha=0.5)
                axes.plot(place, estimate["value"], "o", color=style["color"], markeredgecolor="white", label=label)
                label = None
        axes.set_xticks(range(len(folds)), [str(fold) for fold in folds])
        axes.set(xlabel="Fold", ylabel=words, xlim=(-0.6, len(folds) - 0.4))
        if metric in SHARES:
            axes.set_ylim(min(0.48, axes.get_ylim()[0]), 1.02)
        axes.grid(True, axis="y")
        axes.legend(fontsize=9)


def draw_roc_band(positive_N: NDArray[np.bool_], score_SN: Floats, patients: Sequence[str], out_png: Path) -> None:
    """ROC curves of several scores of the same slides: each, their mean, and a pointwise 95 % band over patients."""
    with drawing(out_png, 5.2, 5.0) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)), label="chance")
        if 0 < positive_N.sum() < len(positive_N):
            _, patient_N = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
            curves = []
            for row_N in resampled_rows(patient_N, _RESAMPLES, 0):
                if 0 < positive_N[row_N].sum() < len(row_N):
                    curves.append(_mean_curve(positive_N[row_N], score_SN[:, row_N]))
            if curves:
                low_F, high_F = np.percentile(np.stack(curves), [2.5, 97.5], axis=0)
                axes.fill_between(_GRID, low_F, high_F, color=PALETTE[0], alpha=0.18, linewidth=0, label="95 % band")
            if len(score_SN) > 1:
                for score_N in score_SN:
                    axes.plot(*roc_points(positive_N, score_N), color=PALETTE[0], linewidth=0.8, alpha=0.5)
            label = "mean of seeds" if len(score_SN) > 1 else "out of fold"
            axes.plot(_GRID, _mean_curve(positive_N, score_SN), color=PALETTE[0], linewidth=2, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
        axes.set_xlabel("False-positive rate (1 - specificity)")
        axes.set_ylabel("True-positive rate (sensitivity)")
        axes.grid(True)
        axes.legend(loc="lower right", fontsize=9)


def _mean_curve(positive_N: NDArray[np.bool_], score_SN: Floats) -> Floats:
    """True-positive rate at the false-positive rates of a grid, mean over scores."""
    curves = [np.interp(_GRID, *_last_of_equal(*roc_points(positive_N, score_N))) for score_N in score_SN]
    mean: Floats = np.mean(curves, axis=0)
    return mean


def _last_of_equal(false_rate: Floats, true_rate: Floats) -> tuple[Floats, Floats]:
    """Where a curve goes straight up, its upper end."""
    is_last = np.append(np.diff(false_rate) > 0, True)
    return false_rate[is_last], true_rate[is_last]
