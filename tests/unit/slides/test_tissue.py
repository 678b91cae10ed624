"""The tissue mask: areas, specks, holes, empty and full slides."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigamil.errors import SlideError
from gigamil.slides.masks import load_mask, write_mask_geojson
from gigamil.slides.quality import find_pen
from gigamil.slides.reader import open_slide
from gigamil.slides.tissue import TissueMask, bright_pixels, find_tissue, otsu_threshold, tissue_pixels, without_small

from .conftest import PINK, WHITE, MakeSlide, glass, plain


def _disc(height: int, width: int, row: int, col: int, radius: int) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    return np.hypot(y - row, x - col) <= radius


def test_area_of_a_disc(make_slide: MakeSlide) -> None:
    image = glass(600, 800)
    image[_disc(600, 800, 300, 400, 200)] = PINK
    with open_slide(make_slide(image, 2.0)) as slide:
        mask = find_tissue(slide)
    assert mask.mask_HW.shape == (150, 200)
    assert mask.area_um2 == pytest.approx(np.pi * 400**2, rel=0.03)


def test_a_slide_without_tissue_has_an_empty_mask(make_slide: MakeSlide) -> None:
    for image in (glass(400, 400), plain(400, 400, (255, 255, 255)), plain(400, 400, (128, 128, 128))):
        with open_slide(make_slide(image, 2.0)) as slide:
            mask = find_tissue(slide)
        assert not mask.mask_HW.any()
        assert mask.area_um2 == 0.0


def test_a_slide_full_of_tissue_has_a_full_mask(make_slide: MakeSlide) -> None:
    """Also with dark tissue beside pale: Otsu alone would take the pale half for glass."""
    image = plain(400, 400, PINK)
    image[:, :200] = (90, 40, 130)
    with open_slide(make_slide(image, 2.0)) as slide:
        mask = find_tissue(slide)
    assert mask.mask_HW.all()


def test_specks_go_and_small_holes_are_filled(make_slide: MakeSlide) -> None:
    image = glass(600, 600)
    image[_disc(600, 600, 250, 250, 200)] = PINK
    image[_disc(600, 600, 250, 150, 30)] = (245, 245, 245)  # hole of 11 300 um2
    image[_disc(600, 600, 250, 330, 60)] = (245, 245, 245)  # hole of 45 200 um2
    image[_disc(600, 600, 550, 550, 20)] = PINK  # speck of 5 000 um2
    with open_slide(make_slide(image, 2.0)) as slide:
        mask_HW = find_tissue(slide, min_area_um2=20_000.0, max_hole_area_um2=20_000.0).mask_HW
        all_HW = find_tissue(slide, min_area_um2=0.0, max_hole_area_um2=0.0).mask_HW
    scale = 4  # 8 um mask over 2 um image
    assert mask_HW[250 // scale, 150 // scale]
    assert not all_HW[250 // scale, 150 // scale]
    assert not mask_HW[250 // scale, 330 // scale]
    assert not mask_HW[550 // scale, 550 // scale]
    assert all_HW[550 // scale, 550 // scale]


@pytest.mark.parametrize("image", [plain(256, 256, (255, 255, 255)), glass(256, 256)])
def test_glass_at_the_border_is_no_hole(make_slide: MakeSlide, image: np.ndarray) -> None:
    """All of a small picture, and a corner: both smaller than the holes that are filled."""
    with open_slide(make_slide(image, 0.5)) as slide:
        assert not find_tissue(slide, min_area_um2=1000.0).mask_HW.any()
    image = plain(600, 600, PINK)
    image[:, :40] = WHITE
    image[540:, 540:] = WHITE
    image[200:260, 200:260] = WHITE  # enclosed
    with open_slide(make_slide(image, 2.0)) as slide:
        mask_HW = find_tissue(slide).mask_HW
    assert not mask_HW[:, :9].any()
    assert not mask_HW[137:, 137:].any()
    assert mask_HW[:130, 12:].all()


@pytest.mark.parametrize("side", [101, 102, 103, 104])
def test_what_hangs_over_the_edge_is_no_tissue(tmp_path: Path, make_slide: MakeSlide, side: int) -> None:
    """Mask pixels of 8 um on a slide of 202 to 208 um: a tile at the edge has as much tissue as it has slide."""
    with open_slide(make_slide(plain(side, side, PINK), 2.0)) as slide:
        mask, info = find_tissue(slide), slide.info
    assert mask.area_um2 <= (side * 2.0) ** 2
    np.testing.assert_allclose(mask.fraction(0.0, 0.0, 400.0) * 400.0**2, mask.area_um2)
    full_HW = np.ones(mask.mask_HW.shape, bool)
    Image.fromarray(full_HW).save(tmp_path / "s.png")
    write_mask_geojson(tmp_path / "s.geojson", TissueMask(full_HW, 8.0), info)
    for name in ("s.png", "s.geojson"):
        mask = load_mask(tmp_path / name, info, 8.0)
        if mask.mask_HW.all():
            np.testing.assert_allclose(mask.area_um2, (side * 2.0) ** 2)
            np.testing.assert_allclose(mask.fraction(160.0, 160.0, 100.0), ((side * 2.0 - 160.0) / 100.0) ** 2)
        assert mask.area_um2 <= (side * 2.0) ** 2


def test_black_and_grey_are_not_tissue() -> None:
    image = glass(100, 100)
    image[:20] = 5
    image[80:] = 128
    image[40:60] = PINK
    rows = np.nonzero(tissue_pixels(image).mean(axis=1) > 0.5)[0]
    assert (rows.min(), rows.max()) == (pytest.approx(40, abs=1), pytest.approx(59, abs=1))


def _fluorescence(colour: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A disc of radius 100 pixels of one stain on a dark, noisy background."""
    image = np.random.default_rng(seed).normal(12, 3, (600, 800, 3)).clip(0, 40)
    image[_disc(600, 800, 300, 400, 100)] += colour
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("colour", [(0, 0, 120), (20, 200, 30), (60, 0, 0)])
def test_a_dark_background_is_refused_or_what_is_bright_is_tissue(
    make_slide: MakeSlide, colour: tuple[int, int, int]
) -> None:
    with open_slide(make_slide(_fluorescence(colour), 2.0)) as slide:
        with pytest.raises(SlideError, match=r"slide\.tiff': its background is dark and [67]\..% of it are bright"):
            find_tissue(slide)
        mask = find_tissue(slide, dark_field="tissue")
    assert mask.area_um2 == pytest.approx(np.pi * 200**2, rel=0.1)
    assert mask.mask_HW[75, 100]


