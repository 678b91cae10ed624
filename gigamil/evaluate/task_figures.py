"""Pictures of a task's predictions as PNG: calibration, curves of labels, scatter, survival by risk.

Shape letters: N slides, K classes, L labels, X numbers.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gigamil.evaluate.figures import roc_points
from gigamil.evaluate.style import INK, MUTED, PALETTE, class_style, drawing, short_name
from gigamil.metrics.bootstrap import Floats, Ints
from gigamil.metrics.classification import calibration
from gigamil.metrics.survival import kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = 4.2  # inches


def draw_reliability(labels_N: Ints, probs_NK: Floats, classes: Sequence[str], out_png: Path) -> None:
    """How often what is said with some confidence is true; the area of a dot is the number of its slides."""
    found = calibration(labels_N, probs_NK)
    with drawing(out_png, 5.2, 5.0) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)), label="calibrated")
        area = 30 + 500 * found.count_B / found.count_B.sum()
        axes.plot(found.confidence_B, found.share_B, color=PALETTE[0], linewidth=1)
        axes.scatter(found.confidence_B, found.share_B, s=area, color=PALETTE[0], edgecolor="white", zorder=3)
        said = f"P({short_name(classes[-1])})" if len(classes) == 2 else "Probability of the predicted class"
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=said, ylabel="Share that is true")
        axes.set_title(f"Calibration error {found.error:.3f}", pad=10)
        axes.grid(True)
        axes.legend(loc="upper left", fontsize=9)


def draw_label_rocs(target_NL: Floats, probs_NL: Floats, labels: Sequence[str], out_png: Path) -> None:
    """ROC curve of each label over the slides of which it is known; one that is not both there and not is named in the legend."""
    with drawing(out_png, 7.2, 5.0) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)), label="chance")
        for number, label in enumerate(labels):
            known_N = np.isfinite(target_NL[:, number])
            true_N = target_NL[known_N, number] > 0
            name, style = short_name(label), class_style(number)
            if not 0 < true_N.sum() < len(true_N):
                axes.plot([], [], label=f"{name}: undefined", **style)
                continue
            false_rate, true_rate = roc_points(true_N, probs_NL[known_N, number])
            area = float(np.trapezoid(true_rate, false_rate))
            axes.plot(false_rate, true_rate, linewidth=2, label=f"{name} {area:.3f}", clip_on=False, **style)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xlabel("False-positive rate (1 - specificity)")
        axes.set_ylabel("True-positive rate (sensitivity)")
        axes.grid(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=9)


def draw_scatter(target_NX: Floats, value_NX: Floats, names: Sequence[str], out_png: Path) -> None:
    """Known against predicted, a panel per number; the line is where they agree."""
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    with drawing(out_png, _PANEL * columns, _PANEL * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for number, axes in enumerate(panels):
            if number >= len(names):
                axes.set_visible(False)
                continue
            known_N = np.isfinite(target_NX[:, number])
            true_N, value_N = target_NX[known_N, number], value_NX[known_N, number]
            both = np.concatenate([true_N, value_N]) if known_N.any() else np.array([0.0, 1.0])
            low, high = float(both.min()), float(both.max())
            axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
            axes.plot(true_N, value_N, "o", color=PALETTE[0], markersize=5, markeredgecolor="white", alpha=0.8)
            axes.set(xlabel="known", ylabel="predicted", title=short_name(names[number]), aspect="equal", box_aspect=1)
            axes.set_aspect("auto")
            axes.grid(True)


def draw_survival(time_N: Floats, event_N: Floats, risk_N: Floats, p: float | None, out_png: Path) -> None:
    """Kaplan and Meier's curves of the slides with higher and lower risk than the median, with 95 % bounds.

    Args:
        p: of the log-rank test between them; None where it is not defined.
    """
    is_high_N = risk_groups(risk_N)
    with drawing(out_png, 6.4, 4.6) as figure:
        axes = figure.add_subplot()
        for group, (name, colour) in enumerate((("lower risk", PALETTE[0]), ("higher risk", PALETTE[1]))):
            own = is_high_N == group
            if own.any():
                _draw_curve(axes, time_N[own], event_N[own], f"{name} (n={int(own.sum())})", colour)
        axes.set(ylim=(0, 1.02), xlim=(0, None), xlabel="Time", ylabel="Share without the event")
        axes.set_title("Survival by predicted risk" if p is None else f"Log-rank p = {p:.2g}", pad=10)
        axes.grid(True)
        axes.legend(loc="lower left", fontsize=9)


def risk_groups(risk_N: Floats) -> Ints:
    """1 of slides with more than the median risk, else 0."""
    groups: Ints = (risk_N > np.median(risk_N)).astype(np.int64)
    return groups


def _draw_curve(axes: "Axes", time_N: Floats, event_N: Floats, label: str, colour: str) -> None:
    curve = kaplan_meier(time_N, event_N)
    time_T = np.concatenate([[0.0], curve.time_T])
    share_T = np.concatenate([[1.0], curve.share_T])
    low_T, high_T = (np.concatenate([[1.0], np.where(np.isfinite(side), side, curve.share_T)]) for side in curve[2:])
    axes.step(time_T, share_T, where="post", color=colour, linewidth=2, label=label)
    axes.fill_between(time_T, low_T, high_T, step="post", color=colour, alpha=0.15, linewidth=0)
    censored_N = time_N[event_N == 0]
    at = np.searchsorted(time_T, censored_N, side="right") - 1
    axes.plot(censored_N, share_T[at], "|", color=INK, markersize=7)
