"""metrics.jsonl as curves, whole or cut short by a kill."""

import json
from pathlib import Path

import numpy as np
import pytest

from gigamil.errors import CohortError
from gigamil.evaluate.history import read_history


def write(path: Path, *entries: object, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return path


def test_epochs_lie_at_their_last_step(tmp_path: Path) -> None:
    steps = [{"kind": "step", "step": n, "loss": 1 / n, "lr_head": 1e-3} for n in range(1, 5)]
    epochs = [{"kind": "epoch", "epoch": n, "step": 2 * n, "val_auc": 0.5 + n / 10, "val_loss": 0.7} for n in (1, 2)]
    found = read_history(write(tmp_path / "m", *steps[:2], epochs[0], {"kind": "other"}, *steps[2:], epochs[1]))
    assert found.step.tolist() == [1, 2, 3, 4]
    assert found.loss.tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
    assert found.epoch.tolist() == [1, 2]
    assert found.epoch_step.tolist() == [2, 4]
    assert found.val_score.tolist() == [0.6, 0.7]
    assert found.num_skipped == 0


def test_what_lies_between_logged_steps_counts(tmp_path: Path) -> None:
    """As with bookkeeping.log_every=10: three epochs of 7 steps, of which the second and the ninth were skipped."""
    lines = [
        {"kind": "skipped", "step": 2, "slides": ["a"]},
        {"kind": "epoch", "epoch": 1, "step": 7, "val_auc": 0.5},
        {"kind": "skipped", "step": 9, "slides": ["a"]},
        {"kind": "step", "step": 10, "loss": 0.5},
        {"kind": "epoch", "epoch": 2, "step": 14, "val_auc": 0.6},
        {"kind": "step", "step": 20, "loss": 0.4},
        {"kind": "epoch", "epoch": 3, "step": 21, "val_auc": 0.7},
    ]
    found = read_history(write(tmp_path / "m", *lines))
    assert found.epoch_step.tolist() == [7, 14, 21]
    assert found.num_skipped == 2


def test_missing_and_non_finite_values_are_nan(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": 1, "loss": None}, {"kind": "step", "step": 2, "loss": float("nan")}]
    found = read_history(write(tmp_path / "m", *lines, {"kind": "epoch", "epoch": 1, "val_auc": None}))
    assert np.isnan(found.loss).tolist() == [True, True]
    assert np.isnan([*found.val_score, *found.val_loss]).tolist() == [True, True]


def test_a_line_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"kind": "step", "step": 1, "loss": 1.0}, tail='{"kind": "step", "st')
    assert read_history(path).step.tolist() == [1]
    assert read_history(write(tmp_path / "empty")).step.size == 0


@pytest.mark.parametrize(("line", "message"), [("{broken\n", "line 2 is not JSON"), ("[1]\n", "line 2 is a JSON list")])
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(CohortError, match=f"{message}.*cut the file there"):
        read_history(write(tmp_path / "m", {"kind": "step", "step": 1, "loss": 1.0}, tail=line))


def test_of_equal_aucs_the_lower_loss_is_the_best_as_in_training(tmp_path: Path) -> None:
    values = [(0.5, 0.1), (1.0, 0.7), (1.0, 0.2), (1.0, 0.3), (None, None)]
    lines = [{"kind": "epoch", "epoch": n, "val_auc": a, "val_loss": b} for n, (a, b) in enumerate(values, start=1)]
    assert read_history(write(tmp_path / "m", *lines)).best_row == 2


def test_the_metric_that_chose_is_the_one_that_is_shown(tmp_path: Path) -> None:
    values = [(3.0, 0.5), (1.0, 0.5), (2.0, 0.5)]
    lines = [
        {"kind": "epoch", "epoch": n, "val_mae": mae, "val_loss": loss, "selected_by": "mae"}
        for n, (mae, loss) in enumerate(values, start=1)
    ]
    found = read_history(write(tmp_path / "m", *lines))
    assert (found.selected_by, found.val_score.tolist(), found.best_row) == ("mae", [3.0, 1.0, 2.0], 1)
