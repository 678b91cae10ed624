"""`gigamil demo`: all of gigamil on synthetic slides, offline, by the same calls as the other commands."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gigamil.config.load import absolute_paths, to_commented_yaml
from gigamil.config.schema import RunConfig
from gigamil.doctor import server_of
from gigamil.evaluate.attention import Box, attention_path, lesion_hit, read_attention
from gigamil.evaluate.predictions import FILE_NAME, read_predictions
from gigamil.pipeline import run_pipeline
from gigamil.testing.slides import make_demo_cohort

EXPERIMENT = "gigamil-demo"
NUM_SLIDES = 74
NUM_BAD = 2  # one without tissue, one truncated: on purpose


def demo_config(out: Path, ranks: int = 2) -> RunConfig:
    """The configuration of the demo: a small CNN on 64 um tiles, trained from nothing in about two minutes of two cores.

    Args:
        out: run folder; the cohort is in `<out>/cohort`.
        ranks: processes.
    """
    return absolute_paths(
        RunConfig.model_validate(
            {
                "cohort": {
                    "table": out / "cohort" / "slides.csv",
                    "classes": ("normal", "tumour"),
                    "test_fraction": 0.31,
                    "val_fraction": 0.12,
                },
                "slides": {"tile_px": 64, "tile_mpp": 1.0, "max_failed": NUM_BAD},
                "science": {
                    "encoder": {"name": "small_cnn"},
                    "aggregator": {"options": {"hidden": 64}},
                    "optim": {"lr_encoder": 2e-3, "lr_head": 2e-3},
                    "slides_per_step": 2,
                    "epochs": 8,
                },
                "execution": {"ranks": ranks, "device": "cpu"},
                "bookkeeping": {"out": out, "experiment": EXPERIMENT, "name": "demo"},
            }
        )
    )


def run_demo(out: Path, ranks: int = 2) -> dict[str, Any]:
    """Draw a cohort, then tile, split, train, evaluate, draw heatmaps; print where everything is and what to type next.

    A second call continues what was interrupted, or shows what is there.

    Args:
        out: run folder, made if missing.
        ranks: processes that train.
    Returns:
        auc, auc_ci, ranks, lesion_hit (mean over held-out positive slides of the share of their most attended 1 % of
        tiles that touch the planted lesion), seconds, out.
    """
    start = time.monotonic()
    out = out.resolve()
    table = out / "cohort" / "slides.csv"
    print(
        f"== draw: {NUM_SLIDES} synthetic slides, {NUM_BAD} of them bad on purpose, into '{table.parent}'", flush=True
    )
    if not table.is_file():
        make_demo_cohort(table.parent, num_slides=NUM_SLIDES)
    config = demo_config(out, ranks)
    (out / "demo.yaml").write_text(to_commented_yaml(config))
    boxes: dict[str, list[Box]] = {
        name: [(b[0], b[1], b[2], b[3]) for b in lesions]
        for name, lesions in json.loads((table.parent / "lesions.json").read_text()).items()
    }
    result = run_pipeline(config, lesions_um=boxes)
    summary = {
        "auc": round(result["auc"], 4),
        "auc_ci": [round(bound, 4) for bound in result["auc_ci"]],
        "ranks": ranks,
        "lesion_hit": round(mean_lesion_hit(out, boxes), 4),
        "seconds": round(time.monotonic() - start, 1),
        "out": str(out),
    }
    print(_guide(out))
    return summary


def mean_lesion_hit(run: Path, boxes: dict[str, list[Box]]) -> float:
    """Mean `lesion_hit` over the held-out positive slides of an evaluated run."""
    predictions = read_predictions(run / FILE_NAME)
    positive = predictions.classes[-1]
    hits = [
        lesion_hit(read_attention(attention_path(run, slide_id)), boxes[slide_id])
        for slide_id, split, label in zip(predictions.slide_ids, predictions.splits, predictions.labels, strict=True)
        if split == "test" and label == positive
    ]
    return float(np.mean(hits))


def _guide(out: Path) -> str:
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    own_store = f"{_command('mlflow')} ui --backend-store-uri sqlite:///{shown / 'mlflow.db'}"
    rows = [
        ("report", shown / "report.html"),
        ("predictions", shown / "predictions.csv"),
        ("heatmaps, QuPath GeoJSON", shown / "heatmaps"),
        ("checkpoints", shown / "checkpoints"),
        ("MLflow", own_store if uri is None else f"experiment {EXPERIMENT} at {server_of(uri)}"),
        ("the slides and their table", shown / "cohort"),
        ("the configuration, commented", shown / "demo.yaml"),
    ]
    lines = [f"  {name:30} {place}" for name, place in rows]
    return "\n".join(
        [
            "\nEverything is here:",
            *lines,
            "Your own slides, in two more commands:",
            f"  {_command('gigamil')} init my.yaml --slides FOLDER --labels labels.csv",
            f"  {_command('gigamil')} run my.yaml",
        ]
    )


def _command(name: str) -> str:
    """A command as it can be typed here: its name if it is on the PATH, else its file beside this Python."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
