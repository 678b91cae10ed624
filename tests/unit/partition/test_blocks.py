"""Encoder calls of a dense encoder: squares of tiles, in stored order, on any number of ranks."""

import numpy as np
import pytest

from gigamil.partition.blocks import block_ranges, block_side
from gigamil.partition.curve import hilbert_sort
from gigamil.partition.spans import owned_range


def cells(num_y: int, num_x: int, share: float, seed: int = 0) -> np.ndarray:
    """(row, column) of some cells of a grid, along the Hilbert curve."""
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(num_y * num_x)[: round(share * num_y * num_x)])
    return np.column_stack([chosen // num_x, chosen % num_x])[hilbert_sort(chosen % num_x, chosen // num_x)]


@pytest.mark.parametrize(("chunk", "side"), [(1, 1), (3, 1), (4, 2), (15, 2), (16, 4), (63, 4), (64, 8), (1000, 16)])
def test_the_side_is_the_largest_power_of_two_that_fits(chunk: int, side: int) -> None:
    assert block_side(chunk) == side


def test_no_tile_is_no_call_and_no_call_is_smaller_than_one_tile() -> None:
    assert block_ranges(np.empty(0, np.int64), np.empty((0, 2), np.int64), 4) == ()
    with pytest.raises(ValueError, match="chunk=0"):
        block_side(0)


@pytest.mark.parametrize("chunk", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("shape", [(8, 8), (13, 5), (1, 30), (33, 17)])
@pytest.mark.parametrize("num_ranks", [1, 3, 7])
def test_calls_cover_all_tiles_once_and_lie_in_one_square(chunk: int, shape: tuple[int, int], num_ranks: int) -> None:
    cell_N2 = cells(*shape, share=0.6)
    num_calls = 0
    for rank in range(num_ranks):
        start, stop = owned_range(len(cell_N2), rank, num_ranks)
        cell_n2 = cell_N2[start:stop]
        ranges = block_ranges(np.zeros(len(cell_n2), np.int64), cell_n2, chunk)
        assert [row for first, last in ranges for row in range(first, last)] == list(range(len(cell_n2)))
        for first, last in ranges:
            assert len(np.unique(cell_n2[first:last] // block_side(chunk), axis=0)) == 1
        num_calls += len(ranges)
    # A square is one run of the curve: only squares that two ranks share are cut.
    squares = len(np.unique(cell_N2 // block_side(chunk), axis=0))
    assert squares <= num_calls <= squares + num_ranks - 1


def test_slides_are_never_in_one_call() -> None:
    cell_n2 = np.array([[0, 0], [0, 1], [0, 0], [0, 1]])
    assert block_ranges(np.array([0, 0, 1, 1]), cell_n2, 64) == ((0, 2), (2, 4))
