"""ROC, confusion matrix and training curves as PNG: numbers in, one picture out, nothing computed that is reported."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gigamil.evaluate.history import History
from gigamil.evaluate.style import INK, MUTED, PALETTE, class_style, drawing, short_name
from gigamil.metrics.bootstrap import Estimate
from gigamil.metrics.classification import confusion_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

SHARES = ("auc", "auprc", "balanced_accuracy", "f1", "f1_at_threshold", "ece", "c_index")  # 0 to 1
METRIC_WORDS = {"auc": "AUC", "kappa": "quadratic kappa", "c_index": "C-index"}
SMOOTHING_SHARE = 0.05  # of the steps, in the running mean of the training loss
MOST_CLASSES_WITH_PERCENT = 8  # a larger confusion matrix shows counts only, and its class names are turned
LONGEST_INSIDE_LEGEND = 4
WRAP_AT = 14  # letters of a class name per line, below and beside a confusion matrix


def draw_roc(
    labels_N: NDArray[np.int64], probs_NK: Floats, classes: Sequence[str], auc: Estimate, out_png: Path
) -> None:
    """ROC curve: of the positive (last) class, or of each class against the rest.

    A dot marks the operating point that was scored: the most probable class. A class without a slide, or with all of
    them, has no curve and is named in the legend as undefined.
    """
    shown = [len(classes) - 1] if len(classes) == 2 else range(len(classes))
    legend_outside = len(shown) > LONGEST_INSIDE_LEGEND
    with drawing(out_png, 7.2 if legend_outside else 5.2, 5.0) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)), label="chance")
        for number, k in enumerate(shown):
            _draw_roc_curve(axes, labels_N == k, probs_NK, k, short_name(classes[k]), class_style(number))
        axes.plot([], [], "o", markersize=6, color=MUTED, markeredgecolor="white", label="most probable class")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xlabel("False-positive rate (1 - specificity)")
        axes.set_ylabel("True-positive rate (sensitivity)")
        axes.set_title(_auc_text(auc, len(classes)), pad=10)
        axes.grid(True)
        if legend_outside:
            axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=9)
        else:
            axes.legend(loc="lower right", fontsize=9)


def _draw_roc_curve(
    axes: "Axes",
    positive_N: NDArray[np.bool_],
    probs_NK: Floats,
    k: int,
    name: str,
    style: dict[str, Any],
) -> None:
    if not 0 < positive_N.sum() < len(positive_N):
        axes.plot([], [], label=f"{name}: undefined", **style)
        return
    false_rate, true_rate = roc_points(positive_N, probs_NK[:, k])
    axes.plot(false_rate, true_rate, linewidth=2, label=name, clip_on=False, **style)
    called_N = probs_NK.argmax(axis=1) == k
    point = called_N[~positive_N].mean(), called_N[positive_N].mean()
    axes.plot(*point, "o", markersize=8, color=style["color"], markeredgecolor="white", clip_on=False, zorder=5)


def roc_points(positive_N: NDArray[np.bool_], score_N: Floats) -> tuple[Floats, Floats]:
    """False- and true-positive rate at every threshold, from (0, 0) to (1, 1); equal scores make one slanted step."""
    _, falling_N = np.unique(-score_N, return_inverse=True)
    hits, misses = (np.cumsum(np.bincount(falling_N, part)) for part in (positive_N, ~positive_N))
    return np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1])


def draw_confusion(
    labels_N: NDArray[np.int64], predicted_N: NDArray[np.int64], classes: Sequence[str], out_png: Path
) -> None:
    """Confusion matrix: counts, and the share of each true class; the shade is that share."""
    size = len(classes)
    counts_KK = confusion_counts(labels_N, predicted_N, size)
    total_K1 = counts_KK.sum(axis=1, keepdims=True)
    share_KK = np.divide(counts_KK, total_K1, out=np.zeros((size, size)), where=total_K1 > 0)
    few = size <= MOST_CLASSES_WITH_PERCENT
    side = 1.8 + size * (1.4 if size <= 3 else 0.9 if few else 0.5)
    with drawing(out_png, side, side - 0.2) as figure:
        axes = figure.add_subplot()
        axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
        for true, called in np.ndindex(size, size):
            share = share_KK[true, called]
            percent = f"\n{share:.0%}" if few and total_K1[true] else ""
            text = axes.text(called, true, f"{counts_KK[true, called]}{percent}", ha="center", va="center")
            text.set(color="white" if share > 0.6 else INK, fontsize=12 if size <= 3 else 9)
        names = [_wrapped(name) for name in classes]
        axes.set_xticks(range(size), names, rotation=0 if few else 90)
        axes.set_yticks(range(size), [f"{name}\nn={n}" for name, n in zip(names, total_K1[:, 0], strict=True)])
        axes.tick_params(length=0, labelsize=10 if size <= 3 else 8)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("Predicted class", labelpad=8)
        axes.set_ylabel("True class")
        axes.set_title("Slides; shade: share of the true class", pad=10, fontsize=10, fontweight="normal", loc="center")


def draw_losses(history: History, out_png: Path) -> None:
    """Loss per step with its running mean, validation loss, and per epoch the metric that chooses the best one."""
    with drawing(out_png, 10.4, 3.8) as figure:
        loss_axes, score_axes = figure.subplots(1, 2, width_ratios=(3, 2), sharex=True)
        _draw_loss_panel(loss_axes, history)
        _draw_score_panel(score_axes, history)
        for axes in (loss_axes, score_axes):
            axes.set_xlabel("Optimiser step")
            axes.grid(True)


def _draw_loss_panel(axes: "Axes", history: History) -> None:
    skipped = f" ({history.num_skipped} not finite, skipped)" if history.num_skipped else ""
    axes.set_title("Loss per step" + skipped)
    axes.plot(history.step, history.loss, color=PALETTE[0], alpha=0.35, linewidth=0.9, label="training, each step")
    window = max(1, round(SMOOTHING_SHARE * len(history.loss)))
    if window > 1:
        mean = _running_mean(history.loss, window)
        axes.plot(history.step, mean, color=PALETTE[0], linewidth=2, label=f"training, mean of {window} steps")
    if np.isfinite(history.val_loss).any():
        axes.plot(
            history.epoch_step,
            history.val_loss,
            "o-",
            color=PALETTE[1],
            markersize=4,
            linewidth=1.6,
            label="validation",
        )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)


def _draw_score_panel(axes: "Axes", history: History) -> None:
    name = METRIC_WORDS.get(history.selected_by, history.selected_by)
    axes.set_title(f"Validation {name} per epoch")
    if not np.isfinite(history.val_score).any():
        words = f"no validation {name} was recorded"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=MUTED)
        return
    if history.selected_by in ("auc", "c_index"):
        axes.set_ylim(0, 1.02)
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        place = axes.get_yaxis_transform()
        axes.text(1, 0.505, "chance", transform=place, ha="right", va="bottom", color=MUTED, fontsize=9)
    axes.plot(history.epoch_step, history.val_score, "o-", color=PALETTE[1], markersize=4, linewidth=1.6)
    best = history.best_row
    label = f"best: {history.val_score[best]:.3f} (epoch {history.epoch[best]:.0f})"
    axes.plot(
        history.epoch_step[best],
        history.val_score[best],
        "o",
        markersize=10,
        color="none",
        markeredgecolor=INK,
        label=label,
        clip_on=False,
    )
    axes.legend(loc="lower right", fontsize=9)


def _running_mean(values: Floats, window: int) -> Floats:
    """Mean of the last `window` finite values; NaN where there is none."""
    finite = np.isfinite(values)
    total, count = (np.cumsum(part) for part in (np.where(finite, values, 0.0), finite.astype(np.float64)))
    total[window:], count[window:] = total[window:] - total[:-window], count[window:] - count[:-window]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _auc_text(auc: Estimate, num_classes: int) -> str:
    name = "AUC" if num_classes == 2 else "Mean one-versus-rest AUC"
    if auc["value"] is None:
        return f"{name} undefined"
    interval = f" [{auc['ci'][0]:.3f}, {auc['ci'][1]:.3f}]" if auc["ci"] else ""
    return f"{name} {auc['value']:.3f}{interval}"


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(short_name(name), WRAP_AT)) or name
