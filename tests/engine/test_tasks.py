"""Every task from slides to report: two ranks under DeepSpeed's launcher, then evaluation, figures and heatmaps."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from gigamil.config.load import absolute_paths
from gigamil.config.schema import RunConfig
from gigamil.evaluate.values import Values, read_run
from gigamil.pipeline import draw_heatmaps, evaluate_model, split_cohort, train_model
from gigamil.testing.shards import make_shards

TILE_PX = 32
NUM_SLIDES = 18
COLUMNS = ("slide_id", "path", "patient_id", "label", "split", "grade", "age", "time", "event", "bright", "odd")
TASKS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "ordinal": ({"name": "ordinal", "columns": ["grade"]}, "kappa", ["prob_0", "prob_1", "prob_2", "pred"]),
    "multilabel": ({"name": "multilabel", "columns": ["bright", "odd"]}, "auc", ["prob_bright", "prob_odd"]),
    "regression": ({"name": "regression", "columns": ["age", "time"]}, "pearson_age", ["value_age", "value_time"]),
    "survival": ({"name": "survival", "bins": 3}, "c_index", ["risk", "survival_", "survival_"]),
    "several": (
        {"columns": ["odd"], "also": [{"name": "survival", "weight": 0.5}, {"name": "regression", "columns": ["age"]}]},
        "auc",
        [
            "odd_prob_0",
            "odd_prob_1",
            "survival_risk",
            "survival_survival_",
            *["survival_survival_"] * 2,
            "age_value_age",
        ],
    ),
    "survival_first": (
        {
            "name": "survival",
            "also": [{"name": "multiclass", "columns": ["odd"]}, {"name": "ordinal", "columns": ["grade"]}],
        },
        "c_index",
        ["survival_risk", *["survival_survival_"] * 3, "odd_prob_0", "odd_prob_1", *["grade_prob_"] * 3],
    ),
    "cox": ({"name": "survival", "loss": "cox"}, "c_index", ["risk"]),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides whose brightness tells everything; one age and one label are not known."""
    folder = tmp_path_factory.mktemp("cohort")
    generator, rows = np.random.default_rng(0), []
    for number in range(NUM_SLIDES):
        level = number % 6  # of brightness: each split has all
        tiles = generator.integers(30 * level, 30 * level + 60, (4 + number % 5, TILE_PX, TILE_PX, 3), dtype=np.uint8)
        jpegs = [simplejpeg.encode_jpeg(tile, quality=90) for tile in tiles]
        make_shards(folder / "shards", f"s{number:02d}", jpegs, tile_px=TILE_PX, tile_mpp=1.0)
        split = ("train", "val", "test")[number // 6]
        event = int(level != 3)
        age = "" if number == 1 else str(40 + 5 * level)
        label = "" if number == 2 else str(int(level > 2))
        rows.append(
            [f"s{number:02d}", f"s{number:02d}.tiff", f"p{number:02d}", "ab"[level % 2], split, level // 2, age]
        )
        rows[-1] += [20 - 3 * level, event, label, level % 2]
    with (folder / "slides.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])
    return folder


def run_of(cohort: Path, out: Path, task: dict[str, Any]) -> RunConfig:
    data = {
        "cohort": {"table": cohort / "slides.csv"},
        "slides": {"tile_px": TILE_PX, "tile_mpp": 1.0},
        "science": {
            "encoder": {"name": "small_cnn", "options": {"width": 4}},
            "aggregator": {"options": {"hidden": 8}},
            "task": {key: value for key, value in task.items() if key != "also"},
            "also": task.get("also", []),
            "class_weights": "none",
            "epochs": 2,
            "slides_per_step": 3,
            "bootstrap": 100,
        },
        "execution": {"ranks": 2, "group_size": 1, "chunk": 4, "device": "cpu", "threads": 1, "timeout_s": 120},
        "bookkeeping": {"out": out, "shards": cohort / "shards", "progress": False, "heatmaps": 1},
    }
    return absolute_paths(RunConfig.model_validate(data))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_from_slides_to_report(name: str, cohort: Path, tmp_path: Path) -> None:
    task, metric, columns = TASKS[name]
    config = run_of(cohort, tmp_path / "run", task)
    splits = split_cohort(config)
    assert [len(splits.of(side)) for side in ("train", "val", "test")] == [6, 6, 6]
    train_model(config)
    evaluation = evaluate_model(config)
    draw_heatmaps(config)
    out = config.bookkeeping.out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "step")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert all(math.isfinite(line["val_loss"]) for line in epochs)
    assert all(0 <= line["val_attention_entropy"] <= 1 + 1e-6 and line["val_attention_max_n"] >= 1 for line in epochs)
    assert 0 < epochs[0]["encoder_drift"] < epochs[1]["encoder_drift"] < 1
    facts = json.loads((out / "run.json").read_text())
    assert facts["best_val"]["metric"] == epochs[0]["selected_by"]
    assert evaluation["headline_metric"] == metric
    assert evaluation["splits"]["test"]["metrics"][metric]["value"] is not None
    header = (out / "predictions.csv").read_text().splitlines()[0].split(",")
    assert all(found.startswith(wanted) for found, wanted in zip(header[-len(columns) :], columns, strict=True))
    predictions = read_run(out)
    assert len(predictions) == 12
    if isinstance(predictions, Values):
        assert np.isfinite(predictions.value_NP).all()
    for file in evaluation["figures"]:
        assert (out / "figures" / file).read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert report.count("<img") == len(evaluation["figures"]) + 1  # and the heatmap
    assert (out / "mlflow.db").is_file()
