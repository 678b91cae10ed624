"""One real slide in two formats, and a DICOM overview in JPEG 2000."""

import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image
from simplejpeg import decode_jpeg

from gigamil.errors import SlideError
from gigamil.slides import (
    MppError,
    NotNative,
    TileGrid,
    choose_tiles,
    find_tissue,
    inspect_slide,
    native_tiles,
    open_slide,
    reader,
)

pytestmark = pytest.mark.real_data

# The DICOM copy was encoded again: over the whole slide, glass included, its level 0 differs by 3.4 grey levels.
MAX_MEAN_DIFFERENCE = 6.0


@pytest.fixture
def wsi(real_data: Path) -> Path:
    return real_data / "wsi"


def test_inspect_the_svs(wsi: Path) -> None:
    report = inspect_slide(wsi / "CMU-1-Small-Region.svs")
    assert (report.info.vendor, report.info.objective, report.num_grid_tiles) == ("aperio", "20", 140)
    assert 45 <= report.num_tiles <= 65
    assert "0.499 um/px (from the file)" in report.text()


@pytest.mark.parametrize(("tile_px", "tile_mpp"), [(224, 0.5), (112, 1.0)])
def test_svs_and_dicom_give_the_same_tiles(wsi: Path, tile_px: int, tile_mpp: float) -> None:
    # Tiles that hang over the lower edge hold 22 % tissue.
    min_tissue = 0.2
    with open_slide(wsi / "CMU-1-Small-Region.svs") as svs, open_slide(wsi / "CMU-1-Small-Region.dicom") as dicom:
        grid, other = (TileGrid.square(s.info.width_um, s.info.height_um, tile_px, tile_mpp) for s in (svs, dicom))
        assert grid == other
        chosen = [set(choose_tiles(grid, find_tissue(s), min_tissue)[0].tolist()) for s in (svs, dicom)]
        both = sorted(chosen[0] & chosen[1])
        assert len(both) >= 0.95 * len(chosen[0] | chosen[1])
        differences = []
        for index in both:
            x_um, y_um = grid.position_um(index)
            one, two = (
                s.read_um(x_um, y_um, grid.tile_width_um, grid.tile_height_um, tile_px, tile_px) for s in (svs, dicom)
            )
            differences.append(np.abs(one.astype(int) - two).mean())
    assert np.mean(differences) < MAX_MEAN_DIFFERENCE


def test_any_file_of_a_dicom_pyramid_stands_for_the_slide(wsi: Path) -> None:
    folder = wsi / "CMU-1-Small-Region.dicom"
    regions = []
    for path in (folder, folder / "level-0-frames-0-30.dcm", folder / "level-7-frames-0-1.dcm"):
        with open_slide(path) as slide:
            assert (slide.info.width, slide.info.height, len(slide.info.level_dimensions)) == (2220, 2967, 12)
            assert slide.info.mpp_x == pytest.approx(0.499)
            regions.append(slide.read_um(400.0, 600.0, 50.0, 50.0, 100, 100))
    assert (regions[0] == regions[1]).all()
    assert (regions[0] == regions[2]).all()


def test_the_overview_is_coarse(wsi: Path) -> None:
    report = inspect_slide(wsi / "camelyon16-overview.dicom" / "overview.dcm", tile_px=64, tile_mpp=30.0)
    assert report.info.mpp_x == pytest.approx(28.97, abs=0.01)
    assert report.tissue_share == pytest.approx(0.3, abs=0.1)


def test_a_truncated_svs(wsi: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(wsi / "CMU-1-Small-Region.svs", tmp_path / "cut.svs"))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SlideError, match=r"cut\.svs'.*truncated"), open_slide(path) as slide:
        slide.thumbnail(8.0)


def test_a_truncated_dicom_level(wsi: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wsi / "CMU-1-Small-Region.dicom", tmp_path / "cut.dicom"))
    level = folder / "level-0-frames-0-30.dcm"
    os.truncate(level, level.stat().st_size // 2)
    with pytest.raises(SlideError, match=r"cut\.dicom'.*damaged or truncated"), open_slide(folder) as slide:
        slide.thumbnail(0.499)


def test_the_tiles_of_the_svs_are_copied_as_openslide_shows_them(wsi: Path) -> None:
    path = wsi / "CMU-1-Small-Region.svs"
    with open_slide(path) as slide, openslide.OpenSlide(path) as handle:
        tiles = native_tiles(slide, 240, 0.5, 0.02)
        assert (tiles.level, tiles.mpp_x, tiles.mpp_y, tiles.num_x, tiles.num_y) == (0, 0.499, 0.499, 10, 13)
        copied = 0
        for col, row in np.ndindex(tiles.num_x, tiles.num_y):
            jpeg = tiles.jpeg(col, row)
            inside = (col + 1) * 240 <= 2220 and (row + 1) * 240 <= 2967
            assert (jpeg is not None) == inside
            if jpeg is None:
                continue
            copied += 1
            truth = np.asarray(handle.read_region((240 * col, 240 * row), 0, (240, 240)).convert("RGB")).astype(int)
            with Image.open(BytesIO(jpeg)) as image:
                assert image.mode == "RGB"
                assert np.abs(np.asarray(image) - truth).max() <= 2
            assert np.abs(decode_jpeg(jpeg, "RGB") - truth).max() <= 2
        assert copied == 9 * 12


def test_dicom_is_not_copied(wsi: Path) -> None:
    with open_slide(wsi / "CMU-1-Small-Region.dicom") as slide, pytest.raises(NotNative, match="format dicom"):
        native_tiles(slide, 240, 0.5, 0.02)


def test_reading_the_svs_is_the_same_with_and_without_openslide(wsi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for vendors in (reader.TILED_VENDORS, ()):
        monkeypatch.setattr(reader, "TILED_VENDORS", vendors)
        with open_slide(wsi / "CMU-1-Small-Region.svs") as slide:
            places = [(x * 97.0, y * 131.0, mpp) for x in range(9) for y in range(9) for mpp in (0.499, 0.5, 1.1)]
            found.append([slide.read_um(x, y, 100 * mpp, 100 * mpp, 100, 100) for x, y, mpp in places])
    assert (np.array(found[0]) == np.array(found[1])).all()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"MPP = 0.0000", "mpp 0 in the file cannot be true"),
        (b"MPP = 499.00", "mpp 499 in the file cannot be true"),
        (b"MPP = nan   ", "no mpp in the file"),
        (b"MPPx= 0.4990", "no mpp in the file"),
    ],
)
def test_a_wrong_mpp_in_the_svs(wsi: Path, tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "wrong.svs"
    path.write_bytes((wsi / "CMU-1-Small-Region.svs").read_bytes().replace(b"MPP = 0.4990", text))
    with pytest.raises(MppError, match=rf"wrong\.svs': {why}"):
        open_slide(path)
