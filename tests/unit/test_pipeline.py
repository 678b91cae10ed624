"""The verbs as Python calls, where no other test looks."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gigamil import pipeline
from gigamil.config.schema import RunConfig
from gigamil.data.features import FeatureSet, features_folder
from gigamil.data.h5 import write_features
from gigamil.errors import ConfigError
from gigamil.evaluate import new_slides
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.shards.manifest import SlideManifest
from gigamil.shards.read import ShardSet
from gigamil.testing.tiff import write_pyramid_tiff


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "cohort": {"table": tmp_path / "slides.csv"},
            "slides": {"tile_px": 32, "tile_mpp": 0.5, "min_tissue_area_um2": 1000, "tissue_mpp": 2},
            "execution": {"tile_workers": 1},
            "bookkeeping": {"out": tmp_path / "run", "progress": False},
        }
    )


def write_slide(path: Path, mpp: float | None = 0.5) -> str:
    """A small slide that is tissue but for its edge; its path as one types it."""
    image = np.full((256, 256, 3), 245, np.uint8)
    image[32:-32, 32:-32] = [190, 90, 150] + np.random.default_rng(0).integers(0, 40, (192, 192, 3))
    write_pyramid_tiff(path, image, mpp, levels=1)
    return str(path)


def train_nothing(monkeypatch: pytest.MonkeyPatch, shards: object = None) -> None:
    """There is a run, of these tiles, but no model."""
    monkeypatch.setattr(pipeline, "_predict_into", lambda *_: None)
    monkeypatch.setattr(pipeline, "load_training_data", lambda _: SimpleNamespace(shards=shards))
    monkeypatch.setattr(pipeline, "refuse_other_checkpoint", lambda *_: None)


def test_the_mpp_of_new_slides_is_for_files_that_carry_none(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_slide(tmp_path / "knows.tiff"), write_slide(tmp_path / "lacks.tiff", None)]
    found: dict[str, SlideManifest] = {}

    def heatmap_run(_: Path, shards: ShardSet, names: Sequence[str], **_kwargs: object) -> list[Path]:
        found.update({name: shards.manifest(name) for name in names})
        return []

    train_nothing(monkeypatch)
    monkeypatch.setattr(pipeline, "heatmap_run", heatmap_run)
    pipeline.draw_heatmaps(config, files, mpp=0.25)
    said = {name: (manifest.mpp_x, manifest.mpp_source) for name, manifest in found.items()}
    assert said == {"knows": (0.5, "file"), "lacks": (0.25, "default")}


@pytest.mark.parametrize(("made_by", "is_refused"), [("ab" * 32, False), ("cd" * 32, True)])
def test_new_slides_get_no_features_of_another_encoder(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_by: str, is_refused: bool
) -> None:
    config = config.model_copy(update={"data": config.data.model_copy(update={"source": "features"})})

    def write_as(folder: Path, slide_id: str, sha256: str) -> None:
        features_ND, coords_N2 = np.zeros((4, 6), np.float32), np.arange(8).reshape(4, 2) * 32
        attrs = {"patch_size": 32, "patch_size_level0": 32, "name": slide_id, "mpp_x": 0.5, "mpp_y": 0.5}
        write_features(
            folder / f"{slide_id}.h5", features_ND, coords_N2, attrs | {"encoder": "x", "encoder_sha256": sha256}
        )

    write_as(tmp_path / "trained", "old", "ab" * 32)
    train_nothing(monkeypatch, FeatureSet(tmp_path / "trained", 16.0, {}))
    monkeypatch.setattr(new_slides, "cache_features", lambda new, kind: write_as(features_folder(new), "new", made_by))
    drawn: list[Sequence[str]] = []
    monkeypatch.setattr(pipeline, "heatmap_run", lambda _folder, _shards, names, **_: drawn.append(names) or [])
    slide = write_slide(tmp_path / "new.tiff")
    if is_refused:
        with pytest.raises(
            ConfigError, match="made by the encoder 'x' .abababababab., and those of 'new' by 'x' .cdcd"
        ):
            pipeline.draw_heatmaps(config, [slide])
    else:
        pipeline.draw_heatmaps(config, [slide])
    assert drawn == ([] if is_refused else [("new",)])


def test_a_name_is_an_evaluated_slide_before_it_is_a_file_and_both_get_their_lesions(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()  # of the same name as a slide of the run
    new = write_slide(tmp_path / "new.tiff")
    (tmp_path / "slides.csv").write_text(f"slide_id,path,patient_id\na,{new},a\n")
    pipeline.tile_cohort(config, progress=False)
    lesions_um = {"a": [(0.0, 0.0, 9.0, 9.0)], "new": [(20.0, 20.0, 40.0, 40.0)]}
    evaluated = Predictions(("a",), ("a",), (None,), ("test",), ("no", "yes"), np.array([[0.25, 0.75]]))
    write_predictions(config.bookkeeping.out / FILE_NAME, evaluated)
    found: list[tuple[str, list[str], object]] = []

    def heatmap_run(
        folder: Path, _shards: object, names: Sequence[str], *_: object, lesions_um: object, **_kwargs: object
    ) -> list[Path]:
        found.append((folder.name, list(names), lesions_um))
        return []

    train_nothing(monkeypatch)
    monkeypatch.setattr(pipeline, "heatmap_run", heatmap_run)
    monkeypatch.setattr(pipeline, "write_report", lambda _: None)
    pipeline.draw_heatmaps(config, ["a", new, "gone"], lesions_um=lesions_um)
    assert found == [("new_slides", ["new"], lesions_um), ("run", ["a", "gone"], lesions_um)]
