"""Shards without a slide file: for tests of what comes after tiling."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from gigamil.shards.format import FORMAT_VERSION, INDEX, MASK, OVERVIEW, THUMBNAIL, TILES_PER_TAR, TISSUE, tar_name
from gigamil.shards.index import SlideIndex, write_index
from gigamil.shards.manifest import SlideManifest, digest_file, settings_digest
from gigamil.shards.write import StoredTar, commit, discard, place_tiles, stage, write_tar


def noise_jpegs(num: int, tile_px: int, seed: int = 0) -> list[bytes]:
    """JPEG tiles of noise; no two are equal."""
    tiles = np.random.default_rng(seed).integers(0, 256, (num, tile_px, tile_px, 3), dtype=np.uint8)
    return [simplejpeg.encode_jpeg(tile, quality=90) for tile in tiles]


@contextmanager
def staged_slide(root: Path, slide_id: str) -> Iterator[Path]:
    """Give an empty staging folder for a slide; what is not committed when the block ends is deleted."""
    try:
        yield stage(root, slide_id)
    finally:
        discard(root, slide_id)


def write_tars(folder: Path, slide_id: str, jpegs: Iterable[bytes], tiles_per_tar: int) -> tuple[StoredTar, ...]:
    """Write tiles, numbered in the order given, to as many tars as needed."""
    groups = itertools.groupby(enumerate(jpegs), key=lambda tile: tile[0] // tiles_per_tar)
    return tuple(write_tar(folder / tar_name(tar), slide_id, tiles) for tar, tiles in groups)


def make_shards(
    root: Path,
    slide_id: str,
    jpegs: Sequence[bytes],
    *,
    tile_px: int,
    tile_mpp: float = 0.5,
    tiles_per_tar: int | None = None,
) -> SlideManifest:
    """Store given tiles as the finished shards of a slide.

    The tiles lie row by row on the smallest square grid that holds them; mpp of the slide and of the tiles are equal.
    """
    side = max(1, int(np.ceil(np.sqrt(len(jpegs)))))
    row, col = np.divmod(np.arange(len(jpegs), dtype=np.int64), side)
    with staged_slide(root, slide_id) as folder:
        tars = write_tars(folder, slide_id, jpegs, tiles_per_tar or TILES_PER_TAR)
        index = SlideIndex(
            **place_tiles(tars),
            x_um=col * tile_px * tile_mpp,
            y_um=row * tile_px * tile_mpp,
            x_px0=col * tile_px,
            y_px0=row * tile_px,
            tissue=np.ones(len(jpegs), np.float32),
            pen=np.zeros(len(jpegs), np.float32),
            sharpness=np.full(len(jpegs), np.nan, np.float32),
        )
        write_index(folder / INDEX, index)
        Image.new("RGB", (side * 8, side * 8), (230, 160, 200)).save(folder / THUMBNAIL)
        Image.new("1", (side * 8, side * 8), 1).save(folder / MASK)
        Image.new("RGB", (side * 8, side * 8), (230, 160, 200)).save(folder / OVERVIEW)
        (folder / TISSUE).write_text('{"type": "FeatureCollection", "features": []}\n')
        manifest = SlideManifest(
            format_version=FORMAT_VERSION,
            slide_id=slide_id,
            vendor="test",
            objective=None,
            width_px0=side * tile_px,
            height_px0=side * tile_px,
            bounds_x_px0=0,
            bounds_y_px0=0,
            mpp_x=tile_mpp,
            mpp_y=tile_mpp,
            mpp_source="table",
            icc_sha256=None,
            tile_px=tile_px,
            tile_mpp=tile_mpp,
            stride_px=tile_px,
            pixel_mpp_x=tile_mpp,
            pixel_mpp_y=tile_mpp,
            num_x=side,
            num_y=side,
            num_tiles=len(jpegs),
            num_raw=0,
            num_dropped=0,
            way="resampled",
            way_reason="made for a test",
            stored=True,
            tissue_area_mm2=1.0,
            thumbnail_mpp=tile_px * tile_mpp / 8,
            mask_sha256="",
            settings={"min_tissue": 0.25},
            settings_hash=settings_digest({"min_tissue": 0.25}),
            source_fingerprint="",
            tars=tuple(tar.file for tar in tars),
            index=digest_file(folder / INDEX),
            thumbnail=digest_file(folder / THUMBNAIL),
            mask=digest_file(folder / MASK),
            tissue=digest_file(folder / TISSUE),
            overview=digest_file(folder / OVERVIEW),
        )
        commit(root, folder, manifest)
    return manifest
