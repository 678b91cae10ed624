"""Blocks of slides for a dense encoder: its rows are tiles, and what it sees of them is an image with all around them.

Shapes: n tiles on this rank, c tiles of a call, H W image.
A slide is one image on the pixels of its tiles: `num_y` x `num_x` tiles of `tile_px`, laid from the corner of level 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gigamil.data.images import Stopwatch
from gigamil.errors import ShardError
from gigamil.memory.geometry import Geometry
from gigamil.memory.stream import GridBlock, block_of_cells
from gigamil.shards.index import SlideIndex
from gigamil.shards.manifest import FILE_SETTINGS, SlideManifest

_EXACT_CELLS = 1e-3  # rounding of micron


@dataclass(frozen=True)
class SlideGrid:
    """The grid that a slide's tiles lie on.

    Attributes:
        num_y, num_x: rows and columns.
        cell_N2: int64, (row, column) of each tile in stored order.
    """

    num_y: int
    num_x: int
    cell_N2: np.ndarray


def slide_grid(manifest: SlideManifest, index: SlideIndex) -> SlideGrid:
    """The grid of a slide's shards.

    Raises:
        ShardError: tiles overlap, lie apart, or where another tool put them.
    """
    row_N, col_N = index.y_um / manifest.tile_height_um, index.x_um / manifest.tile_width_um
    cell_N2 = np.column_stack([np.rint(row_N), np.rint(col_N)]).astype(np.int64)
    is_grid = np.abs(np.column_stack([row_N, col_N]) - cell_N2).max(initial=0) < _EXACT_CELLS
    given = manifest.settings.get(FILE_SETTINGS["coords"])  # num_x and num_y then count pixels of level 0
    if manifest.stride_px != manifest.tile_px or given or not is_grid:
        raise ShardError(
            f"slide '{manifest.slide_id}': its tiles do not lie side by side on a grid, so they are no cells of a dense "
            "encoder. Tile it with slides.stride_px: null and slides.coords: null."
        )
    return SlideGrid(manifest.num_y, manifest.num_x, cell_N2)


class BlockSource(Protocol):
    """Slides as images; several threads call it at once."""

    def grid(self, slide_id: str) -> SlideGrid:
        """Where the slide's tiles lie."""
        ...

    def read_block(self, slide_id: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        """uint8 RGB (height, width, 3) of the slide's image; what lies outside it, or is not there, is white."""
        ...


@dataclass(frozen=True)
class Turn:
    """One of the eight ways to lay a slide on the table: first transposed, then flipped."""

    transpose: bool = False
    flip_y: bool = False
    flip_x: bool = False


class BlockImages:
    """Images of blocks, read whenever they are asked for.

    Args:
        spans: (slide id, first tile, one past the last) of this rank's runs, in row order.
        source: the slides.
        geometry: of the encoder; a cell of its grid is a tile.
        tile_px: side of a tile.
        turns: how each span's slide is laid; None lays all as they are.
        waited: stopwatch of the loader.
        ahead: as of `TileImages`.
    Attributes:
        cell_n2: int64, (row, column) of each tile in the grid of its slide as it was stored.
        span_n: the span of each tile.
    """

    held = False

    def __init__(
        self,
        spans: Sequence[tuple[str, int, int]],
        source: BlockSource,
        geometry: Geometry,
        tile_px: int,
        turns: Sequence[Turn] | None = None,
        waited: Stopwatch | None = None,
        ahead: bool = True,
    ) -> None:
        self.waited = Stopwatch() if waited is None else waited
        self.ahead = ahead
        self.shape: tuple[int, ...] = (tile_px, tile_px, 3)
        self._spans, self._source, self._geometry, self._tile_px = spans, source, geometry, tile_px
        self._turns = [Turn()] * len(spans) if turns is None else turns
        self._grids = [source.grid(slide_id) for slide_id, _, _ in spans]
        cells = [grid.cell_N2[start:stop] for (_, start, stop), grid in zip(spans, self._grids, strict=True)]
        lying = [turned_cells(*parts) for parts in zip(cells, self._grids, self._turns, strict=True)]
        self.cell_n2, self._cell_n2 = (np.concatenate([np.empty((0, 2), np.int64), *parts]) for parts in (cells, lying))
        self.span_n = np.repeat(np.arange(len(spans)), [stop - start for _, start, stop in spans])

    @property
    def first_n(self) -> np.ndarray:
        """int64: the first row of each span."""
        return np.cumsum([0, *(stop - start for _, start, stop in self._spans[:-1])])[: len(self._spans)]

    def room(self, start: int, stop: int) -> int:
        """Cells of the smallest aligned square that holds rows start..stop - 1, with or without tiles in them.

        1 for no rows: the blank tile of a rank without tiles.
        """
        if start == stop:
            return 1
        low_2, high_2 = self.cell_n2[start:stop].min(axis=0), self.cell_n2[start:stop].max(axis=0)
        bits = int((low_2 ^ high_2).max()).bit_length()
        return 4**bits

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the slide of the first span, as it lies."""
        return self._size(0)

    def corner_px(self, start: int, stop: int) -> tuple[int, int]:
        """Row and column of the first pixel that is read for rows start..stop - 1."""
        block = self._block(start, stop)
        return block.rows.start, block.cols.start

    def tiles_read(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(row, column) of the cells of the grid, tissue or not, of which something is read for rows start..stop - 1."""
        block, side = self._block(start, stop), self._tile_px
        rows = range(block.rows.start // side, -(-block.rows.stop // side))
        cols = range(block.cols.start // side, -(-block.cols.stop // side))
        return [(row, col) for row in rows for col in cols]

    def turned(self, turns: Sequence[Turn]) -> "BlockImages":
        """The same with each span's slide laid otherwise."""
        return BlockImages(self._spans, self._source, self._geometry, self._tile_px, turns, self.waited, self.ahead)

    def cells(self, start: int, stop: int) -> Tensor:
        """int64 (c, 2): row and column of rows start..stop - 1 in the grid of their block."""
        return torch.from_numpy(self._block(start, stop).inside(self._cell_n2[start:stop]))

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 RGB (1, H, W, 3): all that the embeddings of rows start..stop - 1, of one slide, depend on."""
        span = int(self.span_n[start])
        turn, (slide_id, _, _) = self._turns[span], self._spans[span]
        block, (height, width) = self._block(start, stop), self._size(span)
        top, left, bottom, right = block.rows.start, block.cols.start, block.rows.stop, block.cols.stop
        return read_turned(self._source, slide_id, turn, (height, width), (top, left, bottom, right))

    def _size(self, span: int) -> tuple[int, int]:
        """Height and width of a span's slide as it lies."""
        num_y, num_x = turned_size(self._grids[span], self._turns[span])
        return num_y * self._tile_px, num_x * self._tile_px

    def _block(self, start: int, stop: int) -> GridBlock:
        return block_of_cells(self._geometry, self._cell_n2[start:stop], *self._size(int(self.span_n[start])))


def read_turned(
    source: BlockSource, slide_id: str, turn: Turn, size: tuple[int, int], box: tuple[int, int, int, int]
) -> Tensor:
    """uint8 RGB (1, H, W, 3) of a slide as it lies.

    Args:
        size: height and width of the slide as it lies.
        box: top, left, bottom and right pixel of what is wanted.
    """
    (height, width), (top, left, bottom, right) = size, box
    # From the slide as it lies to the slide as it is: flips come last, so they go first.
    if turn.flip_y:
        top, bottom = height - bottom, height - top
    if turn.flip_x:
        left, right = width - right, width - left
    if turn.transpose:
        top, left, bottom, right = left, top, right, bottom
    image_HW3 = source.read_block(slide_id, top, left, bottom - top, right - left)
    if turn.transpose:
        image_HW3 = image_HW3.transpose(1, 0, 2)
    image_HW3 = image_HW3[:: -1 if turn.flip_y else 1, :: -1 if turn.flip_x else 1]
    # Contiguous, and writable: that of an image library may be neither.
    return torch.from_numpy(np.require(image_HW3, requirements=("C", "W")))[None]


def turned_size(grid: SlideGrid, turn: Turn) -> tuple[int, int]:
    """Rows and columns of the grid as the slide lies."""
    return (grid.num_x, grid.num_y) if turn.transpose else (grid.num_y, grid.num_x)


def turned_cells(cell_n2: np.ndarray, grid: SlideGrid, turn: Turn) -> np.ndarray:
    """(row, column) of cells in the grid as the slide lies."""
    row_n, col_n = cell_n2[:, 0], cell_n2[:, 1]
    num_y, num_x = turned_size(grid, turn)
    if turn.transpose:
        row_n, col_n = col_n, row_n
    row_n = num_y - 1 - row_n if turn.flip_y else row_n
    col_n = num_x - 1 - col_n if turn.flip_x else col_n
    return np.column_stack([row_n, col_n])
