"""Tiles that are drawn: so many, the same for the same key, single ones or neighbourhoods."""

from collections import Counter

import numpy as np
import pytest

from gigamil.config.schema import Regime
from gigamil.partition.choose import region_tiles, sampled_sizes, uniform_tiles
from gigamil.partition.schedule import balanced_order


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.arange(side) * 10.0, side), np.repeat(np.arange(side) * 10.0, side)


def test_so_many_tiles_each_once_in_order_and_by_the_key_alone() -> None:
    found = uniform_tiles(1000, 64, "0/7/slide")
    assert len(found) == 64
    assert (np.diff(found) > 0).all()
    assert found.tolist() == uniform_tiles(1000, 64, "0/7/slide").tolist()
    assert found.tolist() != uniform_tiles(1000, 64, "0/8/slide").tolist()
    assert uniform_tiles(5, 64, "x").tolist() == [0, 1, 2, 3, 4]


def test_every_tile_comes_equally_often() -> None:
    counts = np.zeros(20)
    for number in range(4000):
        counts[uniform_tiles(20, 5, str(number))] += 1
    assert abs(counts / 1000 - 1).max() < 0.12  # 4 standard deviations


def test_regions_bring_neighbours_which_single_tiles_hardly_have() -> None:
    x, y = grid(60)

    def neighbours(chosen: np.ndarray) -> float:
        taken = set(chosen.tolist())
        pairs = sum((number + 1) in taken for number in taken if number % 60 < 59)
        return pairs / len(taken)

    regions = region_tiles(x, y, 10.0, 200, "key")
    assert len(regions) == 200
    assert (np.diff(regions) > 0).all()
    assert neighbours(regions) > 0.6
    assert neighbours(uniform_tiles(3600, 200, "key")) < 0.15
    assert regions.tolist() == region_tiles(x, y, 10.0, 200, "key").tolist()
    assert len(region_tiles(x, y, 10.0, 9999, "key")) == 3600


def test_the_first_regions_are_of_1_3_5_and_9_tiles_on_a_side() -> None:
    x, y = grid(101)

    def has_square(chosen: np.ndarray, side: int) -> bool:
        taken_hw = np.zeros((101, 101), dtype=bool)
        taken_hw.flat[chosen] = True
        return bool(np.lib.stride_tricks.sliding_window_view(taken_hw, (side, side)).all(axis=(2, 3)).any())

    for count, side in ((1 + 9, 3), (1 + 9 + 25, 5), (1 + 9 + 25 + 81, 9)):
        found = [region_tiles(x, y, 10.0, count, f"key {number}") for number in range(10)]
        assert sum(has_square(chosen, side) for chosen in found) >= 6  # those at the border have less
        assert not any(has_square(chosen, side + 2) for chosen in found)


def test_sizes_of_a_step_are_bounded_where_tiles_are_drawn() -> None:
    assert sampled_sizes(Regime(name="sampled", tiles=10), [3, 30]) == (3, 10)
    assert sampled_sizes(Regime(name="select", tiles=10), [3, 30]) == (3, 30)  # all are scanned
    with pytest.raises(ValueError, match="science.regime.how=top with sampled: it is one of uniform, regions"):
        Regime(name="sampled", how="top")


class TestBalance:
    def test_classes_come_equally_often_whatever_their_size(self) -> None:
        classes = [0] * 50 + [1] * 7 + [2] * 3
        order = balanced_order(classes, 0, 1)
        assert len(order) == 60
        assert Counter(np.array(classes)[order].tolist()) == {0: 20, 1: 20, 2: 20}
        rare = Counter(order[order >= 57].tolist())
        assert max(rare.values()) - min(rare.values()) <= 1
        assert len(set(order[order < 50].tolist())) == 20  # none twice while others wait

    def test_epochs_differ_and_the_seed_decides(self) -> None:
        classes = [0, 1] * 5 + [0] * 9
        assert balanced_order(classes, 3, 0).tolist() == balanced_order(classes, 3, 0).tolist()
        assert balanced_order(classes, 3, 0).tolist() != balanced_order(classes, 3, 1).tolist()
        assert balanced_order(classes, 3, 0).tolist() != balanced_order(classes, 4, 0).tolist()
        odd = [Counter(np.array(classes)[balanced_order(classes, 0, epoch)].tolist())[0] for epoch in range(40)]
        assert set(odd) == {9, 10}  # of 19 slides one class has one more, in turn
