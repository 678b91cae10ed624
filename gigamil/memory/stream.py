"""A network over an image block by block: the grid and all gradients are those of the whole image at once.

Shapes: n images, C H W image, D features, h w grid.
Each block owns a rectangle of the grid and reads what that depends on. Forward keeps the owned cells; backward runs a
block again and hands it the cotangent of its owned cells alone. As each cell is owned once, autograd's sum over blocks
is the whole gradient, of every kind of parameter: sum_b <g_b, dz_b/dtheta> = <g, dz/dtheta>. A block without a wanted
cell has no cotangent, so it is neither read nor computed.

Source: own derivation; Pinckaers et al. 2019, arXiv:1911.04432 streams convolutions alone, and takes each gradient
apart. Test: equivalence/test_stream.py
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gigamil.memory.geometry import Geometry
from gigamil.partition.halo import Block

ReadBlock = Callable[[int, int, int, int], Tensor]  # rows [start, stop), columns [start, stop) -> image (n, C, H, W)


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

    def owned(self, grid_nDhw: Tensor) -> Tensor:
        """The owned cells of what the network makes of this block."""
        row, col = self.rows.crop, self.cols.crop
        return grid_nDhw[:, :, row : row + self.bottom - self.top, col : col + self.right - self.left]


def block_around(
    geometry: Geometry, rows: tuple[int, int], cols: tuple[int, int], height: int, width: int
) -> GridBlock:
    """The block that owns cells [start, stop) along rows and columns of an image of `height` x `width` pixels.

    Raises:
        ValueError: there are no such cells.
    """
    return GridBlock(*rows, *cols, geometry.rows.block(*rows, height), geometry.cols.block(*cols, width))


def grid_blocks(
    geometry: Geometry, height: int, width: int, cells: int, wanted_hw: np.ndarray | None = None
) -> tuple[GridBlock, ...]:
    """Cut the grid of an image into blocks of at most `cells` x `cells`, row by row.

    Args:
        height, width: of the image in pixels.
        wanted_hw: bool [h, w], cells that are used. Blocks without one are left out, and others are as small as their
            wanted cells allow.
    Raises:
        ValueError: `wanted_hw` is not of the grid's shape.
    """
    num_rows, num_cols = geometry.grid_shape(height, width)
    if wanted_hw is None:
        wanted_hw = np.ones((num_rows, num_cols), bool)
    if wanted_hw.shape != (num_rows, num_cols):
        raise ValueError(f"the mask is of {wanted_hw.shape} cells, and the grid of {num_rows} x {num_cols}")
    found = []
    for top in range(0, num_rows, cells):
        for left in range(0, num_cols, cells):
            row_N, col_N = np.nonzero(wanted_hw[top : top + cells, left : left + cells])
            if not len(row_N):
                continue
            first_row, last_row = top + int(row_N.min()), top + int(row_N.max()) + 1
            first_col, last_col = left + int(col_N.min()), left + int(col_N.max()) + 1
            found.append(block_around(geometry, (first_row, last_row), (first_col, last_col), height, width))
    return tuple(found)


def stream_forward(
    network: nn.Module, blocks: Sequence[GridBlock], read: ReadBlock, grid_shape: tuple[int, int]
) -> Tensor:
    """The grid of features, without a graph; cells that no block owns are 0.

    Args:
        network: image (n, C, H, W) -> grid (n, D, h, w), with the geometry that the blocks were cut for.
        blocks: at least one.
        read: pixels of the image.
        grid_shape: (h, w).
    Returns:
        (n, D, h, w).
    Cost: a forward of the pixels of each block, and the memory of one.
    """
    grid_nDhw: Tensor | None = None
    for block in blocks:
        with torch.no_grad():
            owned_nDhw = block.owned(network(_read(read, block)))
        if grid_nDhw is None:
            grid_nDhw = owned_nDhw.new_zeros((*owned_nDhw.shape[:2], *grid_shape))
        grid_nDhw[:, :, block.top : block.bottom, block.left : block.right] = owned_nDhw
    assert grid_nDhw is not None, "an image without a block has no grid"
    return grid_nDhw


def stream_backward(network: nn.Module, blocks: Sequence[GridBlock], read: ReadBlock, cotangent_nDhw: Tensor) -> None:
    """Add the gradients of <cotangent, grid> to the parameters, and to what `read` takes the pixels from.

    Args:
        cotangent_nDhw: dL/dz of the grid z.
    Cost: a forward and a backward of the pixels of each block, and the memory of one.
    """
    for block in blocks:
        owned_nDhw = block.owned(network(_read(read, block)))
        owned_nDhw.backward(cotangent_nDhw[:, :, block.top : block.bottom, block.left : block.right])


def _read(read: ReadBlock, block: GridBlock) -> Tensor:
    return read(block.rows.start, block.rows.stop, block.cols.start, block.cols.stop)