def test_a_black_slide_has_no_tissue_and_is_no_fluorescence(make_slide: MakeSlide) -> None:
    noise = np.random.default_rng(0).normal(10, 4, (400, 400, 3)).clip(0, 255).astype(np.uint8)
    for image in (plain(400, 400, (0, 0, 0)), noise):
        with open_slide(make_slide(image, 2.0)) as slide:
            for dark_field in ("refuse", "tissue"):
                assert not find_tissue(slide, dark_field=dark_field).mask_HW.any()


def test_what_was_not_scanned_is_neither_tissue_nor_background() -> None:
    image = np.full((900, 1200, 3), 255, np.uint8)
    image[150:750, 200:1000] = _fluorescence((0, 0, 150))
    bright_HW = bright_pixels(image)
    assert bright_HW is not None
    assert bright_HW.sum() == pytest.approx(np.pi * 100**2, rel=0.05)


def test_black_fill_and_ink_do_not_make_a_bright_field_slide_dark(make_slide: MakeSlide) -> None:
    filled = glass(600, 600)
    filled[:, :360] = 0
    filled[200:400, 400:550] = PINK
    inked = plain(600, 600, (255, 255, 255))
    inked[20:160, 20:160] = 10
    inked[300:350, 300:350] = PINK
    for image, area_um2 in ((filled, 400 * 300), (inked, 100 * 100)):
        with open_slide(make_slide(image, 2.0)) as slide:
            mask = find_tissue(slide, min_area_um2=5000.0)
        assert mask.area_um2 == pytest.approx(area_um2, rel=0.15)


def test_the_switch_leaves_bright_field_slides_as_they_are(make_slide: MakeSlide) -> None:
    image = glass(400, 400)
    image[100:300, 100:300] = PINK
    with open_slide(make_slide(image, 2.0)) as slide:
        assert find_tissue(slide).sha256() == find_tissue(slide, dark_field="tissue").sha256()


