"""What a run needs to know of a dense encoder before it begins: where its cells look."""

from typing import TYPE_CHECKING

from torch import nn

from gigamil.errors import ConfigError
from gigamil.memory.geometry import Geometry, geometry_of, refuse_wrong_geometry
from gigamil.models.encoder import DenseEncoder

if TYPE_CHECKING:
    from gigamil.config.schema import Slides


def dense_geometry(encoder: nn.Module, slides: "Slides") -> Geometry | None:
    """Where the cells of a dense encoder look; None for an encoder of tiles.

    Raises:
        ConfigError: names a layer that looks at the whole image, or a size of tiles that is not that of the cells.
    Cost: two forwards of strips as long as the receptive field.
    """
    if not isinstance(encoder, DenseEncoder):
        return None
    network = encoder.network
    geometry = geometry_of(network)
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
    refuse_wrong_geometry(network, geometry)
    return geometry
