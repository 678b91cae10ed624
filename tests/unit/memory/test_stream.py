"""The block around some cells: what is read for them lies in the image, and cells that the image does not have are refused."""

import numpy as np
import pytest
from torch import nn

from gigamil.memory.geometry import geometry_of
from gigamil.memory.stream import block_around, block_of_cells
from gigamil.testing.dense import image_blocks

GEOMETRY = geometry_of(nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)))


def test_cells_that_the_image_does_not_have_are_refused() -> None:
    assert GEOMETRY.grid_shape(22, 27) == (6, 7)
    with pytest.raises(ValueError, match=r"outputs \[5, 8\) are not some of the 7 of 27 inputs"):
        block_around(GEOMETRY, (0, 6), (5, 8), 22, 27)
    with pytest.raises(ValueError, match=r"outputs \[2, 7\) are not some of the 6 of 22 inputs"):
        block_of_cells(GEOMETRY, np.array([[6, 0], [2, 3]]), 22, 27)


@pytest.mark.parametrize("cells", [1, 2, 4, 128])
def test_each_wanted_cell_has_one_block_and_no_other_cell_has_one(cells: int) -> None:
    """As small as the wanted cells allow: of a block of theirs no row or column is without one."""
    wanted_hw = np.random.default_rng(cells).random((6, 7)) < 0.4
    count_hw, pixels = np.zeros((6, 7), int), 0
    for cell_c2, block in image_blocks(GEOMETRY, 22, 27, wanted_hw, cells):
        np.add.at(count_hw, tuple(cell_c2.T), 1)
        assert max(block.bottom - block.top, block.right - block.left) <= cells
        assert (block.top, block.left, block.bottom, block.right) == (*cell_c2.min(axis=0), *cell_c2.max(axis=0) + 1)
        pixels += block.num_pixels
    np.testing.assert_array_equal(count_hw, wanted_hw)
    assert (pixels == 22 * 27) == (cells == 128)  # one block, and it reads all; others read borders twice
    assert not list(image_blocks(GEOMETRY, 22, 27, np.zeros((6, 7), bool), cells))
