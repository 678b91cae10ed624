"""Where a loader's tiles come from: one protocol, and its first kind, shards."""

from typing import Protocol

import numpy as np

from gigamil.data.decode import BadTile, choose_decoder, decode_tiles
from gigamil.errors import ShardError
from gigamil.shards.index import SlideIndex
from gigamil.shards.read import ShardSet


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
