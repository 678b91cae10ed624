"""Whole slides on the ranks of a group, row by row: what `execution.halo: exchange` reads in place of blocks.

Shapes: c tiles of one slide on this rank, H W image, R ranks of the group.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gigamil.data.blocks import BlockSource, Turn, read_turned, turned_cells, turned_size
from gigamil.data.images import Stopwatch
from gigamil.partition.spans import Span


class SlideRows:
    """The slides of a group; each of its ranks reads a share of the rows of every slide, tissue or not.

    Where other `TileImages` have tiles, this has slides: slide b is what `read(b, b + 1)` gives.

    Args:
        slide_ids: of the group.
        spans: for each rank of the group, the tiles whose embeddings it wants.
        rank: of this process in the group.
        source: the slides.
        tile_px: side of a tile, which is a cell of the grid.
        turns: how each slide is laid; None lays all as they are.
        waited: stopwatch of the loader.
        ahead: as of `TileImages`.
    """

    held = False

    def __init__(
        self,
        slide_ids: Sequence[str],
        spans: Sequence[Sequence[Span]],
        rank: int,
        source: BlockSource,
        tile_px: int,
        turns: Sequence[Turn] | None = None,
        waited: Stopwatch | None = None,
        ahead: bool = True,
    ) -> None:
        self.waited = Stopwatch() if waited is None else waited
        self.ahead = ahead
        self.shape: tuple[int, ...] = (tile_px, tile_px, 3)
        self._slide_ids, self._spans, self._rank = slide_ids, spans, rank
        self._source, self._tile_px = source, tile_px
        self._turns = [Turn()] * len(slide_ids) if turns is None else turns
        self._grids = [source.grid(slide_id) for slide_id in slide_ids]

    @property
    def num_slides(self) -> int:
        """Of the group."""
        return len(self._slide_ids)

    def turned(self, turns: Sequence[Turn]) -> "SlideRows":
        """The same with each slide laid otherwise."""
        parts = self._slide_ids, self._spans, self._rank, self._source, self._tile_px
        return SlideRows(*parts, turns, self.waited, self.ahead)

    def rows(self, slide: int) -> tuple[int, int]:
        """This rank's rows of embeddings that are of the slide: start, and one past the last."""
        start = sum(span.num_tiles for span in self._spans[self._rank] if span.slide < slide)
        return start, start + sum(span.num_tiles for span in self._spans[self._rank] if span.slide == slide)

    def bounds(self, slide: int) -> tuple[int, ...]:
        """R + 1 cuts of the rows of pixels, between tiles: rank r reads from bounds[r] to bounds[r + 1]."""
        num_y, size = turned_size(self._grids[slide], self._turns[slide])[0], len(self._spans)
        return tuple(num_y * rank // size * self._tile_px for rank in range(size + 1))

    def wanted(self, slide: int) -> list[np.ndarray]:
        """For each rank, the cells that its tiles are: row x columns of the grid + column."""
        grid, turn = self._grids[slide], self._turns[slide]
        num_x = turned_size(grid, turn)[1]
        found = []
        for spans in self._spans:
            parts = [grid.cell_N2[span.start : span.stop] for span in spans if span.slide == slide]
            cell_c2 = turned_cells(np.concatenate([np.empty((0, 2), np.int64), *parts]), grid, turn)
            found.append(cell_c2[:, 0] * num_x + cell_c2[:, 1])
        return found

    def read_shape(self, slide: int) -> tuple[int, int, int, int]:
        """Of what this rank reads of the slide: (1, H, W, 3)."""
        bounds = self.bounds(slide)
        width = turned_size(self._grids[slide], self._turns[slide])[1] * self._tile_px
        return 1, bounds[self._rank + 1] - bounds[self._rank], width, 3

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 RGB (1, H, W, 3): this rank's rows of slide `start`; maybe none.

        Args:
            stop: start + 1.
        """
        _, height, width, _ = self.read_shape(start)
        if not height:
            return torch.empty(self.read_shape(start), dtype=torch.uint8)
        bounds = self.bounds(start)
        box = bounds[self._rank], 0, bounds[self._rank + 1], width
        return read_turned(self._source, self._slide_ids[start], self._turns[start], (bounds[-1], width), box)
