"""What a run needs to know of a dense encoder before it begins: where its cells look, and what its blocks cost."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from gigamil.data.blocks import SlideGrid, slide_grid
from gigamil.errors import ConfigError
from gigamil.memory.geometry import Geometry, geometry_of, refuse_wrong_geometry
from gigamil.memory.stream import block_of_cells
from gigamil.models.encoder import DenseEncoder
from gigamil.partition.blocks import block_ranges, block_side
from gigamil.partition.halo import Net
from gigamil.partition.schedule import StepPlan
from gigamil.shards.read import ShardSet
from gigamil.train.cohort import TiledSlides

if TYPE_CHECKING:
    from gigamil.config.schema import Science, Slides

_MAX_BLOCKS = 512  # of a slide, of which the area is taken; of more, every so many


def dense_geometry(encoder: nn.Module, slides: "Slides", probe: bool = True) -> Geometry | None:
    """Where the cells of a dense encoder look; None for an encoder of tiles.

    Args:
        probe: run the network to see that its layers look no further; once in a run is enough.
    Raises:
        ConfigError: names a layer that looks at the whole image, or a size of tiles that is not that of the cells.
    Cost: two forwards of strips as long as the receptive field; none without the probe.
    """
    if not isinstance(encoder, DenseEncoder):
        return None
    network = encoder.network
    try:
        geometry = geometry_of(network)
    except ConfigError as error:
        raise ConfigError(f"science.encoder cannot be run block by block: {error}") from error
    if geometry.strides != (slides.tile_px, slides.tile_px):
        rows, cols = geometry.strides
        raise ConfigError(
            f"a cell of the dense encoder has {rows} x {cols} pixels, and a tile {slides.tile_px}: they must be the same. "
            f"Set slides.tile_px={rows}, or science.encoder.pool so that stride x pool is slides.tile_px."
        )
    sizes = range(1, 4)
    if any(geometry.grid_shape(n * slides.tile_px, n * slides.tile_px) != (n, n) for n in sizes):
        shapes = [geometry.grid_shape(n * slides.tile_px, n * slides.tile_px) for n in sizes]
        raise ConfigError(
            f"the dense encoder makes {shapes} cells of 1, 2 and 3 tiles along each side; it must make as many as there are "
            "tiles. Pad its convolutions by half of their kernel."
        )
    if probe:
        refuse_wrong_geometry(network, geometry)
    return geometry


def refuse_patients(science: "Science") -> None:
    """Refuse several slides as one bag: their tiles lie on no common grid."""
    if science.bag == "patient":
        raise ConfigError(
            "science.bag=patient with a dense encoder, which sees slides one by one: set science.bag to slide, or take an encoder of tiles"
        )


def largest_grids(
    tiles: TiledSlides, slide_ids: Sequence[str], sizes: Sequence[int], number: int
) -> tuple[SlideGrid, ...]:
    """Grids of the slides with the most tiles, those with most first; none of features.

    Args:
        sizes: tiles of each slide.
        number: how many.
    """
    if not isinstance(tiles, ShardSet):
        return ()
    largest = heapq.nlargest(number, zip(sizes, slide_ids, strict=True))
    return tuple(slide_grid(tiles.manifest(slide_id), tiles.index(slide_id)) for _, slide_id in largest)


@dataclass(frozen=True)
class BlockCost:
    """Encoder calls of one size on some slides, or inside of a large one.

    Attributes:
        chunk: tiles per call, at most.
        side_px: of the square of tiles of a call.
        read_px: height and width of what is read for it, inside a slide.
        num_calls: on these slides; 0 where there are none.
        mean_area, largest_area: of what is read for a call, in tiles.
        factor: pixels that are computed per pixel of a tile.
    """

    chunk: int
    side_px: int
    read_px: tuple[int, int]
    num_calls: int
    mean_area: float
    largest_area: float
    factor: float


@dataclass(frozen=True)
class BlockCosts:
    """What blocks of any size cost.

    Args:
        geometry: of the encoder.
        tile_px: side of a tile.
        grids: of a step's slides (`largest_grids`); without any, all calls are full squares inside a slide.
    """

    geometry: Geometry
    tile_px: int
    grids: Sequence[SlideGrid] = ()

    @cached_property
    def _known(self) -> dict[int, BlockCost]:
        return {}

    @cached_property
    def largest_chunk(self) -> int:
        """From which on a block is a whole slide; without slides, one of 64 x 64 tiles."""
        side = max((max(grid.num_y, grid.num_x) for grid in self.grids), default=64)
        return 4 ** (side - 1).bit_length()

    def at(self, chunk: int) -> BlockCost:
        """For this `execution.chunk`.

        Cost: integer arithmetic for at most 512 blocks of a slide; none if it was asked for before.
        """
        if chunk not in self._known:
            self._known[chunk] = self._at(chunk)
        return self._known[chunk]

    def most_calls(self, chunk: int, step: StepPlan) -> int:
        """Most encoder calls that a rank makes for its own tiles in a step of these slides (at least 1)."""
        if not self.grids:
            return step.max_calls(block_side(chunk) ** 2)
        calls = [
            sum(self._num_calls(step.groups[group][span.slide], span.start, span.stop, chunk) for span in spans)
            for group in range(len(step.groups))
            for spans in (step.spans(group, rank) for rank in range(step.group_size))
        ]
        return max(1, *calls)

    def _num_calls(self, slide: int, start: int, stop: int, chunk: int) -> int:
        cell_n2 = self.grids[slide].cell_N2[start:stop]
        return len(block_ranges(np.zeros(len(cell_n2), np.int64), cell_n2, chunk))

    def _at(self, chunk: int) -> BlockCost:
        side = block_side(chunk)
        read_px = _inner_size(self.geometry.rows, side), _inner_size(self.geometry.cols, side)
        area = math.prod(read_px) / self.tile_px**2
        if not self.grids:
            return BlockCost(chunk, side * self.tile_px, read_px, 0, area, area, area / side**2)
        num_calls, pixels, largest = 0, 0.0, 0
        for grid in self.grids:
            ranges = block_ranges(np.zeros(len(grid.cell_N2), np.int64), grid.cell_N2, chunk)
            some = ranges[:: -(-len(ranges) // _MAX_BLOCKS)]
            sizes = [self._pixels(grid, start, stop) for start, stop in some]
            num_calls += len(ranges)
            pixels += sum(sizes) * len(ranges) / len(some)
            largest = max(largest, *sizes)
        tiles = sum(len(grid.cell_N2) for grid in self.grids)
        mean, factor = (pixels / number / self.tile_px**2 for number in (num_calls, tiles))
        return BlockCost(chunk, side * self.tile_px, read_px, num_calls, mean, largest / self.tile_px**2, factor)

    def _pixels(self, grid: SlideGrid, start: int, stop: int) -> int:
        size = grid.num_y * self.tile_px, grid.num_x * self.tile_px
        return block_of_cells(self.geometry, grid.cell_N2[start:stop], *size).num_pixels


def _inner_size(net: Net, side: int) -> int:
    """Pixels that are read along one axis for so many cells inside a large slide."""
    before, behind = (max(0, length) for length in net.receptive_field)
    first = -(-before // net.stride)
    return net.block(first, first + side, (first + side) * net.stride + behind + net.stride).size
