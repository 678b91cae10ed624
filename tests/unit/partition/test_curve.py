"""The curve is a bijection whose steps are of length one, so a run of it is a compact region."""

import numpy as np
import pytest

from gigamil.partition.curve import hilbert_index, hilbert_sort


def test_order_one_is_the_known_curve() -> None:
    assert hilbert_index(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]), 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [0, 1, 2, 3, 6])
def test_square_is_covered_once_and_steps_have_length_one(order: int) -> None:
    row, column = np.divmod(np.arange(4**order), 2**order)
    index = hilbert_index(column, row, order)
    assert sorted(index.tolist()) == list(range(4**order))
    along = np.argsort(index)
    steps = np.abs(np.diff(column[along])) + np.abs(np.diff(row[along]))
    assert (steps == 1).all()


def test_largest_order_stays_inside_int64() -> None:
    corner = 2**31 - 1
    index = hilbert_index(np.array([0, corner]), np.array([0, 0]), 31)
    assert index.tolist() == [0, 4**31 - 1]


def test_inputs_are_not_changed() -> None:
    x, y = np.arange(4), np.arange(4)
    hilbert_index(x, y, 2)
    assert x.tolist() == y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("x", "y", "order", "words"),
    [([4], [0], 2, "outside the 4 x 4"), ([-1], [0], 2, "outside"), ([0], [0, 1], 2, "shape"), ([0], [0], 32, "32")],
)
def test_bad_input_is_refused(x: list[int], y: list[int], order: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hilbert_index(np.array(x), np.array(y), order)


def test_a_run_of_a_ragged_grid_is_compact() -> None:
    row, column = np.divmod(np.arange(40 * 25), 40)
    along = hilbert_sort(column, row)
    assert sorted(along.tolist()) == list(range(1000))
    run = along[300:400]
    box = (np.ptp(column[run]) + 1) * (np.ptp(row[run]) + 1)
    assert box <= 4 * len(run)  # a run of 100 row-major tiles would span 40 x 3 and a random one 40 x 25


def test_no_cells() -> None:
    assert hilbert_sort(np.zeros(0, int), np.zeros(0, int)).tolist() == []
