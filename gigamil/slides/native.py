"""Tiles that a slide file already holds as JPEG: copied instead of decoded, resampled and encoded once more."""

from types import TracebackType
from typing import Self

import numpy as np

from gigamil.slides.reader import Slide
from gigamil.slides.tiff import JpegTiles, NotTiled, is_sound


class NotNative(ValueError):
    """The file has no tiles of the wanted kind to copy; the text says why, in a few words."""


class NativeTiles:
    """The file's own JPEG tiles of one level, laid from its corner. It reads from its slide, which must stay open.

    Attributes:
        level: of the pyramid.
        mpp_x, mpp_y: micron per pixel of the level, within the tolerance of the wanted ones but not rounded to them.
        num_x, num_y: columns and rows, those that hang over the edge of the level too.
        tile_px: side of a tile.
    """

    def __init__(self, slide: Slide, tiles: JpegTiles, level: int) -> None:
        """Use `native_tiles` instead."""
        chosen = tiles.level(level)
        self.level, self.tile_px = level, chosen.tile_w
        self.mpp_x, self.mpp_y = slide.info.mpp_L2[level].tolist()
        self.num_x, self.num_y = chosen.num_x, -(-chosen.height // chosen.tile_h)
        self._whole = chosen.width // chosen.tile_w, chosen.height // chosen.tile_h
        self._tiles: JpegTiles | None = tiles

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the slide, which stays open."""
        self._tiles = None

    def jpeg(self, col: int, row: int) -> bytes | None:
        """A tile as a JPEG file, its compressed pixels those in the slide file, without comments or other metadata.

        Returns:
            The bytes; None if the tile hangs over the edge of the level, is empty in the file, is no plain JPEG of 8
            bit, or does not decode without a warning. Such a tile is to be read with `Slide.read_um` from the level.
        Raises:
            IndexError: no such column or row.
        Cost: reads it, and decodes it at an eighth of its size, which finds damage: about 0.15 ms at 256 pixels.
        """
        if self._tiles is None:
            raise ValueError("these tiles are closed")
        if not (0 <= col < self.num_x and 0 <= row < self.num_y):
            raise IndexError(f"tile ({col}, {row}) is outside the {self.num_x} x {self.num_y} tiles of the level")
        if col >= self._whole[0] or row >= self._whole[1]:
            return None
        jpeg = self._tiles.jpeg(self.level, col, row)
        return jpeg if jpeg is not None and is_sound(jpeg) else None


def native_tiles(slide: Slide, tile_px: int, tile_mpp: float, tolerance: float) -> NativeTiles:
    """The file's own tiles, if they are of the wanted size and scale.

    For SVS and generic tiled TIFF with 8-bit JPEG; frames of DICOM are not copied. Three tiles are compared with what
    OpenSlide shows before any is trusted.

    Args:
        slide: an open slide.
        tile_px: wanted side in pixels.
        tile_mpp: wanted micron per pixel.
        tolerance: largest relative difference to it, on each axis (0.02: 2 %).
    Raises:
        NotNative: there are none; says why.
    Cost: the structure of the file, and three tiles decoded twice.
    """
    if slide.icc_applied:
        raise NotNative("colours are turned into sRGB (slides.icc=apply)")
    level = slide.info.nearest_level(tile_mpp, tile_mpp)
    mpp_2 = slide.info.mpp_L2[level]
    if np.abs(mpp_2 / tile_mpp - 1).max() > tolerance + 1e-9:
        nearest = "/".join(f"{value:.4g}" for value in dict.fromkeys(mpp_2.tolist()))
        raise NotNative(f"no level within {tolerance:.3g} of {tile_mpp:g} um/px; the nearest has {nearest}")
    try:
        tiles = slide.tiles(level)
    except NotTiled as reason:
        raise NotNative(str(reason)) from reason
    found = tiles.level(level)
    if (found.tile_w, found.tile_h) != (tile_px, tile_px):
        raise NotNative(f"tiles of {found.tile_w} x {found.tile_h} px in the file, {tile_px} px wanted")
    return NativeTiles(slide, tiles, level)
