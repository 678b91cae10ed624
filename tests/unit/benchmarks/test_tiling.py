"""The comparison of tiling speeds runs, checks the pixels of each arm, and refuses arms that do different work."""

import json
from pathlib import Path

import numpy as np
import openslide
import pytest

from benchmarks import tiling
from benchmarks.tiling import TINY, Part
from gigamil.testing.paint import synthetic_slide
from gigamil.testing.tiff import write_pyramid_tiff


def test_all_arms_on_a_tiny_pyramid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiling.main(["--tiny", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    goals = ("raw_over_openslide", "reencode_over_limit", "peak_rss_mb", "scaling_2_over_1")
    assert all(result[name] > 0 for name in goals)
    assert result["largest_grey_difference"] <= tiling.MAX_GREY_DIFFERENCE
    assert set(result["tiles_per_second"]) == {"raw_1", "raw_2", "resampled_1", "resampled_2"}
    kept = json.loads((tmp_path / "out.json").read_text())
    assert set(kept["machine"]) >= {"cpu", "cores", "openslide", "simplejpeg", "pillow", "date"}
    assert {"command", "commit"} <= kept.keys()
    assert all(len(row) == 1 + TINY.rounds for arms in kept["arms"].values() for row in arms.values())


def test_arms_whose_pixels_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling.make_pyramid(tmp_path / "a.tiff", TINY)
    part = Part(tmp_path / "a.tiff", 256, 256, 512)
    assert tiling.check_pixels(part, 256, [0.5, 1.0]) <= tiling.MAX_GREY_DIFFERENCE
    right = tiling.limit

    def brighter(part: Part, tile_mpp: float) -> tuple[list[np.ndarray], float]:
        tiles, spent = right(part, tile_mpp)
        return [np.clip(tile, 0, 252) + np.uint8(3) for tile in tiles], spent

    monkeypatch.setattr(tiling, "limit", brighter)
    with pytest.raises(SystemExit, match="differ by up to .* grey levels, so their times mean nothing"):
        tiling.check_pixels(part, 256, [1.0])


def test_the_plain_loop_resizes_a_slide_of_nearly_that_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 micron of 0.499: 224 pixels by rounding, but not the same work, nor the same pixels."""
    path = tmp_path / "a.tiff"
    write_pyramid_tiff(path, synthetic_slide(1, tumour=True, size_um=(511.0, 511.0), mpp=0.499).image_HW3, 0.499)
    part = Part(path, 256, 256, 512)
    with openslide.OpenSlide(path) as handle:
        mpp = float(handle.properties["openslide.mpp-x"])
        corners = [(x_um / mpp, y_um / mpp) for x_um, y_um in tiling.positions(part, mpp, 0.5)]
        side = (tiling.OUTPUT_PX, tiling.OUTPUT_PX)
        as_it_is = [np.asarray(handle.read_region((round(x), round(y)), 0, side).convert("RGB")) for x, y in corners]
    assert tiling.check_pixels(part, 256, [0.5]) <= tiling.MAX_GREY_DIFFERENCE
    monkeypatch.setattr(tiling, "loop_tiles", lambda *words: as_it_is)
    with pytest.raises(SystemExit, match="differ by up to .* grey levels"):
        tiling.check_pixels(part, 256, [0.5])


def test_rows_of_the_pyramid_are_shared_without_a_rest(tmp_path: Path) -> None:
    tiling.make_pyramid(tmp_path / "a.tiff", TINY)
    for way in ("raw", "resampled"):
        whole, peak = tiling.tile_rows(tmp_path / "a.tiff", way, 0, 1)
        halves = [tiling.tile_rows(tmp_path / "a.tiff", way, part, 2)[0] for part in (0, 1)]
        assert sum(halves) == whole > 0
        assert peak > 1e6
