"""The tissue mask: areas, specks, holes, empty and full slides."""

import numpy as np
import pytest

from gigamil.slides.reader import open_slide
from gigamil.slides.tissue import TissueMask, find_tissue, otsu_threshold, tissue_pixels

from .conftest import PINK, MakeSlide, glass, plain


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


def test_black_and_grey_are_not_tissue() -> None:
    image = glass(100, 100)
    image[:20] = 5
    image[80:] = 128
    image[40:60] = PINK
    rows = np.nonzero(tissue_pixels(image).mean(axis=1) > 0.5)[0]
    assert (rows.min(), rows.max()) == (pytest.approx(40, abs=1), pytest.approx(59, abs=1))


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
    x, y, side = rng.integers(0, 30, 50), rng.integers(0, 20, 50), rng.integers(1, 10, 50)
    expected = [mask_HW[b : b + s, a : a + s].mean() for a, b, s in zip(x, y, side, strict=True)]
    np.testing.assert_allclose(TissueMask(mask_HW, 4.0).fraction(x * 4.0, y * 4.0, side * 4.0), expected, atol=1e-12)


def test_digest_sees_pixels_shape_and_scale() -> None:
    base = TissueMask(np.zeros((4, 6), bool), 8.0)
    changed = base.mask_HW.copy()
    changed[2, 3] = True
    others = [TissueMask(changed, 8.0), TissueMask(np.zeros((6, 4), bool), 8.0), TissueMask(base.mask_HW, 8.5)]
    assert base.sha256() == TissueMask(np.zeros((4, 6), bool), 8.0).sha256()
    assert len({base.sha256(), *(other.sha256() for other in others)}) == 4


def test_otsu_splits_two_peaks_and_survives_one() -> None:
    two = np.concatenate([np.full(900, 0.1), np.full(100, 0.7)])
    assert 0.1 < otsu_threshold(two) < 0.7
    assert otsu_threshold(np.full(100, 0.4)) == 0.0
