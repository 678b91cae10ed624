"""The two-stage baseline from the command line: on features of its own, and on features that others have made."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from gigamil.cli import main
from gigamil.config.load import to_yaml
from gigamil.data.h5 import write_features
from gigamil.testing.runs import CLASSES, tiny_run
from gigamil.testing.slides import make_demo_cohort


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_key_makes_a_run_a_two_stage_run(tmp_path: Path, gigamil: Callable[..., object]) -> None:
    table = make_demo_cohort(tmp_path / "cohort", num_slides=18, size_px=(500, 700), progress=False)
    config = {
        "cohort": {"table": str(table), "classes": ["normal", "tumour"], "test_fraction": 0.3, "val_fraction": 0.2},
        "slides": {"tile_px": 64, "tile_mpp": 1.0, "max_failed": 2},
        "science": {
            "encoder": {"name": "small_cnn", "options": {"width": 4}},
            "epochs": 2,
            "optim": {"freeze_encoder_epochs": 1},
            "bootstrap": 100,
        },
        "execution": {"ranks": 2, "device": "cpu"},
        "bookkeeping": {"out": str(tmp_path / "run"), "heatmaps": 1, "mlflow": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"

    first = gigamil("run", "run.yaml", "--data.source", "features")
    assert first.wait() == 0, first.output()
    assert "Traceback" not in first.output()
    assert "not used: science.augment, science.optim.lr_encoder, science.optim.freeze_encoder_epochs" in first.output()
    record = json.loads((out / "run.json").read_text())
    assert (record["source"], record["decoder"], record["status"]) == ("features", None, "finished")
    files = {path: path.stat().st_mtime_ns for path in (out / "features").glob("*.h5")}
    assert len(files) == 16  # two of the slides are bad
    assert (out / "report.html").is_file()
    assert len(list((out / "heatmaps").glob("*.png"))) == 1
    result = json.loads(first.output().splitlines()[-1])
    assert (result["slides"], result["tiles"] > 100) == (16, True)

    second = gigamil("run", "run.yaml", "--data.source", "features")
    assert second.wait() == 0, second.output()
    assert "already trained" in second.output()
    assert {path: path.stat().st_mtime_ns for path in files} == files

    new = gigamil("heatmap", "run.yaml", "--data.source", "features", "--slide", "cohort/slides/demo-000.tiff")
    assert new.wait() == 0, new.output()
    assert (out / "new_slides" / "features" / "demo-000.h5").is_file()
    assert (out / "new_slides" / "heatmaps" / "demo-000.png").is_file()

    whole = gigamil("evaluate", "run.yaml")  # end to end is another run
    assert whole.wait() == 2
    assert "different: data.source" in whole.output()


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A YAML for features in TRIDENT's layout; there are no slides and no shards."""
    config = tiny_run(tmp_path / "other")
    folder = tmp_path / "trident" / "features_uni_v1"
    generator = np.random.default_rng(0)
    with config.cohort.table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        size = int(generator.integers(20, 40))
        features = generator.normal(CLASSES.index(row["label"]), 1, size=(size, 12)).astype(np.float32)
        coords = generator.integers(0, 100, size=(size, 2)) * 512
        attrs = {
            "patch_size": 256,
            "patch_size_level0": 512,
            "overlap": 0,
            "name": row["slide_id"],
            "encoder": "uni_v1",
        }
        write_features(folder / f"{row['slide_id']}.h5", features, coords, attrs)
    book = config.bookkeeping.model_copy(update={"out": tmp_path / "run", "shards": None, "heatmaps": 1})
    data = config.data.model_copy(update={"source": "features", "features": folder})
    slides = config.slides.model_copy(update={"tile_px": 256, "tile_mpp": 0.5})
    config = config.model_copy(update={"bookkeeping": book, "data": data, "slides": slides})
    (tmp_path / "theirs.yaml").write_text(to_yaml(config))
    return tmp_path / "theirs.yaml"


@pytest.mark.timeout(600)
def test_features_of_others_need_neither_slides_nor_shards(theirs: Path, gigamil: Callable[..., object]) -> None:
    out = theirs.parent / "run"
    run = gigamil("run", theirs, "--science.epochs", "10", "--science.bootstrap", "100")
    assert run.wait() == 0, run.output()
    assert json.loads(run.output().splitlines()[-1])["auc"] == 1.0
    assert len(list((out / "heatmaps").glob("*.geojson"))) == 1


def test_what_is_missing_is_listed_before_a_rank_starts(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(theirs)]) == 0
    for name in ("s03", "s08"):
        (theirs.parent / "trident" / "features_uni_v1" / f"{name}.h5").unlink()
    assert main(["train", str(theirs)]) == 3
    text = capsys.readouterr().err
    assert "2 of 12 slides have no fitting features" in text
    assert "'s03'" in text
    assert "'s08'" in text
    # Nor does `run` leave them out of a split without being told to.
    (theirs.parent / "run" / "splits.json").unlink()
    assert main(["run", str(theirs), "--slides.max_failed", "1"]) == 3
    text = capsys.readouterr().err
    assert "2 of 12 slides have no features in " in text
    assert "more than slides.max_failed=1: s03, s08. Make them" in text
    assert not (theirs.parent / "run" / "splits.json").exists()


def test_a_plan_on_features_has_no_encoder(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(theirs)]) == 0
    assert main(["plan", str(theirs), "--gpu-memory", "8GB"]) == 0
    assert "cost per tile: no encoder" in capsys.readouterr().out


def test_a_slide_file_is_no_use_to_a_run_on_features_of_others(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = theirs.parent / "new.svs"
    new.write_bytes(b"")
    assert main(["heatmap", str(theirs), "--slide", str(new)]) == 2
    assert "this run takes features from" in capsys.readouterr().err
