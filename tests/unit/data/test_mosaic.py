"""Blocks put together of tiles are parts of the slide, whoever reads the tiles and whichever are kept."""

from collections.abc import Callable

import numpy as np
import pytest

from gigamil.data.mosaic import WHITE, Mosaic

SIDE = 4
NUMBERS = np.array([[0, 1, 4, -1], [3, 2, 5, 6], [-1, 8, 7, 9]])
SLIDE = np.full((12, 16, 3), WHITE, np.uint8)
TILES = np.random.default_rng(0).integers(0, 255, (10, SIDE, SIDE, 3), dtype=np.uint8)
for (row, col), number in np.ndenumerate(NUMBERS):
    if number >= 0:
        SLIDE[row * SIDE : (row + 1) * SIDE, col * SIDE : (col + 1) * SIDE] = TILES[number]

BOXES = ((0, 0, 12, 16), (3, 5, 1, 1), (2, 1, 7, 11), (11, 0, 1, 16), (5, 9, 7, 7), (0, 4, 4, 4), (0, 12, 4, 4))


def read(asked: list[range]) -> Callable[[str, int, int], np.ndarray]:
    """Tiles, and what was asked for."""

    def tiles(slide_id: str, start: int, stop: int) -> np.ndarray:
        asked.append(range(start, stop))
        return TILES[start:stop]

    return tiles


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("piece", [1, 2, 100])
@pytest.mark.parametrize("kept", [0, 3, 100])
def test_blocks_are_parts_of_the_slide(workers: int, piece: int, kept: int) -> None:
    mosaic, asked = Mosaic(SIDE, workers, piece, kept * SIDE**2 * 3), []
    for top, left, height, width in BOXES * 2:
        found = mosaic.block("s", NUMBERS, read(asked), (top, left, height, width))
        np.testing.assert_array_equal(found, SLIDE[top : top + height, left : left + width])
        assert len(mosaic._kept) <= max(1, kept)
        assert all(tile_HW3.base is None for tile_HW3 in mosaic._kept.values())  # not parts of larger arrays
    assert max(map(len, asked)) <= piece
    if kept == 100:
        assert sorted(number for numbers in asked for number in numbers) == list(range(10))


def test_beyond_the_grid_it_is_white() -> None:
    found = Mosaic(SIDE, 1, 8, 0).block("s", NUMBERS, read([]), (-3, -2, 18, 22))
    np.testing.assert_array_equal(found[3:15, 2:18], SLIDE)
    found[3:15, 2:18] = WHITE
    assert (found == WHITE).all()


def test_the_tiles_that_were_used_last_are_kept() -> None:
    mosaic, asked = Mosaic(SIDE, 1, 8, 2 * SIDE**2 * 3), []
    for number in (0, 1, 0, 4, 0):  # 4 takes the place of 1
        row, col = np.argwhere(NUMBERS == number)[0] * SIDE
        mosaic.block("s", NUMBERS, read(asked), (row, col, SIDE, SIDE))
    assert [numbers.start for numbers in asked] == [0, 1, 4]
    mosaic.block("other", NUMBERS, read(asked), (0, 0, 1, 1))  # its tile 0 is another one
    assert len(asked) == 4


def test_neighbours_are_read_together_and_shared_out() -> None:
    for workers, wanted in ((1, [range(10)]), (2, [range(5), range(5, 10)]), (4, [range(3), range(3, 6), range(6, 9)])):
        asked: list[range] = []
        Mosaic(SIDE, workers, 100, 0).block("s", NUMBERS, read(asked), BOXES[0])
        assert sorted(asked, key=lambda numbers: numbers.start)[: len(wanted)] == wanted
