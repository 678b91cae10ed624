"""Tiles that are the file's own of a reduced level: their neighbours and `data.source: slides` take that level too."""

import itertools
from pathlib import Path

import numpy as np
import simplejpeg

from gigamil.config.schema import RunConfig, Slides
from gigamil.data.slide_source import SlideSource
from gigamil.data.source import ShardSource
from gigamil.partition.curve import hilbert_sort
from gigamil.shards.build import build_slide
from gigamil.shards.job import SlideJob
from gigamil.shards.read import ShardSet
from gigamil.slides.reader import open_slide

from .conftest import MakeSlide

TILE_PX = 32
APERIO = "Aperio Image Library v1\r\n100x100 (64x64) JPEG/RGB Q=30|AppMag = 40|MPP = 0.25"


def test_every_tile_is_read_from_the_level_whose_tiles_are_copied(tmp_path: Path, make_slide: MakeSlide) -> None:
    """Noise, which a level that went through JPEG a second time shows otherwise than level 0 halved."""
    image = np.random.default_rng(0).integers((60, 30, 60), (190, 90, 190), (1031, 1101, 3)).astype(np.uint8)
    path = make_slide(image, None, "slide.svs", tile=TILE_PX, description=APERIO)
    settings = Slides(tile_px=TILE_PX, tile_mpp=0.5, min_tissue=0.1, min_tissue_area_um2=100.0)
    manifest = build_slide(SlideJob("s", path, None, settings, tmp_path / "shards", hilbert_sort))
    assert (manifest.way, manifest.pixel_mpp_x) == ("raw", 0.25 * 1101 / 550)
    num, shards = manifest.num_tiles, ShardSet(tmp_path / "shards")
    stored = ShardSource(shards, TILE_PX).read_tiles("s", 0, num)
    read = SlideSource(shards, {"s": path}, RunConfig(slides=settings)).read_tiles("s", 0, num)
    is_raw = (stored == read).all(axis=(1, 2, 3))
    assert 200 < is_raw.sum() == manifest.num_raw < num
    for tile_HW3, jpeg in zip(read[~is_raw], itertools.compress(shards.read_span("s", 0, num), ~is_raw), strict=True):
        assert jpeg == simplejpeg.encode_jpeg(tile_HW3, quality=settings.jpeg_quality, colorsubsampling="420")
    with open_slide(path) as slide:
        x_um, y_um = (float(column[-1]) for column in (shards.index("s").x_um, shards.index("s").y_um))
        sizes = manifest.tile_width_um, manifest.tile_height_um, TILE_PX, TILE_PX
        assert np.array_equal(read[-1], slide.read_um(x_um, y_um, *sizes, level=1))
        assert not np.array_equal(read[-1], slide.read_um(x_um, y_um, *sizes))
