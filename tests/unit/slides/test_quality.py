"""Focus and pen marks, on painted and on real tiles."""

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from gigamil.slides import open_slide
from gigamil.slides.quality import find_pen, sharpness
from gigamil.testing.slides import synthetic_slide

from .conftest import PINK, glass, plain

INKS = {
    "blue": (30, 70, 200),
    "cyan": (40, 160, 210),
    "green": (30, 140, 80),
    "black": (25, 25, 30),
    "red": (215, 30, 45),
}
# Colours of tissue at thumbnail scale, dense and pale: none of them is ink.
STAINS = {
    "hematoxylin": (0.65, 0.70, 0.29),
    "bluish hematoxylin": (0.70, 0.66, 0.30),
    "eosin": (0.07, 0.99, 0.11),
    "DAB": (0.27, 0.57, 0.78),
    "blood": (0.13, 0.65, 0.52),
}


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """Synthetic H&E, uint8 (640, 640, 3) at 0.5 um, from inside the tissue."""
    image: np.ndarray = synthetic_slide(3, tumour=True, size_um=(800.0, 800.0)).image_HW3
    middle = image.shape[0] // 2, image.shape[1] // 2
    return image[middle[0] - 320 : middle[0] + 320, middle[1] - 320 : middle[1] + 320]


def blurred(image_HW3: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HW3).filter(ImageFilter.GaussianBlur(radius)))


def test_less_focus_is_less_sharp(tissue: np.ndarray) -> None:
    values = [sharpness(tissue), *(sharpness(blurred(tissue, radius)) for radius in (1, 2, 4))]
    assert all(more > 2 * less for more, less in itertools.pairwise(values)), values


def test_tiles_of_any_size_have_the_same_sharpness(tissue: np.ndarray) -> None:
    whole = sharpness(tissue)
    for tile_px in (64, 128, 320):
        tiles = [
            sharpness(tissue[y : y + tile_px, x : x + tile_px])
            for y in range(0, 640, tile_px)
            for x in range(0, 640, tile_px)
        ]
        assert np.mean(tiles) == pytest.approx(whole, rel=0.1)


def test_glass_beside_the_tissue_does_not_count(tissue: np.ndarray) -> None:
    half = tissue.copy()
    half[:, 320:] = glass(640, 320)
    assert sharpness(half) == pytest.approx(sharpness(tissue[:, :320]), rel=0.05)
    assert sharpness(glass(64, 64)) == 0.0
    assert sharpness(plain(64, 64, PINK)) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("ink", INKS)
def test_strokes_are_found_on_glass_and_nothing_else(ink: str) -> None:
    image = Image.fromarray(glass(200, 300))
    ImageDraw.Draw(image).line([(40, 20), (150, 120), (260, 40)], fill=INKS[ink], width=6)
    drawn = np.asarray(image).min(axis=2) < 215
    found = find_pen(np.asarray(image))
    assert found[drawn].mean() > 0.97
    assert not found[140:].any()
    assert found.sum() < 2.2 * drawn.sum()  # the stroke and a rim


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("density", [0.1, 0.3, 0.6, 1.0])
def test_stains_are_no_ink(stain: str, density: float) -> None:
    colour = 245 * 10 ** (-density * np.array(STAINS[stain]))
    assert not find_pen(plain(40, 40, tuple(colour.astype(int)))).any()


def test_specks_of_colour_are_no_strokes() -> None:
    image = glass(100, 100)
    image[50:53, 50:54] = INKS["blue"]
    assert not find_pen(image).any()


@pytest.mark.real_data
def test_real_tissue_is_no_ink_and_in_focus(real_data: Path) -> None:
    with open_slide(real_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        assert not find_pen(slide.thumbnail(8.0)).any()
        tile_HW3 = slide.read_um(500, 900, 112, 112, 224, 224)
    assert sharpness(tile_HW3) > 500 > 2 * sharpness(blurred(tile_HW3, 2))
    with open_slide(real_data / "wsi" / "camelyon16-overview.dicom") as slide:
        found = find_pen(slide.thumbnail(29.0))
    rows, cols = np.nonzero(found)
    assert 0 < len(rows) < 600  # the one blue spot at the upper edge
    assert (rows.max(), cols.max()) < (25, 260)
    with tarfile.open(real_data / "lung_tiles" / "lung_tiles.tar") as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".jpg")][::25]
        tiles = [Image.open(io.BytesIO(tar.extractfile(member).read())) for member in members]  # type: ignore[union-attr]
    small = [np.asarray(tile.convert("RGB").resize((28, 28), Image.Resampling.BOX)) for tile in tiles]
    assert not find_pen(np.concatenate(small, axis=1)).any()
