"""Properties of the tile grid: a round trip, a cover without overlap, and tissue that adds up."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gigamil.slides.grid import TileGrid, choose_tiles
from gigamil.slides.tissue import TissueMask

LENGTH_UM = st.floats(1.0, 5000.0)
MPP = st.floats(0.1, 4.0)
GRIDS = st.builds(TileGrid, LENGTH_UM, LENGTH_UM, st.integers(16, 512), MPP, MPP, st.integers(8, 600))


@given(GRIDS)
@settings(max_examples=100, deadline=None)
def test_index_and_position_are_inverse(grid: TileGrid) -> None:
    indices = np.unique(np.linspace(0, grid.num_tiles - 1, 500).astype(np.int64))
    col, row = grid.col_row(indices)
    np.testing.assert_array_equal(grid.index(col, row), indices)
    x_um, y_um = grid.position_um(indices)
    np.testing.assert_array_equal(np.rint(x_um / grid.stride_x_um), col)
    np.testing.assert_array_equal(np.rint(y_um / grid.stride_y_um), row)


@given(GRIDS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_every_point_of_the_slide_is_in_a_tile_or_in_a_chosen_gap(grid: TileGrid, share: float) -> None:
    for length, num, tile, stride in (
        (grid.width_um, grid.num_x, grid.tile_width_um, grid.stride_x_um),
        (grid.height_um, grid.num_y, grid.tile_height_um, grid.stride_y_um),
    ):
        point = share * length
        last_before = min(int(point / stride), num - 1)
        assert point <= last_before * stride + max(tile, stride) * (1 + 1e-5)
        assert num == 1 or (num - 2) * stride + tile < length * (1 + 1e-9)  # no tile more than it takes
        assert num == 1 or (num - 1) * stride < length  # and none wholly outside


@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(1.0, 32.0), st.integers(16, 256), st.floats(0.2, 4.0),
    st.integers(0, 2**31), st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_tissue_of_the_tiles_adds_up_to_that_of_the_slide(
    rows: int, cols: int, mpp: float, tile_px: int, tile_mpp: float, seed: int, share: float
) -> None:
    mask = TissueMask(np.random.default_rng(seed).random((rows, cols)) < share, mpp)
    grid = TileGrid.square(cols * mpp, rows * mpp, tile_px, tile_mpp)
    _, fraction = choose_tiles(grid, mask, 0.0)
    covered = float(fraction.astype(np.float64).sum()) * grid.tile_width_um**2
    # float32 fractions, and slivers below 1e-9 of a tile that are left out.
    assert np.isclose(covered, mask.area_um2, rtol=1e-4, atol=1e-6 * grid.tile_width_um**2 * grid.num_tiles)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_more_tissue_asked_for_fewer_tiles_chosen(seed: int, one: float, other: float) -> None:
    mask = TissueMask(np.random.default_rng(seed).random((20, 30)) < 0.5, 8.0)
    grid = TileGrid.square(240.0, 160.0, 50, 0.5)
    few, many = (set(choose_tiles(grid, mask, value)[0].tolist()) for value in (max(one, other), min(one, other)))
    assert few <= many
