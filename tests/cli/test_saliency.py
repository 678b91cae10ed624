"""`gigamil heatmap --saliency` of a run that sees the slide: of slides that it knows, and of a file that it does not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import openslide
import pytest

from gigamil.cli import main
from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.evaluate.predictions import read_predictions
from gigamil.testing.slides import make_demo_cohort


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", ["shards", "slides"])
def test_attention_and_saliency_lie_on_the_slide(tmp_path: Path, gigamil: Callable[..., object], source: str) -> None:
    table = make_demo_cohort(tmp_path / "cohort", num_slides=18, size_px=(500, 700), progress=False)
    config = RunConfig.model_validate(
        {
            "cohort": {"table": table, "classes": ("normal", "tumour"), "test_fraction": 0.3, "val_fraction": 0.2},
            "slides": {"tile_px": 64, "tile_mpp": 1.0, "max_failed": 2},
            "data": {"source": source},
            "science": {
                "encoder": {"name": "small_dense_cnn", "options": {"width": 4, "pool": 4}},
                "epochs": 1,
                "bootstrap": 100,
            },
            "execution": {"ranks": 1, "device": "cpu"},
            "bookkeeping": {"out": tmp_path / "run", "heatmaps": 1, "mlflow": False, "progress": False},
        }
    )
    yaml, out = tmp_path / "run.yaml", tmp_path / "run"
    yaml.write_text(to_yaml(config))
    trained = gigamil("run", yaml)
    assert trained.wait() == 0, trained.output()
    assert not list((out / "heatmaps").glob("*.saliency.*"))

    known = read_predictions(out / "predictions.csv").slide_ids[0]
    new = tmp_path / "unseen.tiff"
    shutil.copy(next((tmp_path / "cohort" / "slides").glob("demo-*.tiff")), new)
    assert main(["heatmap", str(yaml), "--saliency", "--slide", known, "--slide", str(new)]) == 0
    slides = tmp_path / "cohort" / "slides"
    drawn = [(slides / f"{known}.tiff", out / "heatmaps"), (new, out / "new_slides" / "heatmaps")]
    for path, folder in drawn:
        assert (folder / f"{path.stem}.saliency.png").is_file()
        with openslide.OpenSlide(path) as slide:
            mpp = float(slide.properties["openslide.mpp-x"])
            width_um, height_um = (side * mpp for side in slide.dimensions)
        for kind, pixel_um in (("tiff", 64), ("saliency.tiff", 8)):
            with openslide.OpenSlide(folder / f"{path.stem}.{kind}") as picture:
                assert float(picture.properties["openslide.mpp-x"]) == pytest.approx(pixel_um, rel=1e-4)
                # As large as the slide, to a tile.
                assert 0 <= picture.dimensions[0] * pixel_um - width_um < 64
                assert 0 <= picture.dimensions[1] * pixel_um - height_um < 64
