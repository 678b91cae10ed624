"""The verbs as Python calls, where no other test looks."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gigamil import pipeline
from gigamil.config.schema import RunConfig
from gigamil.shards.manifest import SlideManifest
from gigamil.shards.read import ShardSet
from gigamil.testing.tiff import write_pyramid_tiff


def test_the_mpp_of_new_slides_is_for_files_that_carry_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.full((256, 256, 3), 245, np.uint8)
    image[32:-32, 32:-32] = [190, 90, 150] + np.random.default_rng(0).integers(0, 40, (192, 192, 3))
    files = [tmp_path / "knows.tiff", tmp_path / "lacks.tiff"]
    for path, mpp in zip(files, (0.5, None), strict=True):
        write_pyramid_tiff(path, image, mpp, levels=1)
    config = RunConfig.model_validate(
        {
            "slides": {"tile_px": 32, "tile_mpp": 0.5, "min_tissue_area_um2": 1000, "tissue_mpp": 2},
            "execution": {"tile_workers": 1},
            "bookkeeping": {"out": tmp_path / "run", "progress": False},
        }
    )
    found: dict[str, SlideManifest] = {}

    def heatmap_run(_: Path, shards: ShardSet, names: Sequence[str], **_kwargs: object) -> list[Path]:
        found.update({name: shards.manifest(name) for name in names})
        return []

    monkeypatch.setattr(pipeline, "_predict_into", lambda *_: None)  # there is no model
    monkeypatch.setattr(pipeline, "load_training_data", lambda _: SimpleNamespace(shards=None))
    monkeypatch.setattr(pipeline, "_refuse_other_checkpoint", lambda *_: None)
    monkeypatch.setattr(pipeline, "heatmap_run", heatmap_run)
    pipeline.draw_heatmaps(config, [str(path) for path in files], mpp=0.25)
    said = {name: (manifest.mpp_x, manifest.mpp_source) for name, manifest in found.items()}
    assert said == {"knows": (0.5, "file"), "lacks": (0.25, "default")}
