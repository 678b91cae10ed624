"""Overviews and contact sheets: lines where tissue and tiles are, every slide in its place, nothing that runs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigamil.slides.grid import TileGrid
from gigamil.slides.overview import COLUMNS, OUTLINE, ROWS, TILES, draw_overview, write_contact_sheet
from gigamil.slides.tissue import TissueMask

from .conftest import plain

MASK = TissueMask(np.pad(np.ones((40, 60), bool), 20), 10.0)  # 1000 x 800 um, tissue from 200 to 800 x 600


def are(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    found: np.ndarray = (np.asarray(picture) == colour).all(axis=2)
    return found


def test_the_outline_encloses_the_tissue_and_frames_the_tiles() -> None:
    grid = TileGrid.square(1000.0, 800.0, 100, 1.0)
    chosen = np.array([grid.index(2, 2), grid.index(3, 2)])
    picture = draw_overview(plain(80, 100, (200, 150, 180)), MASK, grid, chosen)
    assert picture.size == (1000, 800)  # 1 pixel per micron
    outline, tiles = are(picture, OUTLINE), are(picture, TILES)
    rows, cols = np.nonzero(outline)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (200, 599, 200, 799)
    assert not outline[210:590, 210:790].any()
    assert tiles[300, 300:400].all()
    assert tiles[250, [300, 400]].all()
    assert not tiles[205:295, 305:395].any()
    assert not tiles[:, 450:].any()
    again = draw_overview(plain(80, 100, (200, 150, 180)), MASK, grid, chosen)
    assert picture.tobytes() == again.tobytes()


def test_tiles_too_small_for_frames_are_tinted() -> None:
    grid = TileGrid.square(1000.0, 800.0, 4, 1.0)
    chosen = np.arange(grid.num_tiles)[grid.col_row(np.arange(grid.num_tiles))[0] < 100]
    pixels = np.asarray(draw_overview(plain(80, 100), MASK, grid, chosen)).astype(int)
    assert (pixels[300, 100] != pixels[300, 500]).any()
    assert not are(Image.fromarray(pixels.astype(np.uint8)), TILES).any()


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5000), (30, 20), (4000, 3000)])
def test_slides_of_any_size_give_a_picture_of_1000_to_2400_pixels(rows: int, cols: int) -> None:
    mask = TissueMask(np.ones((rows, cols), bool), 8.0)
    grid = TileGrid.square(cols * 8.0, rows * 8.0, 224, 1.0)
    picture = draw_overview(plain(rows, cols), mask, grid, np.arange(0))
    assert 1000 <= max(picture.size) <= 2400


def test_tiles_that_hang_over_the_edge_are_drawn_to_it() -> None:
    grid = TileGrid.square(1000.0, 800.0, 300, 1.0)
    picture = draw_overview(plain(80, 100), MASK, grid, np.arange(grid.num_tiles))
    assert are(picture, TILES)[-1, ::7].all()


def test_a_column_and_a_row_that_start_at_the_edge_are_drawn_on_it() -> None:
    """Rounded, they start behind the last pixel of the picture."""
    grid = TileGrid.square(1000.4, 800.4, 100, 1.0)
    nothing = TissueMask(np.zeros((80, 100), bool), 10.0)
    for cell in (grid.index(10, 0), grid.index(0, 8), grid.index(10, 8)):
        assert are(draw_overview(plain(80, 100), nothing, grid, np.array([cell])), TILES).any()


def test_a_contact_sheet_holds_every_slide_once_and_old_pages_go(tmp_path: Path) -> None:
    colours = [(10 * n, 255 - 10 * n, 128) for n in range(25)]
    slides = []
    for number, colour in enumerate(colours):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (600, 300), colour).save(path)
        slides.append((f"slide-{number}", f"{number} tiles", path))
    (tmp_path / "sheet").mkdir()
    (tmp_path / "sheet" / "page-009.jpg").touch()
    index = write_contact_sheet(tmp_path / "sheet", slides)
    assert sorted(path.name for path in index.parent.iterdir()) == ["index.html", "page-001.jpg", "page-002.jpg"]
    sheets = [np.asarray(Image.open(index.parent / f"page-00{n}.jpg")).astype(int) for n in (1, 2)]
    for number, colour in enumerate(colours):
        page, cell = divmod(number, COLUMNS * ROWS)
        row, col = divmod(cell, COLUMNS)
        height, width = sheets[page].shape[:2]
        y = (row + 0.6) * height / (ROWS if page == 0 else 1)
        x = (col + 0.5) * width / COLUMNS
        assert np.abs(sheets[page][int(y), int(x)] - colour).max() < 12
    text = index.read_text()
    assert "<h1>25 slides</h1>" in text
    assert "slide-20 to slide-24" in text


def test_a_hostile_name_and_a_broken_picture_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 and no more")
    names = ["<script>alert(1)</script>", "a\x1b[31m\n=cmd()", "é" * 300, "x"]
    paths = [tmp_path / "broken.jpg", tmp_path / "missing.jpg", tmp_path / "broken.jpg", tmp_path]
    index = write_contact_sheet(
        tmp_path / "sheet", [(name, name, path) for name, path in zip(names, paths, strict=True)]
    )
    text = index.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert write_contact_sheet(tmp_path / "empty", []).read_text().count("<img") == 0