@pytest.mark.parametrize("strip_px", [1, 300, 301, 4000])
def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch, strip_px: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (97, 150, 3), dtype=np.uint8)
    dark = (image // 8 + 100 * (image[..., :1] > 250)).astype(np.uint8)
    x_um, y_um = np.meshgrid(np.arange(0.0, 150.0, 3.3), np.arange(0.0, 97.0, 3.3))
    functions = (
        tissue_pixels,
        bright_pixels,
        find_pen,
        lambda image: without_small(image[..., 0] > 128, 5),
        lambda image: TissueMask(image[..., 0] > 128, 1.0).fraction(x_um, y_um, 7.7),
    )
    whole = [function(picture) for function in functions for picture in (image, dark)]
    monkeypatch.setattr("gigamil.slides.tissue.STRIP_PX", strip_px)
    parts = [function(picture) for function in functions for picture in (image, dark)]
    assert whole[2] is None
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole[3].any()


def test_memory_is_a_few_bytes_per_pixel(tmp_path: Path, make_slide: MakeSlide) -> None:
    """A slide of 76 x 26 mm has a mask of 31 million pixels; in floats its colours would not fit a worker."""
    image = plain(2000, 3000, WHITE)
    image[_disc(2000, 3000, 1000, 1000, 900)] = PINK
    with open_slide(make_slide(plain(64, 64), 8.0)) as slide:
        info = replace(slide.info, width=3000, height=2000)
        mask = TissueMask(_disc(2000, 3000, 1000, 1000, 900), 8.0)
        for function in (
            lambda: find_tissue(slide, thumbnail_HW3=image),
            lambda: find_pen(image),
            lambda: mask.fraction(np.zeros(9), np.zeros(9), 100.0),
            lambda: write_mask_geojson(tmp_path / "s.geojson", mask, info),
            lambda: load_mask(tmp_path / "s.geojson", info, 8.0),
        ):
            tracemalloc.start()
            function()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 12 * mask.mask_HW.size + 40e6


def test_a_coarse_slide_is_masked_at_its_own_mpp(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(64, 64, PINK), 30.0)) as slide:
        mask = find_tissue(slide, tissue_mpp=8.0)
    assert mask.mpp == pytest.approx(30.0)
    assert mask.mask_HW.shape == (64, 64)


def test_fraction_is_exact_between_mask_pixels() -> None:
    mask = TissueMask(np.array([[True, False], [False, False]]), 10.0)
    x_um = np.array([0.0, 5.0, 2.5, -5.0, 10.0, 100.0])
    fraction = mask.fraction(x_um, np.zeros(6), 10.0)
    np.testing.assert_allclose(fraction, [1.0, 0.5, 0.75, 0.5, 0.0, 0.0], atol=1e-12)
    assert mask.fraction(0.0, 0.0, 20.0) == pytest.approx(0.25)
    assert mask.fraction(0.0, 0.0, 40.0) == pytest.approx(1 / 16)


def test_fraction_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    mask_HW = rng.random((30, 40)) < 0.4
    x, y, width, height = (rng.integers(low, high, 50) for low, high in ((0, 30), (0, 20), (1, 10), (1, 10)))
    expected = [mask_HW[b : b + h, a : a + w].mean() for a, b, w, h in zip(x, y, width, height, strict=True)]
    found = TissueMask(mask_HW, 4.0).fraction(x * 4.0, y * 4.0, width * 4.0, height * 4.0)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_digest_sees_pixels_shape_and_scale() -> None:
    base = TissueMask(np.zeros((4, 6), bool), 8.0)
    changed = base.mask_HW.copy()
    changed[2, 3] = True
    others = [TissueMask(changed, 8.0), TissueMask(np.zeros((6, 4), bool), 8.0), TissueMask(base.mask_HW, 8.5)]
    assert base.sha256() == TissueMask(np.zeros((4, 6), bool), 8.0).sha256()
    assert len({base.sha256(), *(other.sha256() for other in others)}) == 4


def test_otsu_splits_two_peaks_and_survives_one() -> None:
    two = np.concatenate([np.full(900, 0.1), np.full(100, 0.7)])
    one = np.full(100, 0.4)
    assert 0.1 < otsu_threshold(np.histogram(two, bins=256, range=(0, 1))[0]) < 0.7
    assert otsu_threshold(np.histogram(one, bins=256, range=(0, 1))[0]) == 0.0
