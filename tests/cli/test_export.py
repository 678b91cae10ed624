"""A trained model leaves its run: as safetensors and JSON, as an MLflow model, and on slides that no run has seen."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gigamil
from gigamil.cli import main
from gigamil.config.schema import RunConfig
from gigamil.errors import CheckpointError, CohortError, ConfigError, SlideError
from gigamil.evaluate.exported import load_exported
from gigamil.pipeline import run_pipeline
from gigamil.predict import load_model
from gigamil.testing.slides import make_demo_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_cohort(tmp_path_factory.mktemp("cohort"), num_slides=18, size_px=(500, 700), progress=False)


def make_run(cohort: Path, out: Path, regime: str, source: str = "shards") -> Path:
    config = {
        "cohort": {"table": cohort, "classes": ("normal", "tumour"), "test_fraction": 0.3, "val_fraction": 0.2},
        "slides": {"tile_px": 64, "tile_mpp": 1.0, "max_failed": 2},
        "data": {"source": source},
        "science": {
            "regime": regime,
            "encoder": {"name": "small_cnn", "options": {"width": 4}},
            "epochs": 1,
            "bootstrap": 100,
        },
        "execution": {"device": "cpu", "threads": 1},
        "bookkeeping": {
            "out": out,
            "shards": cohort.parent / "shards",
            "heatmaps": 0,
            "mlflow": False,
            "progress": False,
        },
    }
    run_pipeline(RunConfig.model_validate(config))
    return out


@pytest.fixture(scope="module")
def run(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(cohort, tmp_path_factory.mktemp("run"), "end_to_end")


def predicted(run: Path) -> tuple[str, dict[str, float]]:
    """Id and probabilities of the first slide of predictions.csv."""
    with (run / "predictions.csv").open(newline="") as stream:
        row = next(csv.DictReader(stream))
    return row["slide_id"], {name: float(row[name]) for name in ("prob_normal", "prob_tumour")}


def test_exported_model_says_what_the_run_said(cohort: Path, run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "export")]) == 0
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "export", moved)
    slide_id, wanted = predicted(run)
    slide = cohort.parent / "slides" / f"{slide_id}.tiff"
    found = load_exported(moved, device="cpu").predict(slide)
    assert found.slide_id == slide_id
    assert found.values == pytest.approx(wanted, abs=1e-6)
    assert found.predicted == max(wanted, key=wanted.__getitem__).removeprefix("prob_")
    assert found.num_tiles == len(found.attention)
    assert found.attention.attention_N.sum() == pytest.approx(1.0, rel=1e-5)
    assert str(cohort.parent) not in (moved / "model.json").read_text()  # no folder of this machine


def test_mlflow_predicts_for_a_slide(cohort: Path, run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "export")]) == 0
    model = tmp_path / "export" / "mlflow"
    assert not [path for path in model.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    folders = [str(path).encode() for path in (cohort.parent, run, tmp_path, Path(gigamil.__file__).parent)]
    for path in (path for path in model.parent.rglob("*") if path.is_file()):
        assert not [folder for folder in folders if folder in path.read_bytes()], path
    slide_id, wanted = predicted(run)
    table = tmp_path / "slides.csv"
    table.write_text(f"slide\n{cohort.parent / 'slides' / f'{slide_id}.tiff'}\n")
    words = ["models", "predict", "--env-manager", "local", "-m", str(model), "-i", str(table), "-t", "csv"]
    ran = subprocess.run(
        [sys.executable, "-m", "mlflow", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    answer = json.loads(ran.stdout.strip().splitlines()[-1])
    assert answer["predictions"][0] == pytest.approx(wanted, abs=1e-6)


def test_new_slides_are_predicted_with_heatmaps(
    cohort: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide_id, wanted = predicted(run)
    slide = tmp_path / "new.tiff"
    shutil.copy2(cohort.parent / "slides" / f"{slide_id}.tiff", slide)
    capsys.readouterr()
    assert main(["predict", str(slide), "--run", str(run), "--to", str(tmp_path / "out")]) == 0
    assert "prob_tumour" in capsys.readouterr().out
    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["slide_id"], row["split"], row["label"]) == ("new", "new", "")
    assert float(row["prob_tumour"]) == pytest.approx(wanted["prob_tumour"], abs=1e-6)
    assert (tmp_path / "out" / "heatmaps" / "new.png").is_file()


@pytest.mark.slow
def test_model_on_features_takes_slides_once_its_encoder_is_joined(cohort: Path, tmp_path: Path) -> None:
    run = make_run(cohort, tmp_path / "frozen", "frozen")
    slide_id, wanted = predicted(run)
    found = load_model(run, device="cpu").predict(cohort.parent / "slides" / f"{slide_id}.tiff")
    assert found.values == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_model_sees_the_pixels_that_its_run_saw(cohort: Path, tmp_path: Path) -> None:
    run = make_run(cohort, tmp_path / "run", "end_to_end", source="slides")
    slide_id, wanted = predicted(run)
    found = load_model(run, device="cpu").predict(cohort.parent / "slides" / f"{slide_id}.tiff")
    assert found.values == pytest.approx(wanted, abs=1e-7)  # JPEG between them would be 1e-4


def test_modules_of_a_model_travel_with_it(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert main(["export", str(run), "--to", str(folder), "--plugin", "gigamil.testing.sleep"]) == 0
    path = folder / "model.json"
    facts = json.loads(path.read_text())
    assert facts["plugins"] == ["gigamil.testing.sleep"]
    load_exported(folder, device="cpu")
    path.write_text(json.dumps(facts | {"plugins": ["no_such_module"]}))
    with pytest.raises(ConfigError, match="no_such_module"):
        load_exported(folder, device="cpu")


def test_slides_that_cannot_be_predicted_are_named(cohort: Path, run: Path, tmp_path: Path) -> None:
    bad, gone = tmp_path / "bad.tiff", tmp_path / "gone.tiff"
    bad.write_bytes(b"no slide")
    model = load_model(run, device="cpu")
    with pytest.raises(SlideError, match=r"no such slide: '.*gone\.tiff'$"):
        model.predict_all([bad, gone])
    with pytest.raises(SlideError, match=r"1 slides have no tiles:\n +bad .*\nLeave them out\.$"):
        model.predict(bad)


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="is no exported model"):
        load_exported(tmp_path)
    assert main(["export", str(run), "--to", str(tmp_path / "export")]) == 0
    weights = tmp_path / "export" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is not what was exported"):
        load_exported(tmp_path / "export")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "task.json").unlink()
    with pytest.raises(CohortError, match="was not evaluated"):
        load_model(copy)
