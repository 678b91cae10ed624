"""Times of ranks: split into parts, slow ranks named once, spans by speed that all ranks agree on."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gigamil.data.pipeline import StepLoader
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.train import stragglers
from gigamil.train.step import Ranks
from gigamil.train.stragglers import (
    MEAN_SHARE,
    AgreedShares,
    ComputeClock,
    RankMeter,
    RankTimes,
    StragglerWatch,
    shares_by_speed,
    slow_ranks,
)


def times(own_s: list[float], tiles: list[float] | None = None, data_s: list[float] | None = None) -> RankTimes:
    """Ranks that meet for 0.5 s after the slowest is there."""
    num = len(own_s)
    data_s = data_s or [0.0] * num
    step_s = max(own + data for own, data in zip(own_s, data_s, strict=True)) + 0.5
    return RankTimes(10, tuple(tiles or [100.0] * num), (step_s,) * num, tuple(data_s), tuple(own_s), (1 / num,) * num)


class TestParts:
    def test_what_is_more_than_the_smallest_rest_is_waiting(self) -> None:
        found = times([1.0, 2.0, 4.0], data_s=[0.0, 0.5, 0.0])
        assert found.rest_s == (3.5, 2.0, 0.5)
        assert found.wait_s == (3.0, 1.5, 0.0)
        assert found.slowest_s == 4.0
        assert found.imbalance == pytest.approx(4.0 / 2.5)

    def test_ranks_that_do_nothing_are_balanced(self) -> None:
        assert times([0.0, 0.0]).imbalance == 1.0

    def test_a_rank_without_tiles_has_no_time_per_tile(self) -> None:
        assert times([1.0, 0.1], tiles=[50.0, 0.0]).seconds_per_tile == (0.02, None)


class TestMeter:
    def test_means_since_the_last_gathering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([0.0, 1.0, 5.0, 5.5, 10.0, 12.0])
        monkeypatch.setattr(stragglers.time, "perf_counter", lambda: next(clock))
        meter = RankMeter(Ranks(Topology()), torch.device("cpu"))
        with meter.clock.running():
            pass
        with meter.clock.running():
            pass
        meter.note(30, 4.0, 0.75, 0.25, 2.0)
        with meter.clock.running():
            pass
        meter.note(10, 3.0, 0.25, 0.0, 3.0)
        found = meter.gather()
        assert found == RankTimes(2, (20.0,), (3.5,), (0.5,), (1.625,), (1.0,))  # (1 + 0.5 - 0.25 + 2) / 2
        meter.note(8, 1.0, 0.0, 0.0, 0.0)
        assert meter.gather() == RankTimes(1, (8.0,), (1.0,), (0.0,), (0.0,), (0.0,))

    def test_the_clock_counts_what_an_error_breaks_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ticks = iter([0.0, 3.0])
        monkeypatch.setattr(stragglers.time, "perf_counter", lambda: next(ticks))
        clock = ComputeClock(torch.device("cpu"))
        with pytest.raises(KeyError), clock.running():
            raise KeyError
        assert clock.take(0.0) == 3.0
        assert clock.take(0.0) == 0.0

    def test_a_gpu_that_waits_for_tiles_within_its_work_does_not_count_them_twice(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Event:
            """Of a GPU on which each block takes three seconds, of which it waits one for its tiles."""

            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                """Nothing waits."""

            def synchronize(self) -> None:
                """The work is done."""

            def elapsed_time(self, _end: "Event") -> float:
                return 3000.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        meter = RankMeter(Ranks(Topology()), torch.device("cpu"))
        meter.clock = ComputeClock(torch.device("cuda"))
        with meter.clock.running():
            pass
        meter.note(10, 3.0, 1.0, 1.0, 1.0)
        assert meter.gather() == RankTimes(1, (10.0,), (3.0,), (1.0,), (2.0,), (1.0,))

    def test_waiting_is_never_more_than_the_time(self) -> None:
        assert ComputeClock(torch.device("cpu")).take(1.0) == 0.0


class TestSlowRanks:
    def test_against_the_median_of_the_others(self) -> None:
        assert slow_ranks(times([1.0, 1.29, 1.0, 0.9])) == []
        (found,) = slow_ranks(times([1.0, 1.0, 1.8, 1.1]))
        assert (found.rank, found.times) == (2, pytest.approx(1.8))
        assert (found.tile_s, found.others_s) == (pytest.approx(0.018), pytest.approx(0.010))

    def test_per_tile(self) -> None:
        assert slow_ranks(times([1.0, 2.0], tiles=[50.0, 100.0])) == []
        assert [s.rank for s in slow_ranks(times([1.0, 1.0], tiles=[50.0, 100.0]))] == [0]

    def test_one_rank_alone_and_ranks_without_tiles_are_not_slow(self) -> None:
        assert slow_ranks(times([1.0])) == []
        assert slow_ranks(times([1.0, 5.0], tiles=[100.0, 0.0])) == []

    def test_what_costs_next_to_nothing_is_not_worth_a_word(self) -> None:
        quick = times([0.001, 0.01])  # of a step of half a second
        assert slow_ranks(quick) == []

    def test_named_once_until_it_is_well_again(self) -> None:
        watch, slow, well = StragglerWatch(), times([1.0, 2.0, 1.0]), times([1.0, 1.0, 1.0])
        seen = [[s.rank for s in watch.look(t)] for t in (slow, well, slow, slow, slow, well, slow, slow)]
        assert seen == [[], [], [], [1], [], [], [], [1]]

    def test_words_name_the_rank_the_times_and_what_to_look_at(self) -> None:
        (computes,) = slow_ranks(times([1.0, 1.8]))
        words = computes.words("rank 1 on host 'node2'", True)
        assert words.startswith("rank 1 on host 'node2' takes 1.8 times as long per tile as the others: 18 ms")
        assert "throttled" in words
        assert "shards" not in words
        assert "execution.balance: speed gives it fewer tiles" in words
        assert "execution.balance" not in computes.words("rank 1", False)  # it is given fewer already, or cannot be
        (waits,) = slow_ranks(times([1.0, 1.0], data_s=[0.0, 0.8]))
        assert "its tiles come late" in waits.words("rank 1", True)
        assert "8 ms waiting" in waits.words("rank 1", True)


class TestShares:
    def test_in_proportion_to_speed(self) -> None:
        shares = shares_by_speed(times([1.0, 3.0]), None)
        assert shares == (round(1.5 * MEAN_SHARE), round(0.5 * MEAN_SHARE))

    def test_waiting_for_tiles_counts(self) -> None:
        assert shares_by_speed(times([1.0, 1.0], data_s=[0.0, 2.0]), None) == shares_by_speed(times([1.0, 3.0]), None)

    def test_speeds_that_are_nearly_equal_give_equal_shares(self) -> None:
        assert shares_by_speed(times([1.0, 1.012, 0.99, 1.0]), None) == (MEAN_SHARE,) * 4

    def test_half_of_the_way_each_time(self) -> None:
        before = (MEAN_SHARE, MEAN_SHARE)
        once = shares_by_speed(times([1.0, 3.0]), before)
        assert once == (round(1.25 * MEAN_SHARE), round(0.75 * MEAN_SHARE))
        twice = shares_by_speed(times([1.0, 3.0]), once)
        assert before[0] < once[0] < twice[0] <= round(1.5 * MEAN_SHARE)

    def test_nobody_is_left_without_a_share(self) -> None:
        assert shares_by_speed(times([1.0, 1000.0]), None)[1] == 1

    def test_a_rank_that_had_no_tile_is_taken_for_the_median(self) -> None:
        shares = shares_by_speed(times([1.0, 0.0, 1.0], tiles=[100.0, 0.0, 100.0]), None)
        assert shares == (MEAN_SHARE,) * 3
        assert shares_by_speed(times([0.0, 0.0], tiles=[0.0, 0.0]), None) == (MEAN_SHARE,) * 2


class TestAgreedShares:
    def test_they_hold_from_the_first_step_that_no_rank_has_begun_to_read(self) -> None:
        agreed = AgreedShares(prefetch=2)
        agreed.adopt(5, (1, 3))
        agreed.adopt(6, (1, 3))  # nothing new
        agreed.adopt(7, (2, 2))
        assert agreed.newest == (2, 2)
        assert [agreed.at(step) for step in (0, 8, 9, 10, 11, 99)] == [None, None, (1, 3), (1, 3), (2, 2), (2, 2)]

    def test_plans_are_made_when_they_are_asked_for(self) -> None:
        plans = plan_steps(range(5), [10] * 5, 1, 1, 2)
        agreed = AgreedShares(prefetch=1)
        given = agreed.given(plans, first=20)
        assert next(given) == plans[0]
        agreed.adopt(20, (1, 3))
        assert [next(given), next(given)] == plans[1:3]  # a loader may have begun them before step 20 was done
        assert next(given) == replace(plans[3], shares=(1, 3))
        assert next(given).counts(0) == (2, 8)

    def test_nothing_is_begun_where_nothing_is_read_ahead(self) -> None:
        agreed = AgreedShares(prefetch=0)
        agreed.adopt(5, (1, 3))
        assert [agreed.at(step) for step in (5, 6)] == [None, (1, 3)]

    @pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
    def test_every_loader_gives_a_step_the_same_shares(self, tmp_path: Path, prefetch: int) -> None:
        make_shards(tmp_path, "slide", noise_jpegs(8, 16), tile_px=16)
        plans = plan_steps([0] * 20, [8], 1, 1, 2)
        seen = []
        for pause in (0.0, 0.02):  # the consumer is as quick as the loader, or leaves it time to read all it may
            agreed = AgreedShares(prefetch)
            loader = StepLoader(ShardSet(tmp_path), ["slide"], 16, Topology(2, 0, 0, 2, 2), prefetch)
            found = []
            for step, (plan, _) in enumerate(loader.iterate(agreed.given(plans, 0))):
                found.append(plan.shares)
                time.sleep(pause)
                agreed.adopt(step, (step + 1, 1))
            seen.append(found)
        lead = prefetch + 2 if prefetch else 1
        assert seen[0] == seen[1] == [None] * lead + [(step + 1, 1) for step in range(20 - lead)]
