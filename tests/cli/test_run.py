"""`gigamil run` on slide files: everything is written, a second run does nothing, a changed one is refused."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import openslide
import pytest
from PIL import Image

from gigamil.cli import main
from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.testing.slides import make_demo_cohort

RUN_FILES = (
    "config.resolved.yaml",
    "ds_config.resolved.json",
    "run.json",
    "splits.json",
    "metrics.jsonl",
    "predictions.csv",
    "evaluation.json",
    "report.html",
    "mlflow.db",
    "checkpoints/latest",
    "checkpoints/best",
    "logs/rank0.log",
)


@pytest.mark.timeout(600)
def test_from_slide_files_to_a_report(
    tmp_path: Path, gigamil: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_demo_cohort(tmp_path / "cohort", num_slides=18, size_px=(500, 700), progress=False)
    config = RunConfig.model_validate(
        {
            "cohort": {"table": table, "classes": ("normal", "tumour"), "test_fraction": 0.3, "val_fraction": 0.2},
            "slides": {"tile_px": 64, "tile_mpp": 1.0, "max_failed": 2},
            "science": {
                "encoder": {"name": "small_cnn", "options": {"width": 4}},
                "precision": "bfloat16",
                "epochs": 2,
                "optim": {"freeze_encoder_epochs": 1},
                "bootstrap": 100,
            },
            "execution": {"ranks": 2, "device": "cpu"},
            "bookkeeping": {"out": tmp_path / "run", "heatmaps": 1},
        }
    )
    yaml = tmp_path / "run.yaml"
    yaml.write_text(to_yaml(config))
    out = tmp_path / "run"

    strict = gigamil("run", yaml, "--slides.max_failed", "1")
    assert strict.wait() == 3
    assert "bad-truncated" in strict.output()
    assert "slides.max_failed=1" in strict.output()

    first = gigamil("run", yaml)
    assert first.wait() == 0, first.output()
    assert "Traceback" not in first.output()
    result = json.loads(first.output().splitlines()[-1])
    assert result["slides"] == 16
    assert result["ranks"] == 2
    assert [name for name in RUN_FILES if not (out / name).is_file()] == []
    [png] = (out / "heatmaps").glob("*.png")
    with Image.open(png) as image:
        assert image.size[0] > 500
    with openslide.OpenSlide(png.with_suffix(".tiff")) as cells:
        assert float(cells.properties["openslide.mpp-x"]) == pytest.approx(64.0, rel=1e-4)
    assert (out / "artifacts").is_dir()
    assert list((out / "artifacts").rglob(f"heatmaps/{png.stem}.tiff"))
    with sqlite3.connect(out / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        keys = {key for (key,) in store.execute("select distinct key from metrics")}
    assert {"train/loss", "perf/data_wait_frac", "val/auc", "test/auc"} <= keys

    checkpoint = (out / "checkpoints" / "latest").read_text()
    second = gigamil("run", yaml)
    assert second.wait() == 0, second.output()
    assert "already trained" in second.output()
    assert "16 cached" in second.output()
    assert (out / "checkpoints" / "latest").read_text() == checkpoint

    changed = gigamil("run", yaml, "--science.optim.lr_head", "0.5")
    assert changed.wait() == 2
    assert "different: science.optim.lr_head" in changed.output()

    assert main(["heatmap", str(yaml), "--saliency"]) == 2
    assert "'small_cnn' of this run sees tiles one by one. Set science.encoder.dense" in capsys.readouterr().err
    assert not list((out / "heatmaps").glob("*.saliency.*"))

    new = gigamil("heatmap", yaml, "--slide", next((tmp_path / "cohort" / "slides").glob("demo-*.tiff")))
    assert new.wait() == 0, new.output()
    assert len(list((out / "new_slides" / "heatmaps").glob("*.png"))) == 1
