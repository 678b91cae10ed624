"""How long each rank takes for its tiles: gathered every few steps, a slow rank named, spans shared out by speed.

A step of a rank has three parts. It waits for its tiles (`data_s`); it encodes them and back-propagates through the encoder,
which no other rank has a part in (`own_s`); and the rest (`rest_s`), in which ranks meet: head, collectives, optimiser, and
above all waiting for those that are not there yet. The rank that the others wait for has the smallest rest, and what another
rank has more than that it has spent waiting (`wait_s`).

Where ranks share a slide row by row (`execution.halo: exchange`) they meet in every layer, so there `own_s` has the waiting
in it, and a slow rank cannot be told from the others.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from gigamil.parallel.collectives import stack_ranks
from gigamil.partition.schedule import StepPlan

if TYPE_CHECKING:
    from gigamil.train.step import Ranks

SLOW = 1.3  # times the median of the others, per tile; clocks and caches of equal ranks differ by a tenth
_WORTH = 0.05  # of a step: what costs less is not worth a word, as with features, where all is quick and uneven
_IN_A_ROW = 2  # gatherings; one alone may be a file that came late, or a page of the operating system
MEAN_SHARE = 32  # of a rank under `execution.balance: speed`: shares are told apart from 3 % of the mean speed on


class ComputeClock:
    """Seconds that this rank works for itself.

    On a GPU they are read from events when they are taken, so that nothing waits for the device while it works.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that the block takes; no collective may be in it."""
        if not self._on_gpu:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._events.append((begin, end))

    def take(self, waited_s: float) -> float:
        """Seconds since the last call.

        Args:
            waited_s: what of it was spent waiting for tiles. On a GPU it is not taken off: the thread that waits is ahead of
                the device, which works meanwhile.
        """
        seconds = self._seconds if self._on_gpu else max(0.0, self._seconds - waited_s)
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1e3
        self._seconds = 0.0
        self._events.clear()
        return seconds


@dataclass(frozen=True)
class RankTimes:
    """What the ranks did in the last steps; equal on all of them. Tuples have a number per rank, means per step.

    Attributes:
        steps: how many.
        tiles: of each rank.
        step_s: the whole step.
        data_s: waiting for tiles.
        own_s: encoding and back-propagating them.
        gradient_share: of the squared norm of dL/dh of all tiles, what those of each rank have.
    """

    steps: int
    tiles: tuple[float, ...]
    step_s: tuple[float, ...]
    data_s: tuple[float, ...]
    own_s: tuple[float, ...]
    gradient_share: tuple[float, ...]

    @cached_property
    def rest_s(self) -> tuple[float, ...]:
        """Head, collectives, optimiser, waiting for other ranks."""
        parts = zip(self.step_s, self.data_s, self.own_s, strict=True)
        return tuple(max(0.0, step - data - own) for step, data, own in parts)

    @cached_property
    def wait_s(self) -> tuple[float, ...]:
        """Waiting for other ranks: what is more than the smallest rest."""
        least = min(self.rest_s)
        return tuple(rest - least for rest in self.rest_s)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """What a rank does before it can meet the others: tiles read and computed."""
        return tuple(data + own for data, own in zip(self.data_s, self.own_s, strict=True))

    @property
    def slowest_s(self) -> float:
        """`busy_s` of the rank that takes longest."""
        return max(self.busy_s)

    @property
    def imbalance(self) -> float:
        """`slowest_s` over the mean of all ranks: 1 if none waits for another."""
        mean = statistics.fmean(self.busy_s)
        return self.slowest_s / mean if mean else 1.0

    @cached_property
    def seconds_per_tile(self) -> tuple[float | None, ...]:
        """`busy_s` of a tile; None of a rank that had no tile."""
        return tuple(busy / tiles if tiles else None for busy, tiles in zip(self.busy_s, self.tiles, strict=True))


class RankMeter:
    """Adds up this rank's times, and gathers those of all.

    Args:
        ranks: of the run.
        device: of this rank.
    Attributes:
        clock: to run around the work that this rank does for itself.
    """

    def __init__(self, ranks: "Ranks", device: torch.device) -> None:
        self.clock = ComputeClock(device)
        self._ranks = ranks
        self._device = device
        self._sums = torch.zeros(6, dtype=torch.float64)

    def note(self, tiles: int, step_s: float, data_s: float, data_inside_s: float, signal: float) -> None:
        """Add a step.

        Args:
            tiles: of this rank.
            step_s: of the whole step.
            data_s: that it has waited for tiles.
            data_inside_s: what of that was while the clock ran.
            signal: squared norm of dL/dh of its tiles.
        """
        # A GPU that waits for tiles within the work is in both.
        own_s = min(self.clock.take(data_inside_s), max(0.0, step_s - data_s))
        self._sums += torch.tensor([1.0, tiles, step_s, data_s, own_s, signal], dtype=torch.float64)

    def gather(self) -> RankTimes:
        """The times of all ranks since the last call. All ranks call it, after one step at least.

        Cost: one all-gather of 6 numbers.
        """
        values, self._sums = self._sums.to(self._device), torch.zeros_like(self._sums)
        table_RX = values[None] if self._ranks.world is None else stack_ranks(values, self._ranks.world)
        steps = int(table_RX[0, 0])
        tiles, step_s, data_s, own_s = (tuple((column / steps).tolist()) for column in table_RX[:, 1:5].T)
        signal_R = table_RX[:, 5]
        shares = (signal_R / signal_R.sum().clamp(min=torch.finfo(signal_R.dtype).tiny)).tolist()
        return RankTimes(steps, tiles, step_s, data_s, own_s, tuple(shares))


class Straggler(NamedTuple):
    """A rank that takes longer for a tile than the others.

    Attributes:
        rank: which.
        times: as long as the median of the others.
        tile_s: that it takes.
        data_s: what of that it waits for the tile.
        others_s: median of the others.
    """

    rank: int
    times: float
    tile_s: float
    data_s: float
    others_s: float

    def words(self, name: str, can_balance: bool) -> str:
        """For the log: what is wrong, where, what to look at.

        Args:
            name: of the rank, with its host (`Ranks.name`).
            can_balance: it could be given fewer tiles, and is not.
        """
        waits = self.data_s > 0.5 * (self.tile_s - self.others_s)
        cure = (
            "its tiles come late: look at its host's way to the shards (execution.shard_cache keeps copies on the host's "
            "own disk), and at execution.decode_workers"
            if waits
            else "look on its host for other processes (top, nvidia-smi), for fewer cores than elsewhere, for a processor or "
            "GPU that is throttled (temperature, power limit)"
        )
        return (
            f"{name} takes {self.times:.1f} times as long per tile as the others: "
            f"{1e3 * self.tile_s:.3g} ms, of which {1e3 * self.data_s:.3g} ms waiting for it, against "
            f"{1e3 * self.others_s:.3g} ms; {cure}."
            + (
                " All ranks wait for it: if it has to stay so, execution.balance: speed gives it fewer tiles."
                * can_balance
            )
        )


class StragglerWatch:
    """Tells slow ranks from gatherings, each once until it is no longer slow."""

    def __init__(self) -> None:
        self._in_a_row: dict[int, int] = {}

    def look(self, times: RankTimes) -> list[Straggler]:
        """Ranks that have been slow in two gatherings in a row, and were not before."""
        slow = {straggler.rank: straggler for straggler in slow_ranks(times)}
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in slow}
        return [straggler for rank, straggler in slow.items() if self._in_a_row[rank] == _IN_A_ROW]


def slow_ranks(times: RankTimes) -> list[Straggler]:
    """Ranks that took more than `SLOW` times as long per tile as the median of the others, and cost the step something."""
    known = {rank: seconds for rank, seconds in enumerate(times.seconds_per_tile) if seconds is not None}
    found = []
    for rank, tile_s in known.items():
        others = [seconds for other, seconds in known.items() if other != rank]
        if not others:
            continue
        median = statistics.median(others)
        loses_s = (tile_s - median) * times.tiles[rank]
        if tile_s > SLOW * median > 0 and loses_s > _WORTH * times.step_s[rank]:
            data_s = times.data_s[rank] / times.tiles[rank]
            found.append(Straggler(rank, tile_s / median, tile_s, data_s, median))
    return found


def shares_by_speed(times: RankTimes, before: Sequence[int] | None) -> tuple[int, ...]:
    """Shares of the tiles of a step for each rank, in proportion to tiles per second; `MEAN_SHARE` on average.

    Whole numbers, so that speeds that are nearly equal give even spans, and smoothed by half. No rank gets a share of 0: it
    would never be measured again. A rank that had no tile is taken to be as fast as the median.

    Args:
        times: of the last steps.
        before: shares of now; None: even ones, which do not count.
    """
    speeds = [1 / seconds if seconds else None for seconds in times.seconds_per_tile]
    known = [speed for speed in speeds if speed is not None]
    middle = statistics.median(known) if known else 1.0
    filled = [middle if speed is None else speed for speed in speeds]
    mean = statistics.fmean(filled)
    wanted = [MEAN_SHARE * speed / mean for speed in filled]
    if before is not None:
        wanted = [(old + new) / 2 for old, new in zip(before, wanted, strict=True)]
    return tuple(max(1, round(share)) for share in wanted)


class AgreedShares:
    """The shares of the ranks in each step: changed for steps that no rank has begun to read.

    A rank computes a step while its loader holds the next `prefetch`, waits to hand over one, and asks for the plan of the
    one after that only when the step is done: that is the first for which new shares can be the same on all ranks. Without
    a loader that reads ahead it is the next step.

    Args:
        prefetch: of the loader.
    """

    def __init__(self, prefetch: int) -> None:
        self._lead = prefetch + 2 if prefetch else 1
        self._changes: list[tuple[int, tuple[int, ...] | None]] = [(0, None)]

    @property
    def newest(self) -> tuple[int, ...] | None:
        """What was adopted last; None: equal shares."""
        return self._changes[-1][1]

    def adopt(self, step: int, shares: tuple[int, ...]) -> None:
        """Take shares, known after this step (counted from 0), for the first step that they can hold for."""
        if shares != self.newest:
            self._changes.append((step + self._lead, shares))

    def at(self, step: int) -> tuple[int, ...] | None:
        """Shares in a step."""
        return next(shares for since, shares in reversed(self._changes) if since <= step)

    def given(self, plans: Iterable[StepPlan], first: int) -> Iterator[StepPlan]:
        """Plans of steps `first`, `first` + 1, ... with their shares, each made when it is asked for."""
        for step, plan in enumerate(plans, first):
            yield replace(plan, shares=self.at(step))
