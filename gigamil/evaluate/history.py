"""metrics.jsonl of a run, as curves: what `train` wrote per step and per epoch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigamil.files import parse_object
from gigamil.metrics.task import is_better

FILE_NAME = "metrics.jsonl"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """Curves of a training run; a value that was not written or not finite is NaN.

    Epochs carry the number of the last step before them, so that both kinds share one axis. Steps are those that were
    logged (`bookkeeping.log_every`); `num_skipped` counts all steps that no rank took. `val_score` is the metric that chooses the
    best epoch, `selected_by` its name. `tile_forwards` and `rank_seconds` are what training had spent by the end of each epoch.
    """

    step: Floats
    loss: Floats
    epoch: Floats
    epoch_step: Floats
    val_loss: Floats
    val_score: Floats
    selected_by: str
    num_skipped: int
    tiles_seen: Floats
    tile_forwards: Floats
    rank_seconds: Floats

    @property
    def best_row(self) -> int:
        """Row of the epoch whose checkpoint training calls the best: best score, of equals the lowest loss."""
        score, loss = np.nan_to_num(self.val_score, nan=-np.inf), np.nan_to_num(self.val_loss, nan=np.inf)
        if not is_better(self.selected_by, 1.0, 0.0):  # the smaller the better
            score = -np.nan_to_num(self.val_score, nan=np.inf)
        return int(np.lexsort((loss, -score))[0])


def read_history(path: Path) -> History:
    """Read `metrics.jsonl`.

    A last line without its newline is still being written (or its writer was killed) and is left out.

    Raises:
        CohortError: a line that is no JSON object, with its number.
    """
    lines: dict[str, list[dict[str, Any]]] = {"step": [], "epoch": [], "skipped": []}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        entry = parse_object(line, f"'{path}' line {number}", "cut the file there, or train again")
        if entry.get("kind") in lines:
            lines[entry["kind"]].append(entry)
    steps, epochs = lines["step"], lines["epoch"]
    selected_by = str(epochs[-1].get("selected_by", "auc")) if epochs else "auc"
    return History(
        step=_column(steps, "step"),
        loss=_column(steps, "loss"),
        epoch=_column(epochs, "epoch"),
        epoch_step=_column(epochs, "step"),
        val_loss=_column(epochs, "val_loss"),
        val_score=_column(epochs, f"val_{selected_by}"),
        selected_by=selected_by,
        num_skipped=len(lines["skipped"]),
        tiles_seen=_column(epochs, "tiles_seen"),
        tile_forwards=_column(epochs, "tile_forwards"),
        rank_seconds=_column(epochs, "rank_seconds"),
    )


def _number(entry: dict[str, Any], key: str) -> float:
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else float("nan")


def _column(entries: list[dict[str, Any]], key: str) -> Floats:
    return np.array([_number(entry, key) for entry in entries], dtype=np.float64)
