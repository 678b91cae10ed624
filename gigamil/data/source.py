"""Where a loader's tiles come from: one protocol, and its first kind, shards."""

from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from gigamil.data.blocks import SlideGrid, slide_grid
from gigamil.data.decode import BadTile, choose_decoder, decode_tiles
from gigamil.data.mosaic import Mosaic
from gigamil.errors import ShardError
from gigamil.shards.index import SlideIndex
from gigamil.shards.read import ShardSet

DECODED_BYTES = 128 << 20  # tiles that a source keeps for the next blocks of dense encoders
NUM_GRIDS = 4  # slides whose grids a source keeps, 4 bytes a cell: blocks of one slide are read one after another


class TilePlaces(Protocol):
    """Top left corners of a slide's tiles in micron, float64 (N,): what a loader takes of an index."""

    @property
    def x_um(self) -> np.ndarray: ...

    @property
    def y_um(self) -> np.ndarray: ...


class TileSource(Protocol):
    """Tiles of slides by stored order; several threads call it at once.

    Attributes:
        dim: None: tiles are images. D: rows of features take their place, float32 (n, D).
        block: tiles that one thread reads and decodes at a time: small where a read costs little, large where each
            is a request to a server.
    """

    @property
    def dim(self) -> int | None: ...

    @property
    def block(self) -> int: ...

    def read_tiles(self, slide_id: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 RGB (n, tile_px, tile_px, 3) of tiles start..stop - 1, in `out` if that is given."""
        ...

    def index(self, slide_id: str) -> TilePlaces:
        """Where each tile lies."""
        ...


class ShardSource:
    """Tiles out of shards.

    Args:
        shards: where they lie.
        tile_px: side that every tile must have.
        decoder: `execution.decoder`.
        device: of the rank; a CUDA decoder works there.
        decode_workers: threads that read and decode the tiles of a block; fewer than two: who asks for it.
    Attributes:
        decoder: what decodes (`choose_decoder`), for the record of the run.
    Raises:
        EnvironmentFault: the decoder is not there.
    """

    dim = None

    def __init__(
        self, shards: ShardSet, tile_px: int, decoder: str = "auto", device: object = "cpu", decode_workers: int = 1
    ) -> None:
        self.decoder = choose_decoder(decoder, str(device))
        self.block = 512 if shards.is_remote or self.decoder in ("torchcodec", "torchvision") else 128
        self._shards = shards
        self._tile_px = tile_px
        self._device = str(device)
        self._mosaic = Mosaic(tile_px, decode_workers, self.block, DECODED_BYTES)
        self._numbers = lru_cache(NUM_GRIDS)(partial(_numbers, shards))

    def read_tiles(self, slide_id: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read and decode tiles start..stop - 1 in stored order.

        Returns:
            uint8 (n, tile_px, tile_px, 3), RGB.
        Raises:
            ShardError: a shard or a tile is damaged; names slide and tile.
        Cost: one read per tar; memory for the JPEGs beside the result.
        """
        jpegs = self._shards.read_span(slide_id, start, stop)
        try:
            return decode_tiles(jpegs, self._tile_px, self.decoder, self._device, out)
        except BadTile as error:
            raise ShardError(
                f"slide '{slide_id}', tile {start + error.position}: {error.why}. {self._shards.cure(slide_id)}"
            ) from error

    def index(self, slide_id: str) -> SlideIndex:
        """The slide's index."""
        return self._shards.index(slide_id)

    def grid(self, slide_id: str) -> SlideGrid:
        """The grid that the slide's tiles lie on."""
        return slide_grid(self._shards.manifest(slide_id), self.index(slide_id))

    def read_block(self, slide_id: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Put a block together of the tiles that it touches; where there is none, it is white.

        Returns:
            uint8 (height, width, 3), RGB.
        Raises:
            ShardError: as `read_tiles`; of several tiles the first in stored order.
        Cost: see `Mosaic.block`. The grid is made once for successive blocks of a slide.
        """
        return self._mosaic.block(slide_id, self._numbers(slide_id), self.read_tiles, (top, left, height, width))


def _numbers(shards: ShardSet, slide_id: str) -> np.ndarray:
    """int32 (num_y, num_x): number of the tile in each cell of the grid; -1 where there is none."""
    grid = slide_grid(shards.manifest(slide_id), shards.index(slide_id))
    number_hw = np.full((grid.num_y, grid.num_x), -1, np.int32)
    number_hw[grid.cell_N2[:, 0], grid.cell_N2[:, 1]] = np.arange(len(grid.cell_N2))
    return number_hw
