"""A picture of a whole slide out of its shards alone, sharp enough to look at."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gigamil.data.decode import decode_tiles
from gigamil.errors import ShardError

if TYPE_CHECKING:
    from gigamil.shards.read import ShardSet

Pixels = NDArray[np.uint8]
ReadTiles = Callable[[str, int, int], Pixels]  # slide id, first tile, one past the last -> uint8 (n, H, W, 3)
# A printed half page at 150 dpi. A biopsy of 1 mm has 125 pixels in a thumbnail of 8 um per pixel, which is a blur.
WANTED_PX = 1000
CHUNK = 256  # tiles decoded at once, 40 MB at 224 pixels


def slide_picture(shards: "ShardSet", slide_id: str, read: ReadTiles | None = None) -> tuple[Pixels, float]:
    """Give the thumbnail of a slide, sharpened with its tiles where the thumbnail is small.

    Args:
        read: reads and decodes tiles; None reads those that are stored.
    Returns:
        uint8 (H, W, 3), and its micron per pixel (that of the tiles at the finest); pixel (0, 0) starts at the corner
        of level 0.
    Raises:
        ShardError: the thumbnail or a tile is damaged.
    Cost: a small slide is decoded once (at most about (WANTED_PX * thumbnail_mpp / stride_um)**2 tiles); a large one never.
    """
    thumbnail_HW3, thumbnail_mpp = shards.thumbnail(slide_id)
    height, width = thumbnail_HW3.shape[:2]
    mpp = max(shards.manifest(slide_id).tile_mpp, max(height, width) * thumbnail_mpp / WANTED_PX)
    if mpp >= thumbnail_mpp:
        return thumbnail_HW3, thumbnail_mpp
    size = round(width * thumbnail_mpp / mpp), round(height * thumbnail_mpp / mpp)
    picture = Image.fromarray(thumbnail_HW3).resize(size, Image.Resampling.BICUBIC)
    _paste_tiles(picture, mpp, shards, slide_id, read or partial(read_tiles, shards))
    return np.asarray(picture), mpp


def read_tiles(shards: "ShardSet", slide_id: str, start: int, stop: int) -> Pixels:
    """Read and decode tiles start..stop-1 of a slide in stored order, uint8 (n, H, W, 3).

    Raises:
        ShardError: a tile is damaged; names the slide and the tiles.
    """
    try:
        return decode_tiles(shards.read_span(slide_id, start, stop), shards.manifest(slide_id).tile_px)
    except ShardError as error:
        raise ShardError(f"slide '{slide_id}', tiles {start} to {stop - 1}: {error}") from error


def _paste_tiles(picture: Image.Image, mpp: float, shards: "ShardSet", slide_id: str, read: ReadTiles) -> None:
    manifest, index = shards.manifest(slide_id), shards.index(slide_id)
    for start in range(0, len(index), CHUNK):
        stop = min(start + CHUNK, len(index))
        tiles_nHW3 = read(slide_id, start, stop)
        for tile_HW3, x_um, y_um in zip(tiles_nHW3, index.x_um[start:stop], index.y_um[start:stop], strict=True):
            # Both edges are rounded, not corner and size: neighbours then meet without a seam.
            left, right = round(x_um / mpp), round((x_um + manifest.tile_width_um) / mpp)
            upper, lower = round(y_um / mpp), round((y_um + manifest.tile_height_um) / mpp)
            size = max(1, right - left), max(1, lower - upper)
            small = Image.fromarray(tile_HW3).resize(size, Image.Resampling.BOX)
            picture.paste(small, (left, upper))
