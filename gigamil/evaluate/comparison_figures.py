"""Pictures of a comparison: metrics and differences with their intervals, validation against what was spent."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gigamil.evaluate.figures import METRIC_WORDS, SHARES
from gigamil.evaluate.history import History
from gigamil.evaluate.style import INK, MUTED, class_style, drawing, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gigamil.evaluate.comparison import Comparison

_ROW = 0.42  # inches
_MOST_MARKED = 40  # points of a curve, beyond which they would be a band
_AXES = {"tile_forwards": "Tile forwards", "rank_seconds": "Seconds x ranks"}


def draw_differences(comparison: "Comparison", words: str, out_png: Path) -> None:
    """Each run's metric with its interval, and beside it how much more it is than the first run's."""
    runs, metric = comparison["runs"], comparison["metric"]
    with drawing(out_png, 9.6, 1.3 + _ROW * len(runs)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for number, run in enumerate(runs):
            _draw_interval(left, number, run["scores"]["metrics"][metric])
            if run["minus_first"] is not None:
                _draw_interval(right, number, run["minus_first"]["metrics"][metric])
        left.set_yticks(range(len(runs)), [short_name(run["name"]) for run in runs])
        left.set_ylim(len(runs) - 0.5, -0.5)
        left.set_title(words)
        if metric in SHARES:
            left.set_xlim(min(0.48, left.get_xlim()[0]), 1.04)
        right.set_title(f"minus {short_name(runs[0]['name'])}")
        right.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        for axes in (left, right):
            axes.grid(True, axis="x")
            axes.tick_params(axis="y", length=0)


def _draw_interval(axes: "Axes", row: int, estimate: Mapping[str, Any]) -> None:
    style = class_style(row)
    if estimate["value"] is None:
        axes.text(0.5, row, "undefined", transform=axes.get_yaxis_transform(), ha="center", va="center", color=MUTED)
        return
    if estimate["ci"]:
        axes.plot(estimate["ci"], [row, row], color=style["color"], linewidth=3, alpha=0.5, solid_capstyle="butt")
    axes.plot(estimate["value"], row, "o", color=style["color"], markersize=8, markeredgecolor="white")
    axes.annotate(
        f"{estimate['value']:.3f}",
        (estimate["value"], row),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=INK,
    )


def draw_curves(histories: Mapping[str, Sequence[History]], out_png: Path) -> None:
    """The validation metric that chooses the best epoch, against tile forwards and against seconds of all ranks."""
    with drawing(out_png, 10.4, 4.0) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (key, words) in zip(panels, _AXES.items(), strict=True):
            for number, (name, own) in enumerate(histories.items()):
                style = class_style(number)
                for position, history in enumerate(own):
                    label = short_name(name) if position == 0 else None
                    alpha = 1.0 if len(own) == 1 else 0.5
                    axes.plot(
                        getattr(history, key),
                        history.val_score,
                        marker="o" if len(history.val_score) <= _MOST_MARKED else None,
                        markersize=4,
                        label=label,
                        alpha=alpha,
                        **style,
                    )
            axes.set_xlabel(words)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.grid(True)
        metrics = sorted({history.selected_by for own in histories.values() for history in own})
        panels[0].set_ylabel("Validation " + ", ".join(METRIC_WORDS.get(metric, metric) for metric in metrics))
        spent = [history.tile_forwards for own in histories.values() for history in own]
        if not any(np.isfinite(values).any() for values in spent):
            panels[0].text(0.5, 0.5, "not recorded", transform=panels[0].transAxes, ha="center", color=MUTED)
        panels[1].legend(loc="best", fontsize=9)
