"""Attention monitor: entropy, the largest share, what is warned of; and drift of the encoder."""

import math

import pytest
import torch

from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.testing.exactness import own_tiles
from gigamil.train.monitor import LONG, AttentionMonitor, AttentionWatch, encoder_drift
from gigamil.train.step import Ranks

TINY = [0.98, 0.01, 0.005, 0.005]  # one tile decides
EVEN = [0.25] * 4


def noted(*attention: list[float]) -> AttentionMonitor:
    """A monitor that was given slides with these attention values, in one step."""
    (plan,) = plan_steps(range(len(attention)), [len(own) for own in attention], len(attention), 1, 1)
    tiles = own_tiles([torch.zeros((len(own), 2, 2, 3), dtype=torch.uint8) for own in attention], plan, Topology())
    rows = [
        attention[plan.groups[0][slide]][number]
        for slide, number in zip(tiles.slide_index_n, tiles.number_n, strict=True)
    ]
    monitor = AttentionMonitor()
    monitor.note(plan, tiles, torch.tensor(rows, dtype=torch.float64)[:, None], Ranks(Topology()))
    return monitor


def test_entropy_is_one_where_all_tiles_count_alike_and_zero_where_one_does() -> None:
    monitor = noted(EVEN, [1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0])
    assert monitor.entropy == pytest.approx([1.0, 0.0, 0.5])
    assert monitor.max_n == pytest.approx([1.0, 3.0, 2.0])
    assert monitor.tiles == pytest.approx([4.0, 1.0, 2.0])


def test_means_of_slides_and_of_negative_ones() -> None:
    values = noted(EVEN, [1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]).values([True, False, True])
    assert values == pytest.approx({"attention_entropy": 0.5, "attention_max_n": 2.0, "attention_max_n_negative": 1.5})
    assert "attention_max_n_negative" not in noted(EVEN).values([])


def test_slide_of_one_tile_has_no_entropy() -> None:
    monitor = noted([1.0], EVEN)
    assert math.isnan(monitor.entropy[0])
    assert monitor.values([])["attention_entropy"] == pytest.approx(1.0)


SOME = [0.4, 0.3, 0.2, 0.1]


def test_says_once_where_one_tile_decides_in_most_slides() -> None:
    watch = AttentionWatch()
    assert watch.look(noted(TINY, SOME, SOME), []) is None
    warning = watch.look(noted(TINY, TINY, SOME), [])
    assert warning is not None
    assert "collapsed: in 2 of 3 validation slides a single tile decides" in warning
    assert watch.look(noted(TINY, TINY, SOME), []) is None


def test_says_once_where_all_tiles_count_alike_for_long() -> None:
    watch = AttentionWatch()
    for _ in range(LONG - 1):
        assert watch.look(noted(EVEN, EVEN, SOME), []) is None
    assert watch.look(noted(SOME, EVEN, SOME), []) is None  # it chooses after all
    for _ in range(LONG - 1):
        assert watch.look(noted(EVEN, EVEN, SOME), []) is None
    warning = watch.look(noted(EVEN, EVEN, SOME), [])
    assert warning is not None
    assert "in most validation slides (now in 2 of 3)" in warning
    assert watch.look(noted(EVEN, EVEN, SOME), []) is None


def test_even_attention_is_right_in_negative_slides() -> None:
    watch, is_negative = AttentionWatch(), [True, False, True, False]
    assert all(watch.look(noted(EVEN, SOME, EVEN, SOME), is_negative) is None for _ in range(2 * LONG))
    for _ in range(LONG - 1):
        assert watch.look(noted(SOME, EVEN, SOME, SOME), is_negative) is None
    warning = watch.look(noted(SOME, EVEN, SOME, EVEN), is_negative)
    assert warning is not None
    assert "in most validation slides that are not of the first class (now in 2 of 2)" in warning


def test_one_slide_that_is_not_negative_is_too_few_to_tell() -> None:
    watch = AttentionWatch()
    assert all(watch.look(noted(EVEN, EVEN, [1.0]), [True, False, False]) is None for _ in range(2 * LONG))


def test_slides_of_one_tile_say_nothing() -> None:
    watch = AttentionWatch()
    assert all(watch.look(noted([1.0], [1.0], [1.0]), []) is None for _ in range(2 * LONG))
    assert AttentionMonitor().values([]) == {}


def test_drift_is_relative_to_the_start() -> None:
    start = {"encoder.a": torch.tensor([3.0, 0.0]), "encoder.b": torch.tensor([[4.0]])}
    moved = {"encoder.a": torch.tensor([3.0, 1.0]), "encoder.b": torch.tensor([[4.0]]), "head": torch.ones(3)}
    assert encoder_drift(start, start) == 0.0
    assert encoder_drift(moved, start) == pytest.approx(0.2)
    assert encoder_drift(moved, {}) is None
