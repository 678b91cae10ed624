"""Tiles straight from the slide files (`data.source: slides`): shards then hold positions and no pixels."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gigamil.config.schema import RunConfig, Slides
from gigamil.data.blocks import SlideGrid, slide_grid
from gigamil.errors import SlideError
from gigamil.shards.index import SlideIndex
from gigamil.shards.job import fingerprint
from gigamil.shards.manifest import SlideManifest
from gigamil.shards.read import ShardSet
from gigamil.slides.pool import SlidePool
from gigamil.slides.reader import Slide


class SlideSource:
    """Pixels of the tiles that `gigamil tile` chose, read where they lie.

    Where tiles are the file's own (`way: raw` in the manifest), pixels equal those of their copies in shards. Others are
    resampled, without the loss of a JPEG between.

    Args:
        shards: which tiles, and how the slide was opened.
        paths: slide file of each slide that will be read.
        config: size of a tile.
    """

    dim = None
    block = 16  # 40 ms where tiles are resampled

    def __init__(self, shards: ShardSet, paths: Mapping[str, Path], config: RunConfig) -> None:
        self._shards = shards
        self._paths = paths
        self._tile_px = config.slides.tile_px
        self._pool = SlidePool()
        self._known: set[str] = set()

    def index(self, slide_id: str) -> SlideIndex:
        """The slide's index."""
        return self._shards.index(slide_id)

    def read_tiles(self, slide_id: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read tiles start..stop - 1 in stored order; threads open slides of their own.

        Returns:
            uint8 (n, tile_px, tile_px, 3), RGB.
        Raises:
            SlideError: the slide file is missing, damaged, or not the one that was tiled; names slide and tile.
            ShardError: the slide was not tiled.
        Cost: that of `Slide.read_um` for each tile.
        """
        manifest, index = self._shards.manifest(slide_id), self.index(slide_id)
        if out is None:
            out = np.empty((stop - start, self._tile_px, self._tile_px, 3), dtype=np.uint8)
        slide, level = self._slide_and_level(manifest)
        size_um = manifest.tile_width_um, manifest.tile_height_um
        for number in range(start, stop):
            x_um, y_um = float(index.x_um[number]), float(index.y_um[number])
            try:
                out[number - start] = slide.read_um(x_um, y_um, *size_um, self._tile_px, self._tile_px, level=level)
            except SlideError as error:
                raise SlideError(f"slide '{slide_id}', tile {number}: {error}") from error
        return out

    def grid(self, slide_id: str) -> SlideGrid:
        """The grid that the slide's tiles lie on."""
        return slide_grid(self._shards.manifest(slide_id), self.index(slide_id))

    def read_block(self, slide_id: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Read a block on the pixels of the tiles, with all that is between them.

        Returns:
            uint8 (height, width, 3), RGB.
        Raises:
            SlideError, ShardError: as `read_tiles`.
        """
        manifest = self._shards.manifest(slide_id)
        slide, level = self._slide_and_level(manifest)
        mpp_x, mpp_y = manifest.pixel_mpp_x, manifest.pixel_mpp_y
        box_um = (left * mpp_x, top * mpp_y, width * mpp_x, height * mpp_y)
        try:
            return slide.read_um(*box_um, width, height, level=level)
        except SlideError as error:
            raise SlideError(f"slide '{slide_id}', block at ({left}, {top}): {error}") from error

    def _slide_and_level(self, manifest: SlideManifest) -> tuple[Slide, int | None]:
        """Tiles that are the file's own are of one level, and those beside them too; else the reader chooses."""
        slide, is_raw = self._open(manifest), manifest.way == "raw"
        return slide, slide.info.nearest_level(manifest.pixel_mpp_x, manifest.pixel_mpp_y) if is_raw else None

    def _open(self, manifest: SlideManifest) -> Slide:
        slide_id, path = manifest.slide_id, self._paths.get(manifest.slide_id)
        if path is None:
            raise SlideError(f"slide '{slide_id}' has no row in the slide table, which names its file")
        tiled = Slides(**{key: value for key, value in manifest.settings.items() if key in Slides.model_fields})
        try:
            if slide_id not in self._known and fingerprint(path) != manifest.source_fingerprint:
                raise SlideError(f"'{path}' is not the file that was tiled. Put it back, or run `gigamil tile` again.")
            self._known.add(slide_id)
            mpp = manifest.mpp_x if manifest.mpp_source == "table" else None
            return self._pool.get(path, mpp=mpp, default_mpp=tiled.default_mpp, icc=tiled.icc)
        except OSError as error:
            raise SlideError(f"slide '{slide_id}': {error}") from error
