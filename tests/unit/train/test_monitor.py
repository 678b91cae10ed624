"""Attention monitor: entropy, the largest share, what is warned of; and drift of the encoder."""

import math

import pytest
import torch

from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.testing.exactness import own_tiles
from gigamil.train.monitor import AttentionMonitor, encoder_drift
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
    assert noted([1.0], [1.0]).warning() is None


def test_warns_where_one_tile_decides_in_most_slides() -> None:
    warning = noted(TINY, TINY, [0.4, 0.3, 0.2, 0.1]).warning()
    assert warning is not None
    assert "collapsed: in 2 of 3 validation slides a single tile decides" in warning
    assert noted(TINY, [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]).warning() is None


def test_warns_where_all_tiles_count_alike() -> None:
    warning = noted(EVEN, EVEN).warning()
    assert warning is not None
    assert "does not choose: in 2 of 2" in warning
    assert noted([0.3, 0.25, 0.2, 0.25], EVEN, [0.4, 0.3, 0.2, 0.1]).warning() is None


def test_nothing_seen_is_nothing_said() -> None:
    assert AttentionMonitor().warning() is None
    assert AttentionMonitor().values([]) == {}


def test_drift_is_relative_to_the_start() -> None:
    start = {"encoder.a": torch.tensor([3.0, 0.0]), "encoder.b": torch.tensor([[4.0]])}
    moved = {"encoder.a": torch.tensor([3.0, 1.0]), "encoder.b": torch.tensor([[4.0]]), "head": torch.ones(3)}
    assert encoder_drift(start, start) == 0.0
    assert encoder_drift(moved, start) == pytest.approx(0.2)
    assert encoder_drift(moved, {}) is None
