"""A network over an image block by block: the grid and all gradients are those of the whole image at once.

Shapes: c cells of a block.
Each block owns a rectangle of the grid and reads what that depends on. Forward keeps the owned cells; backward runs a
block again and hands it the cotangent of its owned cells alone. As each cell is owned once, autograd's sum over blocks
is the whole gradient, of every kind of parameter: sum_b <g_b, dz_b/dtheta> = <g, dz/dtheta>. A block without a wanted
cell has no cotangent, so it is neither read nor computed.

Source: own derivation; Pinckaers et al. 2019, arXiv:1911.04432 streams convolutions alone, and takes each gradient
apart. Test: equivalence/test_stream.py
"""

from dataclasses import dataclass

import numpy as np

from gigamil.memory.geometry import Geometry
from gigamil.partition.halo import Block


@dataclass(frozen=True)
class GridBlock:
    """A rectangle of cells, and the rectangle of pixels that is read for it.

    Attributes:
        top, bottom, left, right: of the owned cells, half open.
        rows, cols: what is read.
    """

    top: int
    bottom: int
    left: int
    right: int
    rows: Block
    cols: Block

    @property
    def num_pixels(self) -> int:
        """Pixels that are read."""
        return self.rows.size * self.cols.size

    def inside(self, cell_c2: np.ndarray) -> np.ndarray:
        """(row, column) of cells of the image in the grid that the network makes of this block."""
        return cell_c2 - (self.top - self.rows.crop, self.left - self.cols.crop)


def block_around(
    geometry: Geometry, rows: tuple[int, int], cols: tuple[int, int], height: int, width: int
) -> GridBlock:
    """The block that owns cells [start, stop) along rows and columns of an image of `height` x `width` pixels.

    Raises:
        ValueError: there are no such cells.
    """
    return GridBlock(*rows, *cols, geometry.rows.block(*rows, height), geometry.cols.block(*cols, width))


def block_of_cells(geometry: Geometry, cell_c2: np.ndarray, height: int, width: int) -> GridBlock:
    """The smallest block that owns all of some cells, (row, column) each.

    Raises:
        ValueError: the grid of the image does not have them.
    """
    (top, left), (bottom, right) = cell_c2.min(axis=0).tolist(), (cell_c2.max(axis=0) + 1).tolist()
    return block_around(geometry, (top, bottom), (left, right), height, width)
