"""The tile grid and the choice of tiles, on numbers worked out by hand."""

import numpy as np
import pytest

from gigamil.slides.grid import TileGrid, choose_tiles
from gigamil.slides.tissue import TissueMask


def test_numbers_run_row_by_row_and_the_edge_is_covered() -> None:
    grid = TileGrid.square(width_um=250.0, height_um=100.0, tile_px=100, tile_mpp=1.0)
    assert (grid.num_x, grid.num_y, grid.num_tiles, grid.tile_width_um, grid.stride_px) == (3, 1, 3, 100.0, 100)
    grid = TileGrid.square(250.0, 300.0, 200, 0.5)
    assert (grid.num_x, grid.num_y) == (3, 3)
    assert grid.col_row(5) == (2, 1)
    assert grid.index(2, 1) == 5
    assert grid.position_um(5) == (200.0, 100.0)


def test_rounding_does_not_add_a_column() -> None:
    assert TileGrid.square(10 * 0.1 * 224 * 1.0000000001, 5.0, 224, 0.1).num_x == 10
    assert TileGrid.square(224 * 0.499 * 3, 224 * 0.499, 224, 0.499).num_tiles == 3


def test_a_slide_smaller_than_a_tile_has_one() -> None:
    assert TileGrid.square(5.0, 5.0, 224, 0.5).num_tiles == 1


def test_a_stride_below_the_tile_overlaps_and_one_above_leaves_gaps() -> None:
    half = TileGrid.square(400.0, 250.0, 100, 1.0, stride_px=50)
    assert (half.num_x, half.num_y) == (7, 4)  # the last column ends at 400, the last row at 250
    assert half.position_um(half.index(6, 3)) == (300.0, 150.0)
    assert TileGrid.square(90.0, 90.0, 100, 1.0, stride_px=50).num_tiles == 1
    sparse = TileGrid.square(400.0, 410.0, 100, 1.0, stride_px=200)
    assert (sparse.num_x, sparse.num_y) == (2, 3)  # starts at 0, 200 and, where there is a rest, 400


def test_copied_tiles_keep_the_mpp_of_each_axis() -> None:
    grid = TileGrid(1000.0, 1000.0, 100, 0.5, 0.505, 80)
    assert (grid.tile_width_um, grid.tile_height_um) == (50.0, 50.5)
    assert (grid.stride_x_um, grid.stride_y_um) == (40.0, pytest.approx(40.4))
    assert grid.position_um(grid.index(2, 3)) == (80.0, pytest.approx(121.2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width_um", 0.0),
        ("height_um", -1.0),
        ("width_um", float("nan")),
        ("mpp_x", float("inf")),
        ("mpp_y", 0.0),
        ("tile_px", 0),
        ("stride_px", 0),
    ],
)
def test_impossible_geometry_is_refused(field: str, value: float) -> None:
    sizes = {"width_um": 100.0, "height_um": 100.0, "mpp_x": 1.0, "mpp_y": 1.0}
    geometry = sizes | {"tile_px": 10, "stride_px": 10} | {field: value}
    with pytest.raises(ValueError, match=field):
        TileGrid(**geometry)


def test_indices_outside_are_refused() -> None:
    grid = TileGrid.square(100.0, 100.0, 50, 1.0)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=r"outside 0\.\.3"):
            grid.position_um(index)
    with pytest.raises(IndexError, match="col"):
        grid.index(2, 0)


def test_tiles_with_enough_tissue_are_chosen() -> None:
    mask_HW = np.zeros((4, 6), bool)
    mask_HW[:2, :2] = True  # tile 0 is full
    mask_HW[2, 2] = True  # tile 4 holds a quarter
    grid = TileGrid.square(60.0, 40.0, 20, 1.0)
    for min_tissue, expected in [(0.0, [0, 4]), (0.25, [0, 4]), (0.26, [0]), (1.0, [0])]:
        indices, fraction = choose_tiles(grid, TissueMask(mask_HW, 10.0), min_tissue)
        assert indices.tolist() == expected
        assert indices.dtype == np.int64
        assert fraction.dtype == np.float32
    assert choose_tiles(grid, TissueMask(mask_HW, 10.0), 0.0)[1].tolist() == [1.0, 0.25]


def test_a_tile_off_square_is_weighed_by_its_own_area() -> None:
    mask_HW = np.zeros((4, 4), bool)
    mask_HW[:, :2] = True
    _, fraction = choose_tiles(TileGrid(40.0, 40.0, 20, 2.0, 1.0, 20), TissueMask(mask_HW, 10.0), 0.0)
    assert fraction.tolist() == [0.5, 0.5]


def test_no_tissue_no_tiles() -> None:
    indices, fraction = choose_tiles(
        TileGrid.square(60.0, 40.0, 20, 1.0), TissueMask(np.zeros((4, 6), bool), 10.0), 0.0
    )
    assert (len(indices), len(fraction)) == (0, 0)


def test_min_tissue_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"min_tissue=25"):
        choose_tiles(TileGrid.square(60.0, 40.0, 20, 1.0), TissueMask(np.zeros((4, 6), bool), 10.0), 25)
