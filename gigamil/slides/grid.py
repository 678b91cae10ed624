"""The tile grid: index <-> position in micron, and the choice of tiles that hold tissue. No IO."""

import math
from dataclasses import dataclass
from typing import Self, overload

import numpy as np

from gigamil.errors import SlideError
from gigamil.slides.backend import shown
from gigamil.slides.reader import SlideInfo
from gigamil.slides.tissue import TissueMask

# A slide at twice the wanted mpp still shows nuclei; an overview image among the slides would give 28,000 blurs.
MAX_ENLARGEMENT = 4.0
# Tiles of a grid, with or without tissue: a slide of 100,000 x 100,000 pixels in tiles of 64 has 2.4 million.
MAX_GRID_TILES = 5_000_000


@dataclass(frozen=True)
class TileGrid:
    """Tiles of tile_px x tile_px pixels, laid from the corner of level 0 over a whole slide.

    Tiles are numbered row by row: index = row * num_x + col. Neighbours lie `stride_px` apart: they overlap where it is
    smaller than tile_px, and leave gaps where it is larger. The last column and row may hang over the edge, so no
    tissue is lost there; what hangs over is white. Units: micron.

    `mpp_x` and `mpp_y` are those of the tile's own pixels. `TileGrid.square` gives the grid of resampled tiles: the
    slide's own mpp plays no part there, so two copies of a slide in different formats get the same grid. Tiles that are
    copied from a file have the mpp of its level, and may be a little off square.

    Raises:
        ValueError: a size that is not positive and finite.
    """

    width_um: float
    height_um: float
    tile_px: int
    mpp_x: float
    mpp_y: float
    stride_px: int

    def __post_init__(self) -> None:
        for name in ("width_um", "height_um", "mpp_x", "mpp_y"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: a tile grid needs a positive, finite number")
        for name in ("tile_px", "stride_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a tile grid needs at least one pixel")

    @classmethod
    def square(
        cls, width_um: float, height_um: float, tile_px: int, tile_mpp: float, stride_px: int | None = None
    ) -> Self:
        """Grid of square pixels of `tile_mpp` micron; without a stride, tile follows tile."""
        return cls(width_um, height_um, tile_px, tile_mpp, tile_mpp, tile_px if stride_px is None else stride_px)

    @property
    def tile_width_um(self) -> float:
        """Width of a tile in micron."""
        return self.tile_px * self.mpp_x

    @property
    def tile_height_um(self) -> float:
        """Height of a tile in micron."""
        return self.tile_px * self.mpp_y

    @property
    def stride_x_um(self) -> float:
        """Distance of neighbouring columns in micron."""
        return self.stride_px * self.mpp_x

    @property
    def stride_y_um(self) -> float:
        """Distance of neighbouring rows in micron."""
        return self.stride_px * self.mpp_y

    @property
    def num_x(self) -> int:
        """Columns."""
        return _num_along(self.width_um, self.tile_width_um, self.stride_x_um)

    @property
    def num_y(self) -> int:
        """Rows."""
        return _num_along(self.height_um, self.tile_height_um, self.stride_y_um)

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole grid, with or without tissue."""
        return self.num_x * self.num_y

    @overload
    def col_row(self, index: int) -> tuple[int, int]: ...
    @overload
    def col_row(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def col_row(self, index: int | np.ndarray) -> tuple[int | np.ndarray, int | np.ndarray]:
        """Column and row of a tile, or of an integer array of tiles."""
        self._check(index, self.num_tiles, "index")
        return index % self.num_x, index // self.num_x

    @overload
    def index(self, col: int, row: int) -> int: ...
    @overload
    def index(self, col: np.ndarray, row: np.ndarray) -> np.ndarray: ...
    def index(self, col: int | np.ndarray, row: int | np.ndarray) -> int | np.ndarray:
        """Number of the tile at a column and row; inverse of `col_row`."""
        self._check(col, self.num_x, "col")
        self._check(row, self.num_y, "row")
        return row * self.num_x + col

    @overload
    def position_um(self, index: int) -> tuple[float, float]: ...
    @overload
    def position_um(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def position_um(self, index: int | np.ndarray) -> tuple[float | np.ndarray, float | np.ndarray]:
        """Top left corner (x_um, y_um) of a tile, or float64 arrays for an integer array of tiles."""
        col, row = self.col_row(index)
        return col * self.stride_x_um, row * self.stride_y_um

    @staticmethod
    def _check(value: int | np.ndarray, limit: int, name: str) -> None:
        values = np.asarray(value)
        if values.size and (values.min() < 0 or values.max() >= limit):
            raise IndexError(f"{name} {values.min()}..{values.max()} is outside 0..{limit - 1} of the tile grid")


def check_scale(info: SlideInfo, tile_mpp: float) -> None:
    """Refuse a slide that is far coarser than the tiles, before its thumbnail is read: that may be all of level 0.

    Raises:
        SlideError: its mpp is over four times `tile_mpp`.
    """
    slide_mpp = max(info.mpp_x, info.mpp_y)
    if slide_mpp > MAX_ENLARGEMENT * tile_mpp:
        raise SlideError(
            f"slide '{shown(info.path)}': its mpp {slide_mpp:g} ({info.mpp_source}) is over {MAX_ENLARGEMENT:g} times "
            f"slides.tile_mpp={tile_mpp:g}, so tiles would be blurs. Correct its mpp, raise slides.tile_mpp, or remove "
            "its row."
        )


def slide_grid(info: SlideInfo, tile_px: int, tile_mpp: float, stride_px: int | None = None) -> TileGrid:
    """`TileGrid.square` of a slide.

    Raises:
        SlideError: it has over 5 million tiles, which would fill the memory.
    """
    grid = TileGrid.square(info.width_um, info.height_um, tile_px, tile_mpp, stride_px)
    if grid.num_tiles > MAX_GRID_TILES:
        raise SlideError(
            f"slide '{shown(info.path)}': {grid.num_tiles} tiles in its grid, over {MAX_GRID_TILES}. Correct its mpp, "
            "or raise slides.tile_px, slides.stride_px or slides.tile_mpp."
        )
    return grid


def choose_tiles(grid: TileGrid, mask: TissueMask, min_tissue: float) -> tuple[np.ndarray, np.ndarray]:
    """Tiles with enough tissue, in the order of the grid.

    Tiles with a smaller share than `min_tissue` are dropped, and a tile without any tissue is dropped whatever
    `min_tissue` says. A part that hangs over the slide's edge counts as no tissue.

    Args:
        min_tissue: smallest share of the tile's area, 0 to 1.
    Returns:
        indices int64 [N], ascending, and their tissue fractions float32 [N]; N may be 0.
    Raises:
        ValueError: `min_tissue` outside 0..1.
    """
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue={min_tissue} is a share of the tile's area and lies between 0 and 1")
    indices_N = np.arange(grid.num_tiles, dtype=np.int64)
    x_um, y_um = grid.position_um(indices_N)
    fraction_N = mask.fraction(x_um, y_um, grid.tile_width_um, grid.tile_height_um)
    # Sums of many squares round: a tile that is all tissue may come out a few 1e-12 below 1.
    chosen = (fraction_N >= min_tissue - 1e-9) & (fraction_N > 1e-9)
    return indices_N[chosen], fraction_N[chosen].astype(np.float32)


def _num_along(length_um: float, tile_um: float, stride_um: float) -> int:
    """Fewest tiles whose last reaches the end; with gaps between tiles, all that start before it.

    The tolerance keeps a slide of exactly ten tiles, computed as 10.0000001, from an eleventh column of white.
    """
    return 1 + max(0, math.ceil((length_um - max(tile_um, stride_um)) / stride_um - 1e-6))
