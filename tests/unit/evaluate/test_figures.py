"""Figures: drawn for every input that can occur, the same bytes each time, and no global state left behind."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_curve

from gigamil.evaluate.figures import draw_confusion, draw_losses, draw_roc, roc_points
from gigamil.evaluate.history import History
from gigamil.metrics.bootstrap import Estimate

KNOWN = Estimate(value=0.9, ci=[0.8, 1.0])
UNKNOWN = Estimate(value=None, ci=None, reason="no slide of class 'tumour'")


def fake(num_slides: int, num_classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    names = [f"${k}^ a <b> & a name that is much too long for an axis" for k in range(num_classes)]
    return rng.integers(num_classes, size=num_slides), rng.dirichlet(np.ones(num_classes), num_slides), names


def history(num_steps: int, num_epochs: int) -> History:
    nan_first = np.linspace(1, 0, num_steps)
    nan_first[:1] = np.nan
    at_step = np.linspace(1, max(num_steps, 1), num_epochs)
    return History(
        np.arange(1.0, num_steps + 1),
        nan_first,
        np.arange(1.0, num_epochs + 1),
        at_step,
        at_step * 0 + 0.5,
        at_step * 0 + 1,
        "auc",
        1,
        *[at_step * 100] * 3,
    )


@pytest.mark.parametrize("seed", range(3))
def test_roc_points_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive, score = rng.random(50) < 0.4, rng.integers(0, 8, 50) / 8
    false_rate, true_rate, _ = roc_curve(positive, score, drop_intermediate=False)
    np.testing.assert_allclose(roc_points(positive, score), (false_rate, true_rate), rtol=1e-12)


@pytest.mark.parametrize(("num_classes", "estimate"), [(2, KNOWN), (3, UNKNOWN), (6, KNOWN), (20, KNOWN)])
def test_roc_and_confusion_of_any_number_of_classes(tmp_path: Path, num_classes: int, estimate: Estimate) -> None:
    labels, probs, names = fake(40, num_classes)
    draw_roc(labels, probs, names, estimate, tmp_path / "roc.png")
    draw_confusion(labels, probs.argmax(axis=1), names, tmp_path / "confusion.png")
    for name in ("roc.png", "confusion.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) >= 500


def test_a_class_without_slides_is_drawn_as_undefined(tmp_path: Path) -> None:
    draw_roc(np.zeros(3, dtype=np.int64), np.full((3, 2), 0.5), ["a", "b"], UNKNOWN, tmp_path / "roc.png")
    draw_confusion(np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64), ["a", "b"], tmp_path / "confusion.png")
    assert (tmp_path / "roc.png").is_file()


@pytest.mark.parametrize(("num_steps", "num_epochs"), [(0, 0), (1, 0), (3, 1), (200, 10)])
def test_losses_of_short_and_long_runs(tmp_path: Path, num_steps: int, num_epochs: int) -> None:
    draw_losses(history(num_steps, num_epochs), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 5_000


def test_same_numbers_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    labels, probs, names = fake(20, 3)
    draw_roc(labels, probs, names, KNOWN, tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        draw_roc(labels, probs, names, KNOWN, tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in (tmp_path / "a.png").read_bytes()


def test_pyplot_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now raises
    labels, probs, names = fake(20, 2)
    draw_roc(labels, probs, names, KNOWN, tmp_path / "roc.png")
    draw_losses(history(10, 2), tmp_path / "losses.png")
