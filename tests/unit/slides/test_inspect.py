"""The report on one slide."""

import pytest

from gigamil.errors import SlideError
from gigamil.slides import inspect_slide

from .conftest import PINK, MakeSlide, glass, plain


def test_report_of_a_small_slide(make_slide: MakeSlide) -> None:
    image = glass(400, 800)
    image[:, :400] = PINK
    report = inspect_slide(make_slide(image, 1.0), tile_px=100, tile_mpp=1.0)
    assert (report.num_tiles, report.num_grid_tiles) == (16, 32)
    assert report.tissue_area_mm2 == pytest.approx(0.16, rel=0.03)
    text = report.text()
    for part in ("generic-tiff", "800 x 400 px", "1 um/px (from the file)", "level 2", "100 um", "16 of 32"):
        assert part in text
    assert "note" not in text


def test_unequal_mpp_and_source_are_shown(make_slide: MakeSlide) -> None:
    path = make_slide(plain(200, 200), (0.5, 1.0))
    assert "0.5 x 1 um/px (from the file)" in inspect_slide(path).text()
    assert "0.25 um/px (given)" in inspect_slide(path, mpp=0.25).text()


def test_tiles_finer_than_the_slide_get_a_note(make_slide: MakeSlide) -> None:
    text = inspect_slide(make_slide(plain(100, 100, PINK), 2.0), tile_px=64, tile_mpp=0.5).text()
    assert "the tiles are 4 times finer than the slide: raise slides.tile_mpp" in text


def test_a_stride_counts_and_so_does_the_switch_for_dark_slides(make_slide: MakeSlide) -> None:
    path = make_slide(plain(400, 400, PINK), 1.0)
    counts = [inspect_slide(path, tile_px=100, tile_mpp=1.0, stride_px=stride).num_tiles for stride in (None, 50)]
    assert counts == [16, 49]
    image = plain(400, 400, (10, 10, 10))
    image[100:300, 100:300] = (10, 200, 10)
    path = make_slide(image, 1.0)
    with pytest.raises(SlideError, match="dark"):
        inspect_slide(path)
    assert inspect_slide(path, tile_px=100, tile_mpp=1.0, dark_field="tissue").num_tiles == 4


def test_a_hostile_file_name_is_shown_escaped(make_slide: MakeSlide) -> None:
    text = inspect_slide(make_slide(plain(100, 100, PINK), 1.0, name="a\x1b[31m\nb.tiff"), tile_mpp=1.0).text()
    assert "a\\x1b[31m\\nb.tiff" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("mpp", "sizes", "why"),
    [
        (25.0, {}, "its mpp 25 \\(table\\) is over 4 times slides.tile_mpp=0.5"),
        (1.0, {"tile_px": 1, "tile_mpp": 0.25}, "12000000 tiles in its grid, over 5000000"),
    ],
)
def test_the_limits_of_tiling_hold_before_a_pixel_is_read(
    make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch, mpp: float, sizes: dict[str, float], why: str
) -> None:
    """A wrong mpp makes the thumbnail the whole of level 0, and the grid larger than the memory."""
    monkeypatch.setattr("gigamil.slides.reader.Slide.read_um", pytest.fail)
    with pytest.raises(SlideError, match=rf"slide\.tiff': {why}"):
        inspect_slide(make_slide(plain(1000, 750, PINK), 0.5, levels=1), mpp=mpp, **sizes)


def test_errors_come_through(make_slide: MakeSlide) -> None:
    with pytest.raises(SlideError, match="no mpp in the file"):
        inspect_slide(make_slide(plain(64, 64), None))
