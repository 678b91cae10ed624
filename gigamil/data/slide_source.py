"""Tiles straight from the slide files (`data.source: slides`): shards then hold positions and no pixels."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from gigamil.config.schema import RunConfig, Slides
from gigamil.data.blocks import SlideGrid, slide_grid
from gigamil.data.mosaic import Mosaic
from gigamil.data.source import DECODED_BYTES, NUM_GRIDS
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
        config: size of a tile, and threads that read the tiles of a block.
    """

    dim = None
    block = 16  # 40 ms where tiles are resampled

    def __init__(self, shards: ShardSet, paths: Mapping[str, Path], config: RunConfig) -> None:
        self._shards = shards
        self._paths = paths
        self._tile_px = config.slides.tile_px
        self._pool = SlidePool()
        self._known: set[str] = set()
        self._mosaic = Mosaic(self._tile_px, config.execution.decode_workers, self.block, DECODED_BYTES)
        self._squares = lru_cache(NUM_GRIDS)(_squares)

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
        index, rows = self.index(slide_id), slice(start, stop)
        corner_n2_um = np.column_stack([index.x_um[rows], index.y_um[rows]])
        return self._read(slide_id, corner_n2_um, lambda position: f"tile {start + position}", out)

    def grid(self, slide_id: str) -> SlideGrid:
        """The grid that the slide's tiles lie on."""
        return slide_grid(self._shards.manifest(slide_id), self.index(slide_id))

    def read_block(self, slide_id: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Put a block together of the squares of the grid that it touches, tissue or not.

        Each is read as its tile is. Resampled as a whole, a block would differ from its neighbours by a grey level here
        and there, as the kernel's place is rounded from the corner of what is read.

        Returns:
            uint8 (height, width, 3), RGB.
        Raises:
            SlideError, ShardError: as `read_tiles`; of several squares the first, row by row.
        Cost: see `Mosaic.block`.
        """
        manifest = self._shards.manifest(slide_id)
        number_hw = self._squares(manifest.num_y, manifest.num_x)
        return self._mosaic.block(slide_id, number_hw, self._read_squares, (top, left, height, width))

    def _read_squares(self, slide_id: str, start: int, stop: int) -> np.ndarray:
        """Squares of the slide's grid, numbered row by row."""
        manifest = self._shards.manifest(slide_id)
        row_n, col_n = np.divmod(np.arange(start, stop), manifest.num_x)
        corner_n2_um = np.column_stack([col_n * manifest.tile_width_um, row_n * manifest.tile_height_um])
        return self._read(
            slide_id, corner_n2_um, lambda position: self._name(slide_id, row_n[position], col_n[position])
        )

    def _name(self, slide_id: str, row: int, col: int) -> str:
        """What a square is called in messages."""
        found = np.flatnonzero((self.grid(slide_id).cell_N2 == (row, col)).all(axis=1))
        return f"tile {found[0]}" if len(found) else f"row {row}, column {col} of its grid, where no tile is"

    def _read(
        self, slide_id: str, corner_n2_um: np.ndarray, name: Callable[[int], str], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Squares of the size of a tile with their top left corners (x, y) there; `name` is for messages."""
        manifest = self._shards.manifest(slide_id)
        if out is None:
            out = np.empty((len(corner_n2_um), self._tile_px, self._tile_px, 3), dtype=np.uint8)
        slide, level = self._slide_and_level(manifest)
        size_um = manifest.tile_width_um, manifest.tile_height_um
        for position, (x_um, y_um) in enumerate(corner_n2_um.tolist()):
            try:
                out[position] = slide.read_um(x_um, y_um, *size_um, self._tile_px, self._tile_px, level=level)
            except SlideError as error:
                raise SlideError(f"slide '{slide_id}', {name(position)}: {error}") from error
        return out

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


def _squares(num_y: int, num_x: int) -> np.ndarray:
    """int32 (num_y, num_x): numbers of the squares of a grid, row by row."""
    return np.arange(num_y * num_x, dtype=np.int32).reshape(num_y, num_x)
