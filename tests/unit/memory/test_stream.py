"""Cutting a grid into blocks: what is wanted is covered once, and what does not fit the image is refused."""

import numpy as np
import pytest
from torch import nn

from gigamil.memory.geometry import geometry_of
from gigamil.memory.stream import block_around, grid_blocks

GEOMETRY = geometry_of(nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)))


@pytest.mark.parametrize("shape", [(5, 8), (6, 7), (1, 1)])
def test_a_mask_of_another_size_is_refused(shape: tuple[int, int]) -> None:
    assert GEOMETRY.grid_shape(22, 27) == (6, 7)
    if shape == (6, 7):
        assert sum(block.num_pixels for block in grid_blocks(GEOMETRY, 22, 27, 100, np.ones(shape, bool))) == 22 * 27
        return
    with pytest.raises(ValueError, match=rf"the mask is of \({shape[0]}, {shape[1]}\) cells, and the grid of 6 x 7"):
        grid_blocks(GEOMETRY, 22, 27, 2, np.ones(shape, bool))


@pytest.mark.parametrize("cells", [1, 2, 3, 100])
def test_each_wanted_cell_has_one_block(cells: int) -> None:
    wanted_hw = np.random.default_rng(cells).random((6, 7)) < 0.4
    count_hw = np.zeros((6, 7), int)
    for block in grid_blocks(GEOMETRY, 22, 27, cells, wanted_hw):
        assert max(block.bottom - block.top, block.right - block.left) <= cells
        count_hw[block.top : block.bottom, block.left : block.right] += 1
    assert (count_hw[wanted_hw] == 1).all()
    assert count_hw.max() == 1
    assert grid_blocks(GEOMETRY, 22, 27, cells, np.zeros((6, 7), bool)) == ()


def test_cells_that_the_image_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outputs \[5, 8\) are not some of the 7 of 27 inputs"):
        block_around(GEOMETRY, (0, 6), (5, 8), 22, 27)
