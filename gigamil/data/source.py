"""Where a loader's tiles come from: one protocol, and its first kind, shards."""

import threading
from typing import Protocol

import numpy as np

from gigamil.data.blocks import WHITE, SlideGrid, slide_grid
from gigamil.data.decode import BadTile, choose_decoder, decode_tiles
from gigamil.errors import ShardError
from gigamil.shards.index import SlideIndex
from gigamil.shards.read import ShardSet

_DECODED_BYTES = 128 << 20  # tiles that blocks have in common


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
    Attributes:
        decoder: what decodes (`choose_decoder`), for the record of the run.
    Raises:
        EnvironmentFault: the decoder is not there.
    """

    dim = None

    def __init__(self, shards: ShardSet, tile_px: int, decoder: str = "auto", device: object = "cpu") -> None:
        self.decoder = choose_decoder(decoder, str(device))
        self.block = 512 if shards.is_remote or self.decoder in ("torchcodec", "torchvision") else 128
        self._shards = shards
        self._tile_px = tile_px
        self._device = str(device)
        self._lock = threading.Lock()
        self._decoded: dict[tuple[str, int], np.ndarray] = {}
        self._most_decoded = max(1, _DECODED_BYTES // (3 * tile_px**2))

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
            ShardError: as `read_tiles`.
        Cost: that of the tiles; those read last are remembered, as neighbouring blocks share them.
        """
        side, numbers_hw = self._tile_px, self._numbers(slide_id)
        image_HW3 = np.full((height, width, 3), WHITE, np.uint8)
        first_row, first_col = max(0, top // side), max(0, left // side)
        number_hw = numbers_hw[first_row : -(-(top + height) // side), first_col : -(-(left + width) // side)]
        tiles = self._tiles(slide_id, np.sort(number_hw[number_hw >= 0]))
        for (row, col), number in np.ndenumerate(number_hw):
            if number < 0:
                continue
            y, x = (first_row + row) * side - top, (first_col + col) * side - left
            y0, x0, y1, x1 = max(0, y), max(0, x), min(height, y + side), min(width, x + side)
            image_HW3[y0:y1, x0:x1] = tiles[number][y0 - y : y1 - y, x0 - x : x1 - x]
        return image_HW3

    def _numbers(self, slide_id: str) -> np.ndarray:
        """int64 (num_y, num_x): number of the tile in each cell of the grid; -1 where there is none."""
        grid = self.grid(slide_id)
        numbers_hw = np.full((grid.num_y, grid.num_x), -1, np.int64)
        numbers_hw[grid.cell_N2[:, 0], grid.cell_N2[:, 1]] = np.arange(len(grid.cell_N2))
        return numbers_hw

    def _tiles(self, slide_id: str, number_n: np.ndarray) -> dict[int, np.ndarray]:
        """Tiles by their number, which ascend."""
        with self._lock:
            found = {n: self._decoded[slide_id, n] for n in number_n.tolist() if (slide_id, n) in self._decoded}
        missing = np.array([number for number in number_n.tolist() if number not in found], np.int64)
        runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1) if len(missing) else []
        for run in runs:
            pixels_nHW3 = self.read_tiles(slide_id, int(run[0]), int(run[-1]) + 1)
            found |= {int(number): tile for number, tile in zip(run, pixels_nHW3, strict=True)}
        with self._lock:
            for number in missing.tolist():
                self._decoded[slide_id, number] = found[number]
            while len(self._decoded) > self._most_decoded:
                self._decoded.pop(next(iter(self._decoded)))
        return found
