"""Opening slides, their mpp, and reading in micron."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gigamil.errors import SlideError
from gigamil.slides import reader
from gigamil.slides.reader import MppError, is_slide, open_slide

from .conftest import MakeSlide, plain, ramps


def test_reads_pixels_where_they_lie(make_slide: MakeSlide) -> None:
    image = ramps(400, 600)
    with open_slide(make_slide(image, 0.5)) as slide:
        region = slide.read_um(50.0, 100.0, 64.0, 32.0, 128, 64)
    assert region.shape == (64, 128, 3)
    assert region.dtype == np.uint8
    assert np.abs(region.astype(int) - image[200:264, 100:228]).max() <= 6  # JPEG


@pytest.mark.parametrize("mpp", [0.7, 1.0, 1.3, 2.0, 3.1])
def test_resampled_regions_keep_their_place(make_slide: MakeSlide, mpp: float) -> None:
    """Through every level, on ramps where a shift by a level-0 pixel changes red by 255 / 1023."""
    with open_slide(make_slide(ramps(1001, 1023), 0.5)) as slide:
        thumbnail = slide.thumbnail(mpp).astype(float)
    col, row = 100, 80
    centre_x, centre_y = (col + 0.5) * mpp / 0.5 - 0.5, (row + 0.5) * mpp / 0.5 - 0.5
    assert thumbnail[row, col, 0] == pytest.approx(centre_x * 255 / 1022, abs=2.5)
    assert thumbnail[row, col, 1] == pytest.approx(centre_y * 255 / 1000, abs=2.5)


def test_neighbouring_regions_meet_without_a_seam(make_slide: MakeSlide) -> None:
    rng = np.random.default_rng(0)
    with open_slide(make_slide(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8), 0.48)) as slide:
        whole = slide.read_um(20.0, 20.0, 128.0, 64.0, 128, 64)
        halves = [slide.read_um(20.0 + 64.0 * k, 20.0, 64.0, 64.0, 64, 64) for k in (0, 1)]
    assert np.abs(whole.astype(int) - np.concatenate(halves, axis=1)).max() <= 1


def test_large_regions_are_read_in_parts(make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(make_slide(ramps(600, 800), 0.5, levels=1)) as slide:
        whole = slide.thumbnail(1.7)
        monkeypatch.setattr(reader, "MAX_READ_PX", 5_000)
        parts = slide.thumbnail(1.7)
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_unequal_mpp_is_resampled_to_squares(make_slide: MakeSlide) -> None:
    image = plain(200, 400, (255, 255, 255))
    image[100:120, 200:240] = 0  # 20 x 20 um at (100, 100) um
    with open_slide(make_slide(image, (0.5, 1.0))) as slide:
        assert (slide.info.mpp_x, slide.info.mpp_y) == pytest.approx((0.5, 1.0))
        thumbnail = slide.thumbnail(1.0)
        inside = slide.read_um(101.0, 101.0, 18.0, 18.0, 18, 18)
    assert thumbnail.shape == (200, 200, 3)
    assert inside.max() < 25
    dark_rows, dark_cols = np.nonzero(thumbnail[..., 0] < 128)
    assert (dark_rows.min(), dark_rows.max(), dark_cols.min(), dark_cols.max()) == (100, 119, 100, 119)


def test_outside_the_slide_is_white(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(100, 100, (0, 0, 0)), 1.0)) as slide:
        corner = slide.read_um(-20.0, -20.0, 40.0, 40.0, 40, 40)
        far = slide.read_um(80.0, 80.0, 40.0, 40.0, 40, 40)
        away = slide.read_um(-500.0, 900.0, 40.0, 40.0, 40, 40)
    assert corner[:16, :16].min() > 250
    assert corner[24:, 24:].max() < 10
    assert far[24:, 24:].min() > 250
    assert far[:16, :16].max() < 10
    assert (away == 255).all()


def test_thumbnail_pixels_are_squares_of_the_asked_size(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(101, 203, (0, 0, 0)), 0.5)) as slide:
        thumbnail = slide.thumbnail(8.0)
    assert thumbnail.shape == (7, 13, 3)  # 50.5 um and 101.5 um, rounded up


def test_what_is_known_of_a_slide(make_slide: MakeSlide) -> None:
    path = make_slide(plain(300, 500), 0.25, levels=3)
    with open_slide(path) as slide:
        info = slide.info
    assert (info.path, info.vendor, info.width, info.height) == (path, "generic-tiff", 500, 300)
    assert info.level_dimensions == ((500, 300), (250, 150), (125, 75))
    assert info.level_downsamples == (1.0, 2.0, 4.0)
    assert (info.width_um, info.height_um) == pytest.approx((125.0, 75.0))
    assert (info.mpp_source, info.objective, info.bounds_x, info.bounds_y) == ("file", None, 0, 0)


def test_mpp_of_the_table_wins_then_the_file_then_the_default(make_slide: MakeSlide) -> None:
    with_mpp = make_slide(plain(64, 64), 0.5, "with.tiff")
    without = make_slide(plain(64, 64), None, "without.tiff")
    for path, options, expected in [
        (with_mpp, {"mpp": 0.25, "default_mpp": 2.0}, (0.25, "table")),
        (with_mpp, {"default_mpp": 2.0}, (0.5, "file")),
        (without, {"default_mpp": 2.0}, (2.0, "default")),
    ]:
        with open_slide(path, **options) as slide:
            assert (slide.info.mpp_x, slide.info.mpp_source) == (pytest.approx(expected[0]), expected[1])


def test_missing_mpp_is_refused(make_slide: MakeSlide) -> None:
    with pytest.raises(MppError, match=r"no mpp in the file.*mpp column.*slides\.default_mpp"):
        open_slide(make_slide(plain(64, 64), None))


@pytest.mark.parametrize("mpp", [0.0, math.nan, -1.0, 1000.0, math.inf, 0.049])
def test_absurd_mpp_is_refused_wherever_it_comes_from(make_slide: MakeSlide, mpp: float) -> None:
    with pytest.raises(
        MppError, match=r"slide\.tiff': mpp .* in the slide table cannot be true.*Correct the mpp column"
    ):
        open_slide(make_slide(plain(64, 64), 0.5), mpp=mpp)
    with pytest.raises(MppError, match="default_mpp cannot be true"):
        open_slide(make_slide(plain(64, 64), None), default_mpp=mpp)


@pytest.mark.parametrize("mpp", [1000.0, 0.01, (0.5, 400.0)])
def test_absurd_mpp_in_the_file_is_refused_even_with_a_default(make_slide: MakeSlide, mpp: float) -> None:
    path = make_slide(plain(64, 64), mpp)
    with pytest.raises(MppError, match="in the file cannot be true.*mpp column of the slide table"):
        open_slide(path, default_mpp=0.5)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.info.mpp_x == 0.5


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"absent\.svs': no such file or folder"):
        open_slide(tmp_path / "absent.svs")


def test_a_text_file_named_svs(tmp_path: Path) -> None:
    path = tmp_path / "notes.svs"
    path.write_text("not a slide")
    assert not is_slide(path)
    with pytest.raises(SlideError, match=r"notes\.svs': not a slide that OpenSlide can open.*11 bytes"):
        open_slide(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.8, 0.97])
def test_a_truncated_pyramid_never_passes(make_slide: MakeSlide, share: float) -> None:
    path = make_slide(ramps(700, 900), 0.5)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(SlideError, match=r"slide\.tiff'.*truncated"), open_slide(path) as slide:
        for mpp in (0.5, 1.0, 2.0):
            slide.read_um(0.0, 0.0, slide.info.width_um, slide.info.height_um, *(int(900 / mpp), int(700 / mpp)))


def test_a_damaged_tile_fails_alone_and_the_slide_stays_readable(make_slide: MakeSlide) -> None:
    path = make_slide(ramps(256, 768), 1.0, levels=1)
    with path.open("r+b") as file:
        file.seek(8)  # the first tile starts behind the header
        file.write(bytes(400))
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"level 0, .* cannot be read: .*damaged or truncated"):
                slide.read_um(0.0, 0.0, 64.0, 64.0, 64, 64)
            good = slide.read_um(600.0, 100.0, 64.0, 64.0, 64, 64)
            assert np.abs(good.astype(int) - ramps(256, 768)[100:164, 600:664]).max() <= 6


def test_a_folder_without_a_slide(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(SlideError, match="a folder without a file that OpenSlide can open"):
        open_slide(tmp_path)


def test_a_folder_of_several_slides(make_slide: MakeSlide) -> None:
    folder = make_slide(plain(64, 64), 0.5, "a.tiff").parent
    with open_slide(folder) as slide:
        assert slide.info.path == folder
    make_slide(plain(64, 64), 0.5, "b.tiff")
    with pytest.raises(SlideError, match=r"holds several slides \('a\.tiff' and 'b\.tiff' differ\)"):
        open_slide(folder)


@pytest.mark.parametrize(
    ("scale", "level"),
    [(0.5, 0), (1.0, 0), (2.0, 0), (2.5, 0), (4.0, 1), (8.0, 1), (9.0, 1), (16.0, 2), (33.0, 2), (64.0, 3)],
)
def test_the_level_is_fine_enough_and_not_wasteful(make_slide: MakeSlide, scale: float, level: int) -> None:
    """Levels 4 times apart: one up to twice as fine as wanted, else the next finer."""
    with open_slide(make_slide(plain(64, 64), 0.5, levels=1)) as slide:
        levels = tuple((1600 // 4**k, 1600 // 4**k) for k in range(4))
        slide.info = replace(slide.info, width=1600, height=1600, level_dimensions=levels)
        assert slide._level_for(scale, scale) == level


def test_halved_levels_are_reduced_from_one_finer(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(512, 512), 0.5, levels=4)) as slide:
        assert [slide._level_for(scale, scale) for scale in (1.0, 1.99, 2.0, 4.0, 8.0, 50.0)] == [0, 0, 0, 1, 2, 3]
        assert slide._level_for(8.0, 2.0) == 0
