"""Tiles read from slide files are those in shards: equal where they are the file's own, else without the JPEG between."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from gigamil.config.schema import RunConfig, Slides
from gigamil.data.pipeline import StepLoader
from gigamil.data.slide_source import SlideSource
from gigamil.data.source import ShardSource
from gigamil.errors import SlideError
from gigamil.parallel.topology import Topology
from gigamil.partition.curve import hilbert_sort
from gigamil.partition.schedule import plan_steps
from gigamil.shards.build import build_slide
from gigamil.shards.job import SlideJob
from gigamil.shards.read import ShardSet
from gigamil.slides.reader import open_slide
from gigamil.testing.slides import write_pyramid_tiff

TILE_PX = 32
Make = Callable[..., tuple[ShardSet, SlideSource, Path]]


def paint(path: Path, seed: int = 0) -> None:
    """520 x 500 pixels, a tile and a bit more than whole ones: noise that JPEG keeps, on glass."""
    noise = np.random.default_rng(seed).integers(60, 190, (63, 65, 3), dtype=np.uint8)
    image = np.kron(noise, np.ones((8, 8, 1), np.uint8))[:500]
    image[:, :96] = image[:64] = 245
    write_pyramid_tiff(path, image, 0.5, tile=TILE_PX, quality=90)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(
        stored: bool = True, table_mpp: float | None = None, **slides: object
    ) -> tuple[ShardSet, SlideSource, Path]:
        path = tmp_path / "slide.tiff"
        paint(path)
        settings = Slides(tile_px=TILE_PX, min_tissue=0.1, min_tissue_area_um2=100.0, **{"tile_mpp": 0.5} | slides)
        build_slide(SlideJob("s", path, table_mpp, settings, tmp_path / "shards", hilbert_sort, stored))
        shards = ShardSet(tmp_path / "shards")
        return shards, SlideSource(shards, {"s": path}, RunConfig(slides=settings)), path

    return made


def test_raw_tiles_are_equal_bit_for_bit(make: Make) -> None:
    shards, slides, _ = make()
    manifest = shards.manifest("s")
    assert manifest.way == "raw"
    assert 0 < manifest.num_raw < manifest.num_tiles  # some hang over the edge
    num = manifest.num_tiles
    from_slide = slides.read_tiles("s", 0, num).astype(int)
    from_shards = ShardSource(shards, TILE_PX).read_tiles("s", 0, num).astype(int)
    index = shards.index("s")
    whole = (index.x_px0 + TILE_PX <= 520) & (index.y_px0 + TILE_PX <= 500)
    assert whole.sum() == manifest.num_raw
    np.testing.assert_array_equal(from_slide[whole], from_shards[whole])
    assert np.abs(from_slide - from_shards)[~whole].mean() < 4  # these went through JPEG once more


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "tile_px", "way"), [("svs", 240, "raw"), ("svs", 224, "resampled"), ("dicom", 224, "resampled")]
)
def test_real_slides(real_data: Path, tmp_path: Path, name: str, tile_px: int, way: str) -> None:
    path = real_data / "wsi" / f"CMU-1-Small-Region.{name}"
    settings = Slides(tile_px=tile_px, tile_mpp=0.5, min_tissue=0.5)
    manifest = build_slide(SlideJob("s", path, None, settings, tmp_path, hilbert_sort))
    assert manifest.way == way
    shards = ShardSet(tmp_path)
    slides = SlideSource(shards, {"s": path}, RunConfig(slides=settings))
    from_slide = slides.read_tiles("s", 0, manifest.num_tiles)
    if way == "raw":
        from_shards = ShardSource(shards, tile_px).read_tiles("s", 0, manifest.num_tiles)
        assert (from_slide == from_shards).all((1, 2, 3)).sum() >= manifest.num_raw > 10
    else:
        encoded = [simplejpeg.encode_jpeg(tile, quality=90, colorsubsampling="420") for tile in from_slide]
        assert encoded == shards.read_span("s", 0, manifest.num_tiles)


def test_other_tiles_are_those_of_the_reader(make: Make) -> None:
    shards, slides, path = make(tile_mpp=0.7)
    manifest, index = shards.manifest("s"), shards.index("s")
    assert manifest.way == "resampled"
    found = slides.read_tiles("s", 2, 6)
    with open_slide(path) as slide:
        for tile_HW3, x_um, y_um in zip(found, index.x_um[2:6], index.y_um[2:6], strict=True):
            np.testing.assert_array_equal(tile_HW3, slide.read_um(x_um, y_um, 22.4, 22.4, TILE_PX, TILE_PX))
    stored = ShardSource(shards, TILE_PX).read_tiles("s", 2, 6)
    assert np.abs(found.astype(int) - stored).mean() < 6


@pytest.mark.parametrize(("tile_mpp", "way"), [(0.5, "raw"), (0.3, "resampled"), (0.61, "resampled")])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_pixel_is_the_same_in_each_block_and_in_its_tile(make: Make, tile_mpp: float, way: str, workers: int) -> None:
    shards, _, path = make(stored=False, tile_mpp=tile_mpp)
    manifest = shards.manifest("s")
    assert manifest.way == way
    settings = {"slides": {"tile_px": TILE_PX}, "execution": {"decode_workers": workers}}

    def new() -> SlideSource:  # that keeps nothing yet
        return SlideSource(shards, {"s": path}, RunConfig.model_validate(settings))

    height, width = manifest.num_y * TILE_PX, manifest.num_x * TILE_PX
    whole_HW3 = new().read_block("s", 0, 0, height, width)
    for top, left, rows, cols in ((5, 9, 100, 131), (77, 0, 50, width), (height - 33, width - 70, 33, 70)):
        found = new().read_block("s", top, left, rows, cols)
        np.testing.assert_array_equal(found, whole_HW3[top : top + rows, left : left + cols])
    tiles = new().read_tiles("s", 0, manifest.num_tiles)
    for (row, col), tile_HW3 in zip(new().grid("s").cell_N2 * TILE_PX, tiles, strict=True):
        np.testing.assert_array_equal(whole_HW3[row : row + TILE_PX, col : col + TILE_PX], tile_HW3)


def test_positions_are_enough(make: Make) -> None:
    shards, slides, _ = make(stored=False)
    assert shards.manifest("s").tars == ()
    num = shards.manifest("s").num_tiles
    out = np.zeros((num + 1, TILE_PX, TILE_PX, 3), np.uint8)
    slides.read_tiles("s", 0, num, out[:num])
    np.testing.assert_array_equal(out[3:5], slides.read_tiles("s", 3, 5))
    assert not out[num].any()
    with pytest.raises(
        OSError, match=r"slide 's': only the positions of its tiles are in .* Set data\.source to slides"
    ):
        shards.read_span("s", 0, 1)


def test_the_mpp_of_the_table_is_used(make: Make) -> None:
    shards, slides, _ = make(table_mpp=1.0)  # the file says 0.5, and at 1.0 its level is enlarged
    assert shards.manifest("s").way == "resampled"
    stored = ShardSource(shards, TILE_PX).read_tiles("s", 0, 8).astype(int)
    assert np.abs(slides.read_tiles("s", 0, 8) - stored).mean() < 6


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_threads_read_the_same(make: Make, workers: int) -> None:
    shards, slides, _ = make(stored=False)
    sizes = [shards.manifest("s").num_tiles]
    plan = plan_steps([0], sizes, 1, 1, 1)[0]
    tiles = StepLoader(slides, ["s"], TILE_PX, Topology(), 0, decode_workers=workers).load(plan)
    assert torch.equal(tiles.images.read(0, sizes[0]), torch.from_numpy(slides.read_tiles("s", 0, sizes[0])))


def test_a_damaged_slide_is_named_with_its_tile(make: Make) -> None:
    _, slides, path = make()
    slides.read_tiles("s", 0, 1)
    with path.open("r+b") as file:  # under the open slide: its ends stay what they are
        file.seek(1 << 16)
        file.write(os.urandom(path.stat().st_size - (2 << 16)))
    num = slides.index("s").number.size
    with pytest.raises(SlideError, match=r"slide 's', tile \d+: "):
        for _ in range(2):
            slides.read_tiles("s", 0, num)
    height, width = slides.grid("s").num_y * TILE_PX, slides.grid("s").num_x * TILE_PX
    with pytest.raises(SlideError, match=r"slide 's', (tile \d+|row \d+, column \d+ of its grid, where no tile is): "):
        for _ in range(2):
            slides.read_block("s", 0, 0, height, width)


def test_another_file_of_this_name_is_refused(make: Make) -> None:
    shards, slides, path = make()
    paint(path, seed=1)
    with pytest.raises(SlideError, match=r"slide 's': '.*slide\.tiff' is not the file that was tiled. Put it back"):
        slides.read_tiles("s", 0, 1)
    path.unlink()
    with pytest.raises(SlideError, match=r"slide 's': .*slide\.tiff"):
        SlideSource(shards, {"s": path}, RunConfig()).read_tiles("s", 0, 1)
    with pytest.raises(SlideError, match="slide 's' has no row in the slide table"):
        SlideSource(shards, {}, RunConfig()).read_tiles("s", 0, 1)
