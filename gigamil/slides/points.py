"""Tiles anywhere on a slide, where a grid is expected: for positions that another tool has chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gigamil.errors import SlideError
from gigamil.slides.grid import TileGrid
from gigamil.slides.reader import SlideInfo

# Where CLAM and TRIDENT put the coordinates of a slide.
_FILES = ("{}.h5", "{}_patches.h5", "patches/{}.h5", "patches/{}_patches.h5")


@dataclass(frozen=True)
class PointGrid(TileGrid):
    """A grid with a cell for every level-0 pixel, of which some few are chosen.

    Column and row of a tile are its level-0 position, so any position is a cell and none is rounded. The numbers of
    cells are too large to look at each: `choose_tiles` is not for this grid.
    """

    slide_mpp_x: float
    slide_mpp_y: float

    @classmethod
    def of(cls, info: SlideInfo, tile_px: int, tile_mpp: float) -> Self:
        """Cells of a slide, for square tiles."""
        return cls(info.width_um, info.height_um, tile_px, tile_mpp, tile_mpp, tile_px, info.mpp_x, info.mpp_y)

    @property
    def stride_x_um(self) -> float:
        """Width of a level-0 pixel."""
        return self.slide_mpp_x

    @property
    def stride_y_um(self) -> float:
        """Height of a level-0 pixel."""
        return self.slide_mpp_y

    @property
    def num_x(self) -> int:
        """Columns: pixels of a row of level 0."""
        return round(self.width_um / self.slide_mpp_x)

    @property
    def num_y(self) -> int:
        """Rows: pixels of a column of level 0."""
        return round(self.height_um / self.slide_mpp_y)


def coords_file(folder: Path, slide_id: str) -> Path:
    """The file of a slide's coordinates in a folder of TRIDENT or CLAM.

    Raises:
        SlideError: there is none, or there are several.
    """
    found = [path for name in _FILES if (path := folder / name.format(slide_id)).is_file()]
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or f"none of {', '.join(_FILES).format(*[slide_id] * 4)}"
        raise SlideError(f"slide '{slide_id}': '{folder}' must hold one file of its coordinates; it has: {names}")
    return found[0]
